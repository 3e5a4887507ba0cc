// Handles Ctrl-C while C++ works or waits.
#pragma once

#include <pybind11/pybind11.h>

#include "plan/interrupt.hpp"

namespace pe {

// Takes the GIL, runs Python's signal handlers, and keeps the exception that one raised.
class SignalPoll {
 public:
  ~SignalPoll() { Py_XDECREF(signal_); }

  // Whether a handler raised.
  bool operator()() {
    const PyGILState_STATE state = PyGILState_Ensure();
    const bool raised = PyErr_CheckSignals() != 0;
    if (raised) {
      pybind11::error_already_set error;
      Py_XDECREF(signal_);
      signal_ = error.value().inc_ref().ptr();
    }
    PyGILState_Release(state);
    return raised;
  }

  // Raises the kept exception, if any. Needs the GIL.
  void rethrow() {
    if (signal_ == nullptr) return;
    PyErr_SetObject(reinterpret_cast<PyObject*>(Py_TYPE(signal_)), signal_);
    throw pybind11::error_already_set();
  }

 private:
  PyObject* signal_ = nullptr;
};

// Returns what `work` returns, which it does without the GIL. If a signal handler raises meanwhile, the work
// ends early and that is raised.
template <class Work>
auto interruptible(Work&& work) {
  SignalPoll poll;
  try {
    pybind11::gil_scoped_release release;
    const Interruptible until([&poll] { return poll(); });
    return work();
  } catch (const Interrupted&) {
    poll.rethrow();
    throw;
  }
}

}  // namespace pe
