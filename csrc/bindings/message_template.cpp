#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "bindings/checks.hpp"
#include "bindings/dlpack.hpp"
#include "bindings/module.hpp"
#include "packing/pack.hpp"

namespace py = pybind11;

namespace pe {
namespace {

constexpr int kNoTensor = -1;
constexpr std::int64_t kMostBytes = std::int64_t{1} << 60;
constexpr std::int64_t kBrief = 1 << 18;  // bytes; releasing the GIL takes longer than copying them

// The format of a message: its tensors, each contiguous and in memory of its own, and the values between them.
// Packs another message of this format in one call.
class MessageTemplate {
 public:
  // `tensors`: for each tensor its dtype, shape, offset in the buffer, and address modulo `alignment`. `parts`:
  // for each result its leaves that are not tensors, and by leaf the numbers of its tensors.
  MessageTemplate(const py::sequence& tensors, const py::sequence& requires_grad, const py::sequence& parts,
                  std::int64_t alignment)
      : alignment_(alignment) {
    const py::module_ torch = py::module_::import("torch");
    tensor_ = torch.attr("Tensor");
    parameter_ = torch.attr("nn").attr("Parameter");
    for (std::size_t i = 0; i < tensors.size(); ++i) {
      const py::sequence tensor = tensors[i];
      const std::string dtype = py::str(tensor[0]);
      Expected expected{pe::dtype_of(std::string_view(dtype).substr(dtype.find('.') + 1)),
                        tensor[1].cast<std::vector<std::int64_t>>(),
                        tensor[2].cast<std::int64_t>(),
                        tensor[3].cast<std::int64_t>(),
                        0,
                        requires_grad[i].cast<bool>()};
      expected.nbytes = nbytes_of(expected.shape, expected.dtype);
      if (expected.offset < 0 || expected.offset > kMostBytes) {
        throw PackingError("tensor " + std::to_string(i) + " begins at " + std::to_string(expected.offset) +
                           ", outside of any buffer");
      }
      nbytes_ = std::max(nbytes_, expected.offset + expected.nbytes);
      expected_.push_back(std::move(expected));
    }
    std::vector<bool> seen(expected_.size(), false);
    for (const py::object part : parts) {  // an item may be made when it is asked for
      std::vector<Leaf> leaves;
      for (const py::handle leaf : part.attr("rest")) {
        leaves.push_back({kNoTensor, py::reinterpret_borrow<py::object>(leaf)});
      }
      for (const py::handle pair : part.attr("numbers")) {
        const auto [leaf, number] = pair.cast<std::pair<std::size_t, int>>();
        leaves.at(leaf).tensor = checked("the number of a tensor", number, expected_.size());
        seen[number] = true;
      }
      parts_.push_back(std::move(leaves));
    }
    if (std::ranges::find(seen, false) != seen.end())
      throw PackingError("a tensor belongs to none of the parts");
    if (alignment_ < 1)
      throw PackingError("the alignment is " + std::to_string(alignment_) + "; give bytes, from 1");
  }

  bool pack(const py::list& results, const py::object& buffer) const {
    Borrower borrower;
    std::vector<py::object> tensors(expected_.size());
    if (!collect(results, tensors)) return false;
    std::vector<Copy> copies;
    copies.reserve(tensors.size());
    std::int64_t total = 0;
    try {
      const Strided whole = borrower.borrow(buffer, {"the buffer"});
      if (whole.dtype != kUint8 || !whole.is_contiguous() || whole.size() < nbytes_) return false;
      for (std::size_t i = 0; i < tensors.size(); ++i) {
        const Expected& expected = expected_[i];
        if (requires_grad(tensors[i]) != expected.requires_grad) return false;
        const Strided tensor = borrower.borrow(tensors[i], {"tensor", static_cast<int>(i)});
        if (!looks_like(tensor, expected)) return false;
        copies.push_back({whole.data + expected.offset, tensor.data, expected.nbytes});
        total += expected.nbytes;
      }
    } catch (const PackingError&) {
      return false;
    }
    if (overlap(copies)) return false;
    if (total <= kBrief) {
      copy(copies);
    } else {
      py::gil_scoped_release release;
      copy(copies);
    }
    return true;
  }

