// What a `with` statement takes and gives back, in C++: so no signal handler of Python's, as that of Ctrl-C,
// runs between the taking and the block, or before all is given back.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "bindings/module.hpp"

namespace py = pybind11;

namespace pe {
namespace {

// Only read and written with Python's lock.
struct Taken {
  bool taken = false;
  std::vector<std::weak_ptr<Taken>> others;  // of the same parameters

  void add(const std::shared_ptr<Taken>& other) {
    std::erase_if(others, [](const auto& known) { return known.expired(); });
    others.emplace_back(other);
  }
};

class Taking;

class Turn {
 public:
  std::unique_ptr<Taking> take(std::string what) const;

  void exclude(Turn& other) {
    state_->add(other.state_);
    other.state_->add(state_);
  }

  bool taken() const { return state_->taken; }

  const std::shared_ptr<Taken>& state() const { return state_; }

 private:
  std::shared_ptr<Taken> state_ = std::make_shared<Taken>();
};

class Taking {
 public:
  Taking(const Turn& turn, std::string what) : state_(turn.state()), what_(std::move(what)) {}
  Taking(const Taking&) = delete;
  Taking& operator=(const Taking&) = delete;
  ~Taking() { end(); }

  void enter() {
    if (state_->taken) refuse("this pipeline");
    for (const auto& other : state_->others) {
      const std::shared_ptr<Taken> state = other.lock();
      if (state != nullptr && state->taken) refuse("another pipeline of the same model");
    }
    state_->taken = entered_ = true;
    grad_mode_ = torch_c() ? torch_c().attr("is_grad_enabled")() : py::none();
  }

  void leave() {
    if (!grad_mode_.is_none()) torch_c().attr("_set_grad_enabled")(grad_mode_);
    end();
  }

  void end() {
    if (std::exchange(entered_, false)) state_->taken = false;
  }

 private:
  [[noreturn]] void refuse(const std::string& who) const {
    const std::string text = what_ + " while " + who +
                             " is running a step already, which uses and changes its parameters and buffers; "
                             "wait for it to end";
    py::set_error(error_class("PipelineError"), text.c_str());
    throw py::error_already_set();
  }

  static py::object torch_c() {
    return py::reinterpret_steal<py::object>(PyImport_GetModule(py::str("torch._C").ptr()));
  }

  std::shared_ptr<Taken> state_;
  std::string what_;
  bool entered_ = false;
  py::object grad_mode_ = py::none();  // which Ctrl-C leaves changed if it comes as a torch.no_grad ends
};

std::unique_ptr<Taking> Turn::take(std::string what) const {
  return std::make_unique<Taking>(*this, std::move(what));
}

// Modules in evaluation mode for a while.
class EvaluationMode {
 public:
  explicit EvaluationMode(std::vector<py::object> training) : training_(std::move(training)) {}

  void set(bool mode) const {
    for (const py::object& module : training_) {
      const py::dict own = module.attr("__dict__");
      if (own.contains(kName)) {
        own[kName] = mode;
      } else {
        py::setattr(module, kName, py::bool_(mode));  // of a scripted module
      }
    }
  }

 private:
  static constexpr const char* kName = "training";

  std::vector<py::object> training_;
};

}  // namespace

void bind_turn(py::module_& m) {
  py::class_<Taking>(m, "Taking")
      .def("__enter__", &Taking::enter)
      .def("__exit__", [](Taking& taking, const py::args&) { taking.leave(); });
  py::class_<Turn>(m, "Turn")
      .def(py::init<>())
      .def("exclude", &Turn::exclude, py::arg("other"), "From now on neither is taken while the other is.")
      .def_property_readonly("taken", &Turn::taken)
      .def("take", &Turn::take, py::arg("what"),
           "A context in which the turn is taken, and after which torch's grad mode is as before. Entering it "
           "raises PipelineError, which names `what`, if it is taken already.");
  py::class_<EvaluationMode>(m, "EvaluationMode",
                             "Modules that are in training mode are in evaluation mode inside a `with` block.")
      .def(py::init<std::vector<py::object>>(), py::arg("training"))
      .def("__enter__", [](const EvaluationMode& mode) { mode.set(false); })
      .def("__exit__", [](const EvaluationMode& mode, const py::args&) { mode.set(true); });
}

}  // namespace pe
