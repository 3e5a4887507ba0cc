#include "packing/pack.hpp"

#include <pybind11/stl.h>

#include "bindings/dlpack.hpp"
#include "bindings/module.hpp"

namespace py = pybind11;

namespace pe {
namespace {

// The tensors, held for the length of a call: what a list holds may change while the interpreter is free.
struct Borrowed {
  Borrowed(const py::sequence& sequence, const py::object& buffer) : tensors(sequence) {
    strided.reserve(tensors.size());
    int index = 0;
    for (const py::handle tensor : tensors) {
      strided.push_back(borrower.borrow(tensor, {"tensor", index++}));
    }
    whole = borrower.borrow(buffer, {"the buffer"});
  }

  // The memory of an optional argument, `length` elements of `dtype`.
  template <class T>
  T* row(const py::object& argument, const char* name, DType dtype, std::size_t length) {
    if (argument.is_none()) return nullptr;
    const Strided given = borrower.borrow(argument, {name});
    if (given.dtype != dtype || !given.is_contiguous() ||
        given.size() != static_cast<std::int64_t>(length)) {
      throw PackingError(std::string(name) + " must be contiguous, of " + name_of(dtype) + " and " +
                         std::to_string(length) + " elements");
    }
    return reinterpret_cast<T*>(given.data);
  }

  Borrower borrower;
  py::tuple tensors;
  std::vector<Strided> strided;
  Strided whole;
};

Packer make_packer(const std::vector<std::int64_t>& offsets,
                   std::vector<std::vector<std::int64_t>> shapes,
                   const std::vector<std::string>& dtypes, const std::vector<std::string>& wires,
                   std::int64_t nbytes) {
  if (shapes.size() != offsets.size() || dtypes.size() != offsets.size() ||
      wires.size() != offsets.size()) {
    throw PackingError("each slot needs an offset, a shape, a dtype and a wire");
  }
  std::vector<Slot> slots;
  for (std::size_t i = 0; i < offsets.size(); ++i) {
    slots.push_back({offsets[i], dtype_of(dtypes[i]), dtype_of(wires[i]), std::move(shapes[i])});
  }
  return Packer(std::move(slots), nbytes);
}

void pack(const Packer& packer, const py::sequence& tensors, const py::object& buffer, double scale,
          const py::object& scales, const py::object& amax, const py::object& nonfinite) {
  Borrowed borrowed(tensors, buffer);
  const std::size_t slots = packer.slots().size();
  const Scale by{scale, borrowed.row<float>(scales, "scales", kFloat32, slots)};
  const Watch watch{borrowed.row<float>(amax, "amax", kFloat32, slots),
                    borrowed.row<std::int32_t>(nonfinite, "nonfinite", kInt32, 1)};
  py::gil_scoped_release release;
  packer.pack(borrowed.strided, borrowed.whole, by, watch);
}

void unpack(const Packer& packer, const py::sequence& tensors, const py::object& buffer,
            double scale, const py::object& scales, bool accumulate) {
  Borrowed borrowed(tensors, buffer);
  const Scale by{scale,
                 borrowed.row<float>(scales, "scales", kFloat32, packer.slots().size())};
  py::gil_scoped_release release;
  packer.unpack(borrowed.strided, borrowed.whole, by, accumulate);
}

}  // namespace

void bind_packing(py::module_& m) {
  // Leaked on purpose: needed until the interpreter ends.
  static auto* const invalid_argument = new py::object(
      py::module_::import("pipeline_ext.errors").attr("InvalidArgument"));
  py::register_exception_translator([](std::exception_ptr error) {
    try {
      if (error) std::rethrow_exception(error);
    } catch (const PackingError& refused) {
      py::set_error(*invalid_argument, refused.what());
    }
  });

  py::class_<Packer>(m, "Packer", R"(Moves tensors of the CPU into one buffer and back, each at its slot.

Tensors are whatever lends its memory through DLPack: torch's, of any strides, and numpy's writable arrays.
The buffer is contiguous uint8 of one dimension and at least ``nbytes``, at a multiple of 16 in memory.
Arithmetic is in float32, in float64 for tensors of that type. Casts round to nearest even; too large for
float8_e4m3fn, infinity included, becomes its largest value, 448, and for other types infinity; NaN stays NaN.
Integers and booleans are copied bit for bit. Autograd does not see what is written.

Both methods raise InvalidArgument, having written nothing, for tensors that do not fit their slots.)")
      .def(py::init(&make_packer), py::arg("offsets"), py::arg("shapes"), py::arg("dtypes"),
           py::arg("wires"), py::arg("nbytes"))
      .def_property_readonly("nbytes", &Packer::nbytes, "Bytes the buffer needs.")
      .def("pack", &pack, py::arg("tensors"), py::arg("buffer"), py::kw_only(),
           py::arg("scale") = 1.0, py::arg("scales") = py::none(), py::arg("amax") = py::none(),
           py::arg("nonfinite") = py::none(),
           R"(Slot i = tensors[i] * scale * scales[i], row-major, in the slot's wire type.

``scales``: float32, one for each slot. ``amax``: float32, one for each slot, set to the largest magnitude of
the tensor before scaling; NaN if it holds one, 0 if it is no floating-point tensor. ``nonfinite``: one int32,
set to 1 if any value is infinite or NaN, else left. What lies between the slots is left.)")
      .def("unpack", &unpack, py::arg("tensors"), py::arg("buffer"), py::kw_only(),
           py::arg("scale") = 1.0, py::arg("scales") = py::none(), py::arg("accumulate") = false,
           R"(tensors[i] = slot i * scale * scales[i], cast to the tensor's type; or += with ``accumulate``.

Sums are rounded to the tensor's type once. Also refused: tensors that are expanded, and integers to
accumulate in.)");
}

}  // namespace pe
