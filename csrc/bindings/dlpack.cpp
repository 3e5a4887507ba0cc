#include "bindings/dlpack.hpp"

#include <algorithm>

namespace py = pybind11;

namespace pe {
namespace {

using dlpack::DLPackExchangeAPI;
using dlpack::DLTensor;

constexpr const char* kExchangeCapsule = "dlpack_exchange_api";
constexpr const char* kTensorCapsule = "dltensor";

bool says(const py::object& method, py::handle tensor) {
  PyObject* const self = tensor.ptr();
  PyObject* const answer = PyObject_Vectorcall(method.ptr(), &self, 1, nullptr);
  if (answer == nullptr) throw py::error_already_set();
  Py_DECREF(answer);
  return answer == Py_True;
}

bool is_on_host(const DLTensor& tensor) {
  return tensor.device.device_type == dlpack::kCPU || tensor.device.device_type == dlpack::kCUDAHost;
}

}  // namespace

void Borrower::look_up(PyTypeObject* type) {
  const py::handle object(reinterpret_cast<PyObject*>(type));
  is_neg_ = py::getattr(object, "is_neg", py::none());
  exchange_ = nullptr;
  const py::object capsule = py::getattr(object, "__dlpack_c_exchange_api__", py::none());
  if (PyCapsule_IsValid(capsule.ptr(), kExchangeCapsule)) {
    const auto* api =
        static_cast<const DLPackExchangeAPI*>(PyCapsule_GetPointer(capsule.ptr(), kExchangeCapsule));
    while (api != nullptr && api->version.major != dlpack::kMajorVersion) api = api->previous;
    if (api != nullptr) exchange_ = api->dltensor_from_py_object_no_sync;
  }
  type_ = type;
}

const DLTensor& Borrower::ask_by_capsule(py::handle tensor, ArgumentName name) {
  if (!py::hasattr(tensor, "__dlpack__")) {
    throw PackingError(name.str() + " is of type " + Py_TYPE(tensor.ptr())->tp_name +
                       "; give a tensor or an array");
  }
  // torch's __dlpack__ refuses a tensor that requires a gradient.
  const py::object bare =
      py::hasattr(tensor, "detach") ? tensor.attr("detach")() : py::reinterpret_borrow<py::object>(tensor);
  capsules_.push_back(bare.attr("__dlpack__")());
  void* const held = PyCapsule_GetPointer(capsules_.back().ptr(), kTensorCapsule);
  if (held == nullptr) throw py::error_already_set();
  return static_cast<const dlpack::DLManagedTensor*>(held)->dl_tensor;
}

DLTensor Borrower::ask(py::handle tensor, ArgumentName name) {
  if (Py_TYPE(tensor.ptr()) != type_) look_up(Py_TYPE(tensor.ptr()));
  if (exchange_ == nullptr) return ask_by_capsule(tensor, name);
  DLTensor lent;
  if (exchange_(tensor.ptr(), &lent) != 0) throw py::error_already_set();
  return lent;
}

// torch's DLPack interface does not tell whether a view negates its values lazily.
bool Borrower::is_lazy(py::handle tensor, const Strided& strided) const {
  // Such a view skips the other parts of complex numbers, so few tensors need to be asked.
  const bool steps_over = strided.size() == 1 || !strided.is_contiguous();
  return is_arithmetic(strided.dtype) && steps_over && !is_neg_.is_none() && says(is_neg_, tensor);
}

Strided Borrower::borrow(py::handle tensor, ArgumentName name) {
  try {
    const DLTensor lent = ask(tensor, name);
    if (!is_on_host(lent)) {
      throw PackingError(name.str() + " is on another device; the packer is on cpu");
    }
    if (lent.dtype.lanes != 1) throw PackingError(name.str() + " has elements of several numbers");
    const auto dimensions = static_cast<std::size_t>(lent.ndim);
    const std::span shape = copied(lent.shape, dimensions);
    const Strided strided{static_cast<std::byte*>(lent.data) + lent.byte_offset,
                          {lent.dtype.code, lent.dtype.bits},
                          shape,
                          lent.strides == nullptr ? row_major(shape) : copied(lent.strides, dimensions)};
    if (is_lazy(tensor, strided)) {
      throw PackingError(name.str() + " is a view that negates; give tensor.resolve_neg()");
    }
    return strided;
  } catch (const py::error_already_set& error) {
    if (!error.matches(PyExc_Exception)) throw;  // KeyboardInterrupt and the like
    const std::string why = py::str(error.value());
    throw PackingError(name.str() + " does not lend its memory: " + why.substr(0, why.find('\n')));
  }
}

std::span<std::int64_t> Borrower::room(std::size_t n) {
  return {static_cast<std::int64_t*>(memory_.allocate(n * sizeof(std::int64_t))), n};
}

std::span<const std::int64_t> Borrower::copied(const std::int64_t* values, std::size_t n) {
  const std::span copy = room(n);
  std::copy_n(values, n, copy.begin());
  return copy;
}

std::span<const std::int64_t> Borrower::row_major(std::span<const std::int64_t> shape) {
  const std::span strides = room(shape.size());
  std::int64_t stride = 1;
  for (std::size_t d = shape.size(); d-- > 0; stride *= shape[d]) strides[d] = stride;
  return strides;
}

}  // namespace pe
