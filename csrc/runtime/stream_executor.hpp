// The list scheduler under the devices' clocks: the calling thread enqueues a whole step, in the simulator's
// order, onto the streams of one or more GPUs, and does not wait for any of it.
#pragma once

#include <atomic>
#include <chrono>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "cuda/context.hpp"
#include "cuda/stream.hpp"
#include "runtime/device_times.hpp"
#include "runtime/host_executor.hpp"
#include "runtime/program.hpp"
#include "runtime/stream_plan.hpp"

namespace pe {

struct DeviceStepResult {
  Outcome outcome = Outcome::Done;  // Done: enqueued
  TaskId failed_task = kNoTask;
  std::exception_ptr error;            // what a body or the driver threw
  std::shared_ptr<DeviceTimes> times;  // where they were recorded
  std::size_t num_nodes = 0;           // of the graph, where one was captured
};

struct DeviceRunOptions {
  std::vector<cuda::StreamHandle> callers;  // by device: what the step follows, and what follows it
  bool record = false;                      // when tasks run
  bool capturing = false;                   // the callers are being captured into a graph
};

struct WaitOptions {
  std::chrono::duration<double> timeout{1800};
  std::function<bool()> poll;  // called about every 10 ms; true: stop
};

class StreamExecutor {
 public:
  // A program with its streams and events, to be run by the executor that made it.
  class Laid;

  // Throws NoDriver or CudaError.
  explicit StreamExecutor(std::vector<int> device_of_rank);
  ~StreamExecutor();
  StreamExecutor(const StreamExecutor&) = delete;
  StreamExecutor& operator=(const StreamExecutor&) = delete;

  // The ordinals of its devices.
  const std::vector<int>& devices() const { return ordinals_; }

  std::shared_ptr<Laid> lay_out(std::shared_ptr<const Program> program, std::shared_ptr<const StreamPlan> plan);

  // Enqueues one step. A body is called with nothing but its action: it puts its work on
  // streams_of(laid)[...] itself. Whatever happens, the callers then follow all that was enqueued;
  // where even that fails, the executor is dead. Throws std::logic_error when closed or dead.
  DeviceStepResult run(Laid& laid, const DeviceRunOptions& options);

  // Waits, looking now and then, until at most one step that was marked is not done; so the host is never
  // further ahead. Done, Interrupted or TimedOut. Throws CudaError, and is dead, where a device has failed.
  Outcome wait_for_room(const WaitOptions& options);
  // What the callers have enqueued so far is a step.
  void mark(const std::vector<cuda::StreamHandle>& callers);
  // Whether the step that was marked last is done.
  bool idle() const;

  // Lets go of streams and events; what is enqueued still runs. From inside a run, by a body or by `poll`, or
  // while another thread is in one, that stops and does it at its end: result Closed. The only call that
  // other threads may make meanwhile.
  void close();
  bool dead() const { return dead_; }

  static const std::vector<cuda::StreamHandle>& streams_of(const Laid& laid);

  // Copies between devices on a copy engine; by `stream`, one of a laid program.
  void copy(cuda::Address to, int to_device, cuda::Address from, int from_device, std::size_t nbytes,
            cuda::StreamHandle stream) const;

 private:
  struct OfDevice;
  struct Run;
  class Busy;

  std::size_t index_of(int ordinal) const;
  void check_usable() const;
  const cuda::Event& last_mark(std::size_t device) const;

  std::vector<int> ordinals_;
  std::vector<std::unique_ptr<OfDevice>> devices_;
  unsigned steps_ = 0;  // marked
  std::mutex closing_;  // of what follows
  bool busy_ = false;   // in run or wait_for_room
  std::atomic<bool> closed_ = false;
  bool dead_ = false;
};

}  // namespace pe