 private:
  struct Expected {
    DType dtype;
    std::vector<std::int64_t> shape;
    std::int64_t offset, misalignment, nbytes;
    bool requires_grad;
  };

  struct Leaf {
    int tensor;
    py::object value;  // of a leaf that is not a tensor
  };

  struct Copy {
    std::byte* to;
    const std::byte* from;
    std::int64_t nbytes;
  };

  // Finds the tensors. Returns whether they are plain tensors and all other leaves are equal to the template's.
  bool collect(const py::list& results, std::vector<py::object>& tensors) const {
    if (results.size() != parts_.size()) return false;
    for (std::size_t r = 0; r < parts_.size(); ++r) {
      const py::handle result = PyList_GET_ITEM(results.ptr(), r);
      const std::vector<Leaf>& leaves = parts_[r];
      const auto items = py::reinterpret_steal<py::object>(PySequence_Fast(result.ptr(), "not a sequence"));
      if (!items) throw py::error_already_set();
      if (PySequence_Fast_GET_SIZE(items.ptr()) != static_cast<Py_ssize_t>(leaves.size())) return false;
      for (std::size_t i = 0; i < leaves.size(); ++i) {
        const py::handle leaf = PySequence_Fast_GET_ITEM(items.ptr(), i);
        const int number = leaves[i].tensor;
        if (number == kNoTensor) {
          if (Py_TYPE(leaf.ptr()) != Py_TYPE(leaves[i].value.ptr())) return false;
          const int same = PyObject_RichCompareBool(leaf.ptr(), leaves[i].value.ptr(), Py_EQ);
          if (same < 0) throw py::error_already_set();
          if (same == 0) return false;
        } else if (!tensors[number]) {
          const py::handle type(reinterpret_cast<PyObject*>(Py_TYPE(leaf.ptr())));
          if (!type.is(tensor_) && !type.is(parameter_)) return false;
          tensors[number] = py::reinterpret_borrow<py::object>(leaf);
        } else if (!tensors[number].is(leaf)) {
          return false;
        }
      }
    }
    return true;
  }

  bool looks_like(const Strided& tensor, const Expected& expected) const {
    const auto address = static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(tensor.data));
    return tensor.dtype == expected.dtype && std::ranges::equal(tensor.shape, expected.shape) &&
           tensor.is_contiguous() && (tensor.size() == 0 || address % alignment_ == expected.misalignment);
  }

  static bool requires_grad(py::handle tensor) { return tensor.attr("requires_grad").ptr() == Py_True; }

  static bool overlap(const std::vector<Copy>& copies) {
    for (std::size_t i = 0; i < copies.size(); ++i) {
      for (std::size_t j = 0; j < i; ++j) {
        if (copies[i].from < copies[j].from + copies[j].nbytes &&
            copies[j].from < copies[i].from + copies[i].nbytes) {
          return true;
        }
      }
    }
    return false;
  }

  static void copy(const std::vector<Copy>& copies) {
    for (const Copy& copy : copies) {
      if (copy.nbytes > 0) std::memcpy(copy.to, copy.from, copy.nbytes);
    }
  }

  const std::int64_t alignment_;
  std::int64_t nbytes_ = 0;
  py::object tensor_, parameter_;
  std::vector<Expected> expected_;
  std::vector<std::vector<Leaf>> parts_;
};

}  // namespace

void bind_message_template(py::module_& m) {
  py::class_<MessageTemplate>(m, "MessageTemplate",
                              "The format of a message, to pack others of the same format in one call.")
      .def(py::init<const py::sequence&, const py::sequence&, const py::sequence&, std::int64_t>(),
           py::arg("tensors"), py::arg("requires_grad"), py::arg("parts"), py::arg("alignment"))
      .def("pack", &MessageTemplate::pack, py::arg("results"), py::arg("buffer"),
           "Packs results of this format. Writes nothing and returns False if they have another one.");
}

}  // namespace pe
