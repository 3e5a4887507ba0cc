#include <pybind11/chrono.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <stdexcept>

#include "bindings/checks.hpp"
#include "bindings/interpreter_end.hpp"
#include "bindings/module.hpp"
#include "bindings/poll.hpp"
#include "bindings/program.hpp"
#include "plan/size.hpp"
#include "runtime/allocator.hpp"
#include "runtime/host_executor.hpp"

namespace py = pybind11;

namespace pe {
namespace {

constexpr std::size_t kMostThreads = 1024;

// Gives each thread one Python thread state for its whole life, so that threading.local keeps its values.
HostExecutor::ThreadHooks python_threads(int num_workers) {
  struct State {
    PyGILState_STATE gil;
    PyThreadState* thread;
    NoUnwinding no_unwinding;
  };
  auto states = std::make_shared<std::vector<State>>(num_workers);
  return {[states](int worker) {
            (*states)[worker].no_unwinding.begin();
            (*states)[worker].gil = PyGILState_Ensure();
            (*states)[worker].thread = PyEval_SaveThread();
          },
          [states](int worker) {
            PyEval_RestoreThread((*states)[worker].thread);
            PyGILState_Release((*states)[worker].gil);
          }};
}

// Releases the GIL: the threads that are joined need it to release their thread states.
struct DeleteWithoutGil {
  void operator()(HostExecutor* executor) const {
    py::gil_scoped_release release;
    delete executor;
  }
};

std::unique_ptr<HostExecutor, DeleteWithoutGil> make_executor(const std::vector<std::string>& thread_names,
                                                              std::optional<int> rank, bool follows) {
  if (thread_names.size() > kMostThreads) {
    throw PlanError("a process runs at most " + std::to_string(kMostThreads) + " workers, a thread each, got " +
                    std::to_string(thread_names.size()) + "; give fewer stages, or more processes");
  }
  if (rank) checked("rank", *rank, kMostStages);
  const int workers = static_cast<int>(thread_names.size());
  if (follows && (!rank || workers != 1)) {
    throw py::value_error("follows is for one rank with one worker, got " + std::to_string(workers) +
                          " workers" + (rank ? "" : " of all ranks"));
  }
  survive_unwinding();
  py::gil_scoped_release release;  // if not all threads start, those that did need it to end
  return std::unique_ptr<HostExecutor, DeleteWithoutGil>(
      new HostExecutor(workers, thread_names, python_threads(workers), rank.value_or(kEveryRank), follows));
}

bool fail(HostExecutor& executor, const py::object& error) {
  if (PyExceptionInstance_Check(error.ptr()) == 0) throw py::type_error("error is no exception");
  PyErr_SetObject(reinterpret_cast<PyObject*>(Py_TYPE(error.ptr())), error.ptr());
  std::exception_ptr thrown = std::make_exception_ptr(py::error_already_set());
  py::gil_scoped_release release;
  return executor.fail(std::move(thrown));
}

std::chrono::duration<double> seconds(const char* name, double given) {
  if (!(given >= 0)) {
    throw py::value_error(std::string(name) + " is " + std::to_string(given) + "; give seconds, from 0");
  }
  return std::chrono::duration<double>(std::min(given, kForever.count()));
}

void close(HostExecutor& executor, double limit) { executor.close(seconds("limit", limit)); }

// Runs a step. If a signal handler raises (KeyboardInterrupt), raises that once the step has stopped.
StepResult run(HostExecutor& executor, const PyProgram& program, double timeout, bool record) {
  SignalPoll signals;
  RunOptions options;
  options.record = record;
  options.timeout = seconds("timeout", timeout);
  options.poll = [&signals] { return signals(); };
  StepResult result;
  std::exception_ptr refused;
  // The raw calls, for the same reason as in PythonBody.
  PyThreadState* const thread = PyEval_SaveThread();
  try {
    result = executor.run(program.program, options);
  } catch (const std::logic_error&) {
    refused = std::current_exception();
  }
  const bool dead = executor.dead();
  PyEval_RestoreThread(thread);
  if (refused) std::rethrow_exception(refused);
  if (dead) program.bodies.inc_ref();  // leaked: an abandoned thread still runs one
  signals.rethrow();
  return result;
}

}  // namespace

void bind_runtime(py::module_& m) {
  m.def(
      "keep_freed_memory", &keep_freed_memory,
      "Tells glibc, once for the process, not to give freed memory back; returns whether it changed settings.");

  py::class_<PyProgram>(m, "Program", R"(A plan, and the function that each of its tasks calls.

``bodies`` maps (stage, kind), as in ``(0, "F")``, to a callable that takes the microbatch.)")
      .def(py::init<std::shared_ptr<Plan>, py::dict>(), py::arg("plan").none(false), py::arg("bodies"))
      .def_property_readonly("plan", [](const PyProgram& p) { return p.plan; });

  py::class_<StepResult>(m, "StepResult", "The result of a step; times are nanoseconds of a steady clock.")
      .def_property_readonly("outcome", [](const StepResult& r) { return outcome_name(r.outcome); })
      .def_property_readonly(
          "error", [](const StepResult& r) { return python_error(r.error); },
          "The first exception a body raised, or None.")
      .def_property_readonly("failed_task",
                             [](const StepResult& r) -> py::object {
                               if (r.failed_task == kNoTask) return py::none();
                               return py::int_(r.failed_task);
                             })
      .def_readonly("waiting", &StepResult::waiting, "Who waits for what, if the step timed out.")
      .def_readonly("begin", &StepResult::begin)
      .def_readonly("end", &StepResult::end)
      .def_readonly("task_begin", &StepResult::task_begin)
      .def_readonly("task_end", &StepResult::task_end)
      .def_readonly("peak_by_stage", &StepResult::peak_by_stage)
      .def_readonly("peak_by_rank", &StepResult::peak_by_rank);

  py::class_<HostExecutor, std::unique_ptr<HostExecutor, DeleteWithoutGil>>(
      m, "HostExecutor", R"(Native threads, one per worker, that run one step after another.

With ``rank``, only that rank's workers; then ``deliver`` reports the results of other ranks. One that
``follows`` runs its rank's tasks in the order given to ``decide``.)")
      .def(py::init(&make_executor), py::arg("thread_names"), py::arg("rank") = py::none(),
           py::arg("follows") = false)
      .def("deliver", &HostExecutor::deliver, py::arg("task"), py::arg("stage"), py::arg("microbatches"),
           py::call_guard<py::gil_scoped_release>(),
           "The results of another rank's task for a stage and these microbatches have arrived.")
      .def("decide", &HostExecutor::decide, py::arg("task"), py::call_guard<py::gil_scoped_release>(),
           "The process that this one follows has taken the task.")
      .def("fail", &fail, py::arg("error"),
           "Stops the running step with this exception, or else the next one; returns whether a step was "
           "running.")
      .def("run", &run, py::arg("program"), py::kw_only(), py::arg("timeout"), py::arg("record") = true)
      .def("close", &close, py::arg("limit") = kForever.count(), py::call_guard<py::gil_scoped_release>(),
           "Stops a running step and ends the threads; one whose body takes more than so many seconds is "
           "abandoned.")
      .def_property_readonly("dead",
                             py::cpp_function(&HostExecutor::dead, py::call_guard<py::gil_scoped_release>()));
}

}  // namespace pe
