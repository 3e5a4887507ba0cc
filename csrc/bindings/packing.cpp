#include "packing/pack.hpp"

#include <pybind11/stl.h>

#include <memory>
#include <string_view>

#include "bindings/dlpack.hpp"
#include "bindings/module.hpp"

namespace py = pybind11;

namespace pe {
namespace {

DType dtype_of(const py::object& torch_dtype) {
  const std::string name = py::str(torch_dtype);
  return pe::dtype_of(std::string_view(name).substr(name.find('.') + 1));
}

Packer packer_of(const py::object& layout) {
  std::vector<Slot> slots;
  for (const py::handle slot : layout.attr("slots")) {
    slots.push_back({slot.attr("offset").cast<std::int64_t>(), dtype_of(slot.attr("dtype")),
                     dtype_of(slot.attr("wire")), slot.attr("shape").cast<std::vector<std::int64_t>>()});
  }
  return Packer(std::move(slots), layout.attr("nbytes").cast<std::int64_t>());
}

// Keeps tensors alive, with their borrowed memory.
struct Bound {
  explicit Bound(const py::sequence& given) : tensors(given) {
    strided.reserve(tensors.size());
    int index = 0;
    for (const py::handle tensor : tensors) {
      strided.push_back(borrower.borrow(tensor, {"tensor", index++}));
    }
  }

  py::tuple tensors;
  Borrower borrower;
  std::vector<Strided> strided;
};

// A packer and its tensors. A call keeps the tensors alive while it runs without the GIL.
class NativePacker {
 public:
  NativePacker(const py::object& layout, const py::sequence& tensors) : packer_(packer_of(layout)) {
    rebind(tensors);
  }

  void rebind(const py::sequence& tensors) {
    auto bound = std::make_shared<const Bound>(tensors);
    packer_.check(bound->strided);
    bound_ = std::move(bound);
  }

  void release() { bound_ = nullptr; }

  void pack(const py::object& buffer, double scale, const py::object& scales, const py::object& amax,
            const py::object& nonfinite) const {
    const auto bound = tensors();
    Borrower borrower;
    const std::size_t slots = packer_.slots().size();
    const Strided whole = borrower.borrow(buffer, {"the buffer"});
    const Scale by{scale, row<float>(borrower, scales, "scales", kFloat32, slots)};
    const Watch watch{row<float>(borrower, amax, "amax", kFloat32, slots),
                      row<std::int32_t>(borrower, nonfinite, "nonfinite", kInt32, 1)};
    py::gil_scoped_release release;
    packer_.pack(bound->strided, whole, by, watch);
  }

  void unpack(const py::object& buffer, double scale, const py::object& scales, bool accumulate) const {
    const auto bound = tensors();
    Borrower borrower;
    const Strided whole = borrower.borrow(buffer, {"the buffer"});
    const Scale by{scale, row<float>(borrower, scales, "scales", kFloat32, packer_.slots().size())};
    py::gil_scoped_release release;
    packer_.unpack(bound->strided, whole, by, accumulate);
  }

 private:
  std::shared_ptr<const Bound> tensors() const {
    if (bound_ == nullptr) throw PackingError("no tensors are bound; call rebind first");
    return bound_;
  }

  // The memory of an optional argument with `length` elements of `dtype`; null for None.
  template <class T>
  static T* row(Borrower& borrower, const py::object& argument, const char* name, DType dtype,
                std::size_t length) {
    if (argument.is_none()) return nullptr;
    const Strided given = borrower.borrow(argument, {name});
    if (given.dtype != dtype || !given.is_contiguous() || given.size() != static_cast<std::int64_t>(length)) {
      throw PackingError(std::string(name) + " is " + describe(given.dtype, given.shape) +
                         "; give contiguous " + name_of(dtype) + "[" + std::to_string(length) + "]");
    }
    return reinterpret_cast<T*>(given.data);
  }

  const Packer packer_;
  std::shared_ptr<const Bound> bound_;
};

}  // namespace

void bind_packing(py::module_& m) {
  translate<PackingError>("InvalidArgument");

  py::class_<NativePacker>(m, "NativePacker", R"(The ``Packer`` of tensors on the CPU.

Tensors and buffer are any objects that support DLPack.)")
      .def(py::init<const py::object&, const py::sequence&>(), py::arg("layout"), py::arg("tensors"))
      .def("rebind", &NativePacker::rebind, py::arg("tensors"))
      .def("release", &NativePacker::release)
      .def("pack", &NativePacker::pack, py::arg("buffer"), py::arg("scale") = 1.0, py::kw_only(),
           py::arg("scales") = py::none(), py::arg("amax") = py::none(), py::arg("nonfinite") = py::none())
      .def("unpack", &NativePacker::unpack, py::arg("buffer"), py::arg("scale") = 1.0, py::kw_only(),
           py::arg("scales") = py::none(), py::arg("accumulate") = false);
}

}  // namespace pe
