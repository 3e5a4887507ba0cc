// What a captured step depends on in modules, parameters and buffers, read in one pass.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <memory>
#include <optional>
#include <string>
#include <unordered_set>
#include <utility>
#include <vector>

#include "bindings/module.hpp"
#include "packing/dlpack.hpp"

namespace py = pybind11;

namespace pe {
namespace {

using dlpack::DLPackExchangeAPI;
using dlpack::DLTensor;

constexpr std::int64_t kNone = -1, kInPython = -2;  // a buffer that is None; a tensor that Python looks at
constexpr std::uint8_t kComplex = 5;

py::object checked(PyObject* made) {
  if (made == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(made);
}

py::str interned(const char* text) { return checked(PyUnicode_InternFromString(text)); }

// An attribute of tensors. Where torch's own C function answers, it is called without a look-up by name.
class Attribute {
 public:
  Attribute(py::handle type, const char* name) : name_(interned(name)) {
    const py::object found = py::getattr(type, name_, py::none());
    if (Py_IS_TYPE(found.ptr(), &PyGetSetDescr_Type)) {
      own_ = reinterpret_cast<PyGetSetDescrObject*>(found.ptr())->d_getset;
    }
  }

  py::object of(py::handle tensor) const {
    return checked(own_ != nullptr ? own_->get(tensor.ptr(), own_->closure)
                                   : PyObject_GetAttr(tensor.ptr(), name_.ptr()));
  }

  void set(py::handle tensor, py::handle value) const {
    const int failed = own_ != nullptr ? own_->set(tensor.ptr(), value.ptr(), own_->closure)
                                       : PyObject_SetAttr(tensor.ptr(), name_.ptr(), value.ptr());
    if (failed != 0) throw py::error_already_set();
  }

 private:
  py::str name_;
  PyGetSetDef* own_ = nullptr;
};

constexpr std::array<const char*, 2> kHooks = {"hook", "post-accumulate-grad hook"};

// How tensors of one Python type are read.
struct TensorType {
  explicit TensorType(py::handle tensor_type)
      : type(py::reinterpret_borrow<py::object>(tensor_type)),
        requires_grad(type, "requires_grad"),
        grad(type, "grad"),
        hooks{Attribute(type, "_backward_hooks"), Attribute(type, "_post_accumulate_grad_hooks")} {
    const py::object capsule = py::getattr(type, "__dlpack_c_exchange_api__", py::none());
    constexpr const char* kCapsule = "dlpack_exchange_api";
    if (py::hasattr(type, "__tensor_flatten__") || !PyCapsule_IsValid(capsule.ptr(), kCapsule)) return;
    const auto* api = static_cast<const DLPackExchangeAPI*>(PyCapsule_GetPointer(capsule.ptr(), kCapsule));
    while (api != nullptr && api->version.major != dlpack::kMajorVersion) api = api->previous;
    if (api != nullptr) lend = api->dltensor_from_py_object_no_sync;
  }

  py::object type;
  Attribute requires_grad, grad;
  std::array<Attribute, 2> hooks;           // as of kHooks
  int (*lend)(void*, DLTensor*) = nullptr;  // null if the memory is other tensors', or torch does not tell it
};

class ModelState {
 public:
  explicit ModelState(py::sequence roots) : roots_(std::move(roots)) { find(); }

  py::bytes read() {
    if (!read_modules()) {
      find();
      read_modules();
    }
    hook_ = nullptr;
    for (std::size_t i = 0; i < parameters_.size(); ++i) {
      const py::object& parameter = parameters_[i];
      const TensorType& type = type_of(parameter);
      gradients_[i] = type.grad.of(parameter);
      const bool trains = type.requires_grad.of(parameter).ptr() == Py_True;
      words_.push_back((trains ? 2 : 0) + (gradients_[i].is_none() ? 1 : 0));
      for (std::size_t kind = 0; kind < kHooks.size(); ++kind) {
        const py::object hooks = type.hooks[kind].of(parameter);
        if (!hooks.is_none() && PyObject_IsTrue(hooks.ptr()) != 0) hook_ = kHooks[kind];
      }
      read_memory(parameter, type);
    }
    const std::size_t nbytes = words_.size() * sizeof(words_[0]);
    const bool same = key_ && static_cast<std::size_t>(PyBytes_GET_SIZE(key_.ptr())) == nbytes &&
                      std::memcmp(PyBytes_AS_STRING(key_.ptr()), words_.data(), nbytes) == 0;
    if (!same) key_ = py::bytes(reinterpret_cast<const char*>(words_.data()), nbytes);
    return key_;
  }

  py::object parameters() const { return py::cast(parameters_); }
  py::object others() const { return py::cast(others_); }
  std::optional<std::string> hook() const {
    return hook_ != nullptr ? std::optional<std::string>(hook_) : std::nullopt;
  }

  std::vector<std::size_t> put_gradients(const py::sequence& gradients) {
    if (gradients.size() != parameters_.size()) throw py::value_error("one gradient for each parameter");
    std::vector<std::size_t> others;
    for (std::size_t i = 0; i < parameters_.size(); ++i) {
      const py::object gradient = gradients[i];
      if (gradients_[i].is(gradient)) continue;
      if (gradients_[i].is_none() || gradient.is_none()) {
        type_of(parameters_[i]).grad.set(parameters_[i], gradient);
      } else {
        others.push_back(i);
      }
    }
    return others;
  }

  // For Python's garbage collector: modules may refer to what holds this object.
  int traverse(visitproc visit, void* arg) const {
    Py_VISIT(roots_.ptr());
    for (const auto* held : {&structure_, &parameters_, &gradients_, &others_}) {
      for (const py::object& object : *held) Py_VISIT(object.ptr());
    }
    for (const Module& module : modules_) Py_VISIT(module.self.ptr());
    return 0;
  }

  void clear() {
    const py::object roots = std::exchange(roots_, py::tuple());
    drop(modules_);
    for (auto* held : {&structure_, &parameters_, &gradients_, &others_}) drop(*held);
  }

 private:
  struct Module {
    py::object self;
    bool plain;  // its class has none of kNames, so that its own attributes are what counts
  };

  // Empties the list before its objects end: that may run Python, whose collector then looks at this object.
  template <class Held>
  static void drop(std::vector<Held>& list) {
    const std::vector<Held> ending = std::exchange(list, {});
  }

  enum Name : std::uint8_t { kModules, kParameters, kBuffers, kTraining };

  py::object attribute(const Module& module, Name name) const {
    const py::str& text = names_[name];
    if (module.plain) {
      const py::object attributes = checked(PyObject_GenericGetDict(module.self.ptr(), nullptr));
      PyObject* const found = PyDict_GetItemWithError(attributes.ptr(), text.ptr());
      if (found != nullptr) return py::reinterpret_borrow<py::object>(found);
      if (PyErr_Occurred() != nullptr) throw py::error_already_set();
    }
    return checked(PyObject_GetAttr(module.self.ptr(), text.ptr()));
  }

  // Calls `use` with each value of a table of the module. It holds the value meanwhile.
  template <class Use>
  void each(const Module& module, Name name, Use&& use) const {
    const py::object table = attribute(module, name);
    if (PyDict_Check(table.ptr())) {
      PyObject* value = nullptr;
      for (Py_ssize_t at = 0; PyDict_Next(table.ptr(), &at, nullptr, &value) != 0;) {
        use(py::reinterpret_borrow<py::object>(value));
      }
    } else {  // a scripted module's
      for (const py::handle value : py::list(table.attr("values")())) {
        use(py::reinterpret_borrow<py::object>(value));
      }
    }
  }

  // Begins `words_`. False if a module or a parameter is not the one that `find` saw.
  bool read_modules() {
    words_.assign(1, generation_);
    drop(others_);
    std::size_t next = 0;
    bool same = true;
    const auto compare = [&](const py::object& value) {
      same = same && next < structure_.size() && structure_[next].is(value);
      ++next;
    };
    for (const Module& module : modules_) {
      each(module, kModules, compare);
      each(module, kParameters, compare);
      if (!same) return false;
      const int training = PyObject_IsTrue(attribute(module, kTraining).ptr());
      if (training < 0) throw py::error_already_set();
      words_.push_back(training);
      const std::size_t count = words_.size();
      words_.push_back(0);
      each(module, kBuffers, [&](const py::object& buffer) {
        ++words_[count];
        if (buffer.is_none()) {
          words_.push_back(kNone);
        } else {
          read_memory(buffer, type_of(buffer));
        }
      });
    }
    return next == structure_.size();
  }

  // Finds all modules and parameters anew.
  void find() {
    ++generation_;
    drop(modules_);
    drop(structure_);
    drop(parameters_);
    drop(gradients_);
    std::vector<py::object> ahead;
    for (const py::object root : roots_) ahead.push_back(root);  // an item may be made when it is asked for
    std::ranges::reverse(ahead);
    std::unordered_set<PyObject*> seen;
    while (!ahead.empty()) {
      const py::object self = std::move(ahead.back());
      ahead.pop_back();
      if (!seen.insert(self.ptr()).second) continue;
      const py::handle type(reinterpret_cast<PyObject*>(Py_TYPE(self.ptr())));
      const bool plain =
          std::ranges::none_of(names_, [&](const py::str& name) { return py::hasattr(type, name); });
      const Module& module = modules_.emplace_back(self, plain);
      const std::size_t before = ahead.size();
      each(module, kModules, [&](const py::object& child) {
        structure_.push_back(child);
        if (!child.is_none()) ahead.push_back(child);
      });
      std::reverse(ahead.begin() + static_cast<std::ptrdiff_t>(before), ahead.end());
      each(module, kParameters, [&](const py::object& parameter) {
        structure_.push_back(parameter);
        if (!parameter.is_none() && seen.insert(parameter.ptr()).second) parameters_.push_back(parameter);
      });
    }
    gradients_.assign(parameters_.size(), py::none());
  }

  const TensorType& type_of(py::handle tensor) {
    const py::handle type(reinterpret_cast<PyObject*>(Py_TYPE(tensor.ptr())));
    for (const auto& known : types_) {
      if (known->type.is(type)) return *known;
    }
    return *types_.emplace_back(std::make_unique<TensorType>(type));
  }

  void read_memory(const py::object& tensor, const TensorType& type) {
    DLTensor lent;
    if (type.lend != nullptr && type.lend(tensor.ptr(), &lent) != 0) {
      PyErr_Clear();  // it is sparse, or has no memory
    } else if (type.lend != nullptr && is_plain(lent)) {
      words_.push_back(lent.ndim);
      words_.push_back(static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(lent.data)));
      words_.push_back(static_cast<std::int64_t>(lent.byte_offset));
      words_.push_back(lent.dtype.code << 16 | lent.dtype.bits);
      words_.push_back(std::int64_t{lent.device.device_type} << 32 | lent.device.device_id);
      words_.insert(words_.end(), lent.shape, lent.shape + lent.ndim);
      return;
    }
    words_.push_back(kInPython);
    others_.push_back(tensor);
  }

  // Whether shape and address say all: it is contiguous, and no view that conjugates or negates.
  static bool is_plain(const DLTensor& tensor) {
    std::int64_t size = 1;
    for (std::int32_t d = tensor.ndim; d-- > 0;) {
      if (tensor.strides != nullptr && tensor.shape[d] != 1 && tensor.strides[d] != size) return false;
      size *= tensor.shape[d];
    }
    return tensor.dtype.code != kComplex && size > 1;
  }

  py::sequence roots_;
  const std::array<py::str, 4> names_{interned("_modules"), interned("_parameters"), interned("_buffers"),
                                      interned("training")};
  std::vector<Module> modules_;
  std::vector<py::object> structure_;  // each module's children and parameters, in the order of `modules_`
  std::vector<py::object> parameters_, gradients_, others_;
  std::vector<std::unique_ptr<TensorType>> types_;
  std::vector<std::int64_t> words_;
  std::int64_t generation_ = 0;
  const char* hook_ = nullptr;
  py::bytes key_;
};

// The state in a Python object; null before and after its life.
ModelState* state_of(PyObject* self) {
  auto value = reinterpret_cast<py::detail::instance*>(self)->get_value_and_holder();
  return value.holder_constructed() ? value.value_ptr<ModelState>() : nullptr;
}

void let_python_collect(PyHeapTypeObject* heap_type) {
  PyTypeObject& type = heap_type->ht_type;
  type.tp_flags |= Py_TPFLAGS_HAVE_GC;
  type.tp_traverse = [](PyObject* self, visitproc visit, void* arg) {
    Py_VISIT(Py_TYPE(self));
    const ModelState* const state = state_of(self);
    return state != nullptr ? state->traverse(visit, arg) : 0;
  };
  type.tp_clear = [](PyObject* self) {
    if (ModelState* const state = state_of(self)) state->clear();
    return 0;
  };
}

}  // namespace

void bind_model_state(py::module_& m) {
  py::class_<ModelState>(m, "ModelState", py::custom_type_setup(let_python_collect),
                         "Tells whether modules are as they were: what they hold, where, and in which mode.")
      .def(py::init<py::sequence>(), py::arg("roots"))
      .def("read", &ModelState::read,
           "Two equal results: the modules and parameters have been the same objects since; the modes, the "
           "addresses and shapes of parameters and buffers, which parameters require a gradient and which "
           "have one are equal. `others` are not looked at.")
      .def_property_readonly("parameters", &ModelState::parameters, "As of the last read, each once.")
      .def_property_readonly("others", &ModelState::others,
                             "The tensors of the last read whose memory only Python can describe.")
      .def_property_readonly("hook", &ModelState::hook,
                             "The kind of hook that a parameter had at the last read; None if none had any.")
      .def("put_gradients", &ModelState::put_gradients, py::arg("gradients"),
           "Gives each parameter its gradient, if one of the two was None at the last read. Returns the "
           "numbers of the parameters that then had another gradient, and keep it.");
}

}  // namespace pe
