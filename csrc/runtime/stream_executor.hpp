// Runs plans on GPUs: the calling thread enqueues a whole step, in the simulated order, onto the streams of one
// or more devices, and waits for none of it.
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
  std::shared_ptr<DeviceTimes> times;  // if times were recorded
  std::size_t num_nodes = 0;           // of the captured graph, if any
};

struct DeviceRunOptions {
  std::vector<cuda::StreamHandle>
      callers;             // by device: the step runs after earlier, and before later work on it
  bool record = false;     // the times of ops
  bool capturing = false;  // the callers are being captured into a graph
};

struct WaitOptions {
  std::chrono::duration<double> timeout{1800};
  std::function<bool()> poll;  // called about every 10 ms; true: stop
};

class StreamExecutor {
 public:
  // A program with its streams and events. Only the executor that made it can run it.
  class Laid;

  // Throws NoDriver or CudaError.
  explicit StreamExecutor(std::vector<int> device_of_rank);
  ~StreamExecutor();
  StreamExecutor(const StreamExecutor&) = delete;
  StreamExecutor& operator=(const StreamExecutor&) = delete;

  // The ordinals of the devices.
  const std::vector<int>& devices() const { return ordinals_; }

  // Throws PlanError if the two are of different plans, std::out_of_range for a device that it does not have.
  std::shared_ptr<Laid> lay_out(std::shared_ptr<const Program> program, std::shared_ptr<const StreamPlan> plan);

  // Enqueues one step. A body is called with its action only, and puts its work on streams_of(laid)[...]
  // itself. Also after an error, the callers then wait for all that was enqueued; if that fails too, the
  // executor is dead. Throws std::logic_error if closed or dead.
  DeviceStepResult run(Laid& laid, const DeviceRunOptions& options);

  // Polls the devices until at most one marked step is unfinished, which keeps the host from running further
  // ahead. Returns Done, Interrupted, TimedOut or Closed. If a device has failed, throws CudaError, and the
  // executor is dead.
  Outcome wait_for_room(const WaitOptions& options);
  // Marks what `caller`, a stream of the device, has enqueued so far as the reading of a step's inputs.
  void mark_inputs(int ordinal, cuda::StreamHandle caller);
  // Polls until what was marked as the reading of inputs is done. Returns and throws as wait_for_room.
  Outcome wait_for_inputs(const WaitOptions& options);
  // Marks what the callers have enqueued so far as a step.
  void mark(const std::vector<cuda::StreamHandle>& callers);
  // Whether the latest marked step is done.
  bool idle() const;

  // Releases streams and events; work that is enqueued still runs. If a body or `poll` calls it, or another
  // thread during a run, the run stops with the outcome Closed and releases them at its end. No other function
  // may be called by another thread during a run.
  void close();
  bool dead() const { return dead_; }

  static const std::vector<cuda::StreamHandle>& streams_of(const Laid& laid);

  // Copies between devices on a copy engine, on `stream`, a stream of a laid program.
  void copy(cuda::Address to, int to_device, cuda::Address from, int from_device, std::size_t nbytes,
            cuda::StreamHandle stream) const;

 private:
  struct OfDevice;
  struct Run;
  class Busy;

  std::size_t index_of(int ordinal) const;
  void check_usable() const;
  void check_device(int ordinal) const;                                      // throws std::out_of_range
  void check_callers(const std::vector<cuda::StreamHandle>& callers) const;  // throws std::invalid_argument
  const cuda::Event& last_mark(std::size_t device) const;
  Outcome wait_for(const std::vector<const cuda::Event*>& events, const WaitOptions& options);

  std::vector<int> ordinals_;
  std::vector<std::unique_ptr<OfDevice>> devices_;
  unsigned steps_ = 0;  // marked
  std::mutex closing_;  // guards what follows
  bool busy_ = false;   // inside run or a wait
  std::atomic<bool> closed_ = false;
  bool dead_ = false;
};

}  // namespace pe
