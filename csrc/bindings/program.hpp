// Programs whose bodies are Python callables.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <exception>
#include <memory>
#include <string>
#include <utility>

#include "bindings/checks.hpp"
#include "runtime/host_executor.hpp"
#include "runtime/program.hpp"

namespace py = pybind11;

namespace pe {

// Calls a Python callable with the microbatch. PyProgram keeps the callable alive.
class PythonBody {
 public:
  explicit PythonBody(PyObject* callable) : callable_(callable) {}

  void operator()(const Action& action) const {
    // The raw calls: unlike pybind11's guard, they may be unwound when the interpreter ends a thread.
    const PyGILState_STATE state = PyGILState_Ensure();
    PyObject* microbatch = PyLong_FromLong(action.microbatch);
    PyObject* result = microbatch ? PyObject_CallOneArg(callable_, microbatch) : nullptr;
    Py_XDECREF(microbatch);
    if (result == nullptr) {
      std::exception_ptr error = std::make_exception_ptr(py::error_already_set());
      PyGILState_Release(state);
      std::rethrow_exception(error);
    }
    Py_DECREF(result);
    PyGILState_Release(state);
  }

 private:
  PyObject* callable_;
};

// A program whose bodies are Python callables, by stage and kind. Actions without one do nothing.
struct PyProgram {
  PyProgram(std::shared_ptr<Plan> of_plan, py::dict by_stage_and_kind)
      : plan(std::move(of_plan)),
        bodies(std::move(by_stage_and_kind)),
        program(std::make_shared<Program>(plan)) {
    for (const auto& [key, callable] : bodies) {
      const auto [stage, kind] = key.cast<std::pair<int, std::string>>();
      program->set_body(checked("stage", stage, plan->num_stages()), kind_of(kind), PythonBody(callable.ptr()));
    }
  }

  std::shared_ptr<Plan> plan;
  py::dict bodies;
  std::shared_ptr<Program> program;
};

const char* outcome_name(Outcome outcome);

// The exception that a body or the driver threw, or None.
py::object python_error(const std::exception_ptr& error);

}  // namespace pe
