#include "bindings/dlpack.hpp"

namespace py = pybind11;

namespace pe {
namespace {

using dlpack::DLPackExchangeAPI;
using dlpack::DLTensor;

constexpr const char* kExchangeCapsule = "dlpack_exchange_api";
constexpr const char* kTensorCapsule = "dltensor";

bool says(const py::object& method, py::handle tensor) {
  if (method.is_none()) return false;
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
  is_conj_ = py::getattr(object, "is_conj", py::none());
  exchange_ = nullptr;
  const py::object capsule = py::getattr(object, "__dlpack_c_exchange_api__", py::none());
  if (PyCapsule_IsValid(capsule.ptr(), kExchangeCapsule)) {
    const auto* api = static_cast<const DLPackExchangeAPI*>(
        PyCapsule_GetPointer(capsule.ptr(), kExchangeCapsule));
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
  // torch lends no tensor this way that requires a gradient.
  const py::object bare = py::hasattr(tensor, "detach") ? tensor.attr("detach")()
                                                        : py::reinterpret_borrow<py::object>(tensor);
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

// torch's interface does not tell that the values of a view are yet to be negated or conjugated.
bool Borrower::is_lazy(py::handle tensor, const Strided& strided) const {
  if (is_integer(strided.dtype)) return false;
  if (!is_arithmetic(strided.dtype)) return says(is_conj_, tensor) || says(is_neg_, tensor);
  // Those of real numbers step over the other parts of complex ones, so few need be asked.
  const bool steps_over = strided.size() == 1 || !strided.is_contiguous();
  return steps_over && says(is_neg_, tensor);
}

Strided Borrower::borrow(py::handle tensor, ArgumentName name) {
  try {
    const DLTensor lent = ask(tensor, name);
    if (!is_on_host(lent)) {
      throw PackingError(name.str() + " is not on the CPU; tensors of a GPU are packed there");
    }
    if (lent.dtype.lanes != 1 || lent.dtype.bits % 8 != 0) {
      throw PackingError(name.str() + " has elements that are not whole bytes");
    }
    if (lent.strides == nullptr && lent.ndim > 0) {  // as DLPack before 1.2 allowed
      throw PackingError(name.str() + " does not tell its strides; give a torch tensor");
    }
    const auto dimensions = static_cast<std::size_t>(lent.ndim);
    const Strided strided{static_cast<std::byte*>(lent.data) + lent.byte_offset,
                          {lent.dtype.code, lent.dtype.bits},
                          {lent.shape, dimensions},
                          {lent.strides, dimensions}};
    if (is_lazy(tensor, strided)) {
      throw PackingError(name.str() + " is a view that negates or conjugates; give its " +
                         "resolve_neg().resolve_conj()");
    }
    return strided;
  } catch (const py::error_already_set& error) {
    if (!error.matches(PyExc_Exception)) throw;  // an interrupt
    const std::string why = py::str(error.value());
    throw PackingError(name.str() + " does not lend its memory: " + why.substr(0, why.find('\n')));
  }
}

}  // namespace pe
