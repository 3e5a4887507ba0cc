#include <pybind11/stl.h>

#include "bindings/checks.hpp"
#include "bindings/module.hpp"
#include "bindings/poll.hpp"
#include "bindings/program.hpp"
#include "cuda/driver.hpp"
#include "cuda/stream_pool.hpp"
#include "runtime/stream_executor.hpp"
#include "runtime/stream_plan.hpp"
#include "simulate/simulator.hpp"

namespace pe {
namespace {

using SharedStreamPlan = std::shared_ptr<StreamPlan>;
using OpTuple = std::tuple<std::tuple<std::string, int, int>, int, std::vector<std::uint32_t>>;

SharedStreamPlan make_stream_plan(const std::shared_ptr<Plan>& plan, const Costs& costs,
                                  const Simulation& simulation, std::vector<int> device_of_rank,
                                  std::optional<int> rank) {
  if (rank) checked("rank", *rank, plan->num_ranks());
  return interruptible([&] {
    const TaskTimes times{simulation.begin, end_times(*plan, costs, simulation)};
    return std::make_shared<StreamPlan>(plan, times, std::move(device_of_rank), rank.value_or(kEveryRank));
  });
}

struct PyLaid {
  std::shared_ptr<StreamExecutor::Laid> laid;
  PyProgram program;  // its bodies
};

std::vector<cuda::StreamHandle> handles(const std::vector<std::uintptr_t>& streams) {
  std::vector<cuda::StreamHandle> found;
  found.reserve(streams.size());
  for (const std::uintptr_t stream : streams) {
    found.push_back(reinterpret_cast<cuda::StreamHandle>(stream));
  }
  return found;
}

// Python's view of StreamExecutor::wait_for_room or wait_for_inputs.
template <Outcome (StreamExecutor::*wait)(const WaitOptions&)>
const char* wait_for(StreamExecutor& executor, double timeout) {
  SignalPoll signals;
  Outcome outcome = Outcome::Done;
  {
    py::gil_scoped_release release;
    outcome = (executor.*wait)({std::chrono::duration<double>(timeout), [&signals] { return signals(); }});
  }
  signals.rethrow();
  return outcome_name(outcome);
}

}  // namespace

void bind_cuda(py::module_& m) {
  translate<cuda::NoDriver>("DeviceError");
  translate<cuda::CudaError>("DeviceError");

  m.def(
      "num_devices", [] { return cuda::Driver::get().num_devices; },
      "How many devices the CUDA driver sees. Raises DeviceError, saying why, where it cannot be used.");

  m.def("num_pooled_streams", &cuda::num_pooled_streams,
        "Streams that are not in use; the next pipelines reuse them.");

  m.def("empty_stream_pool", &cuda::empty_stream_pool, "Destroys the unused streams; for tests.");

  py::class_<StreamPlan, SharedStreamPlan>(m, "StreamPlan", R"(A plan laid out on device streams.

An op is a task, or the copy of a task's results to another device; they are numbered as they are enqueued.)")
      .def(py::init(&make_stream_plan), py::arg("plan").none(false), py::arg("costs"), py::arg("times"),
           py::arg("device_of_rank"), py::arg("rank") = py::none(),
           "rank: the rank of this process; None: this process runs all ranks.")
      .def_property_readonly(
          "devices",
          [](const StreamPlan& p) {
            std::vector<int> devices;
            for (const StreamInfo& stream : p.streams()) devices.push_back(stream.device);
            return devices;
          },
          "By stream, the ordinal of its device.")
      .def_property_readonly(
          "ops",
          [](const StreamPlan& p) {
            std::vector<OpTuple> ops;
            for (const StreamOp& op : p.ops()) {
              const auto waits = p.waits(op);
              ops.push_back({{std::string(kind_name(op.action.kind)), op.action.stage, op.action.microbatch},
                             op.stream,
                             {waits.begin(), waits.end()}});
            }
            return ops;
          },
          "For each op ((kind, stage, microbatch), stream, the ops on other streams it waits for).")
      .def(
          "op_of",
          [](const StreamPlan& p, TaskId task) -> std::optional<std::uint32_t> {
            const std::uint32_t op = p.op_of(checked_task(p.plan(), task));
            return op == kNoOp ? std::nullopt : std::optional(op);
          },
          py::arg("task"), "None for a task of another process.")
      .def(
          "sent_by", [](const StreamPlan& p, TaskId task) { return p.sent_by(checked_task(p.plan(), task)); },
          py::arg("task"),
          "The op that copies the task's results to another device; the task's own if nothing is copied.")
      .def(
          "first_after",
          [](const StreamPlan& p, std::uint32_t op, int stream) {
            return p.first_after(checked("op", op, p.ops().size()),
                                 checked("stream", stream, p.streams().size()));
          },
          py::arg("op"), py::arg("stream"),
          "The first op on a stream that runs after an op has ended; len(ops) if there is none in this step.");

  py::class_<DeviceTimes, std::shared_ptr<DeviceTimes>>(m, "DeviceTimes", "When the ops of a StreamPlan ran.")
      .def("done", &DeviceTimes::done)
      .def(
          "read",
          [](const DeviceTimes& times) {
            const MeasuredTimes read = times.read();
            return py::make_tuple(read.step, read.begin, read.end);
          },
          "(seconds of the whole step, begin of each op, end of each op), in seconds since the step's begin; "
          "once done.");

  py::class_<DeviceStepResult>(m, "DeviceStepResult", "The result of enqueueing a step.")
      .def_property_readonly("outcome", [](const DeviceStepResult& r) { return outcome_name(r.outcome); })
      .def(
          "take_error",
          // Only once: its traceback refers to whoever holds the result, a cycle that Python cannot collect.
          [](DeviceStepResult& r) { return python_error(std::exchange(r.error, nullptr)); },
          "The exception that a body or the driver raised, or None; to be called once.")
      .def_property_readonly("failed_task",
                             [](const DeviceStepResult& r) -> py::object {
                               if (r.failed_task == kNoTask) return py::none();
                               return py::int_(r.failed_task);
                             })
      .def_property_readonly(
          "times", [](const DeviceStepResult& r) { return r.times ? std::optional(r.times) : std::nullopt; },
          "None if times were not recorded.")
      .def_readonly("num_nodes", &DeviceStepResult::num_nodes, "Nodes of the captured graph, if any.");

  py::class_<PyLaid>(m, "LaidProgram", "A program with its streams and events.")
      .def_property_readonly(
          "streams",
          [](const PyLaid& p) {
            std::vector<std::uintptr_t> streams;
            for (const auto stream : StreamExecutor::streams_of(*p.laid)) {
              streams.push_back(reinterpret_cast<std::uintptr_t>(stream));
            }
            return streams;
          },
          "The handles of the streams, numbered as in the StreamPlan.");

  py::class_<StreamExecutor>(m, "StreamExecutor", R"(Enqueues steps on the streams of CUDA devices.

Raises DeviceError without a driver or device.)")
      .def(py::init<std::vector<int>>(), py::arg("device_of_rank"))
      .def_property_readonly("devices", &StreamExecutor::devices)
      .def(
          "lay_out",
          [](StreamExecutor& e, const PyProgram& program, const SharedStreamPlan& plan) {
            return PyLaid{e.lay_out(program.program, plan), program};
          },
          py::arg("program"), py::arg("plan").none(false))
      .def(
          "run",
          [](StreamExecutor& e, const PyLaid& program, const std::vector<std::uintptr_t>& callers, bool record,
             bool capturing) { return e.run(*program.laid, {handles(callers), record, capturing}); },
          py::arg("program"), py::kw_only(), py::arg("callers"), py::arg("record") = false,
          py::arg("capturing") = false)
      .def("wait_for_room", &wait_for<&StreamExecutor::wait_for_room>, py::kw_only(), py::arg("timeout"),
           "Waits until at most one marked step is unfinished; returns 'done', 'timed out' or 'closed'.")
      .def(
          "mark_inputs",
          [](StreamExecutor& e, int device, std::uintptr_t caller) {
            e.mark_inputs(device, reinterpret_cast<cuda::StreamHandle>(caller));
          },
          py::arg("device"), py::arg("caller"),
          "Marks what the caller's stream of a device has enqueued so far as the reading of inputs.")
      .def("wait_for_inputs", &wait_for<&StreamExecutor::wait_for_inputs>, py::kw_only(), py::arg("timeout"),
           "Waits until marked inputs have been read; returns as wait_for_room.")
      .def(
          "mark",
          [](StreamExecutor& e, const std::vector<std::uintptr_t>& callers) { e.mark(handles(callers)); },
          py::arg("callers"), "Marks what the callers have enqueued so far as a step.")
      .def(
          "copy",
          [](const StreamExecutor& e, cuda::Address to, int to_device, cuda::Address from, int from_device,
             std::size_t nbytes, std::uintptr_t stream) {
            e.copy(to, to_device, from, from_device, nbytes, reinterpret_cast<cuda::StreamHandle>(stream));
          },
          py::arg("to"), py::arg("to_device"), py::arg("source"), py::arg("source_device"), py::arg("nbytes"),
          py::arg("stream"))
      .def("idle", &StreamExecutor::idle, "Whether the latest marked step is done.")
      .def("close", &StreamExecutor::close)
      .def_property_readonly("dead", &StreamExecutor::dead);
}

}  // namespace pe
