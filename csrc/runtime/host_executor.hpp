// The list scheduler under the host's clock: native threads that run the tasks of one step after
// another, those of all ranks or of the one that this process is. Threads sleep until an event, a task's
// end, a delivery or a step's start, gives them something to do.
#pragma once

#include <chrono>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "runtime/program.hpp"

namespace pe {

using Nanoseconds = std::int64_t;  // of a steady clock

enum class Outcome {
  Done,
  Failed,       // a body threw, or fail() was called
  Interrupted,  // `poll` asked to stop
  TimedOut,     // nothing began or ended for `timeout`
  Closed,       // close() was called meanwhile
};

struct StepResult {
  Outcome outcome = Outcome::Done;
  TaskId failed_task = kNoTask;
  std::exception_ptr error;  // of the first body that threw, or given to fail()
  std::string waiting;       // TimedOut: who waits for what
  Nanoseconds begin = 0;
  Nanoseconds end = 0;
  std::vector<Nanoseconds> task_begin;  // by task, 0 if it did not begin; empty unless recorded
  std::vector<Nanoseconds> task_end;    // by task, 0 if it did not end
  std::vector<int> peak_by_stage;       // microbatches in flight
  std::vector<int> peak_by_rank;
};

struct RunOptions {
  bool record = true;
  std::chrono::duration<double> timeout{1800};
  std::function<bool()> poll;  // called about every 50 ms by the caller's thread; true: stop
};

class HostExecutor {
 public:
  // Called on each thread when it starts and before it ends. An abandoned thread does not call `stop`.
  struct ThreadHooks {
    std::function<void(int worker)> start;
    std::function<void(int worker)> stop;
  };

  // One thread a worker of `rank`, or of all ranks, alive until close().
  HostExecutor(int num_workers, const std::vector<std::string>& thread_names, ThreadHooks hooks,
               int rank = kEveryRank);
  ~HostExecutor();
  HostExecutor(const HostExecutor&) = delete;
  HostExecutor& operator=(const HostExecutor&) = delete;

  // Runs one step and returns when no task of it runs any more. After anything but Done, tasks that
  // had not begun never do. If a body has not returned `timeout` after the step was to stop, or by an
  // interrupt while it stops, its thread is abandoned and the executor is dead.
  // Throws std::logic_error when closed, dead, busy, or given a program for other workers.
  StepResult run(std::shared_ptr<const Program> program, const RunOptions& options);

  // What another rank's task sent to `stage` of these microbatches has arrived; if no step runs, for the one
  // that begins next.
  void deliver(TaskId task, int stage, const std::vector<int>& microbatches);

  // Stops the step that runs, as if a body had thrown. Returns whether there is one.
  bool fail(std::exception_ptr error);

  // Stops a step that runs, waits until it has, and joins all threads but abandoned ones. Called from
  // inside that step, by a body or by `poll`, it only asks for all this; the destructor then does the rest.
  // In a forked child, which has no threads, does nothing.
  void close();

  bool dead() const;

 private:
  struct Delivery;
  struct Step;
  struct Shared;

  static void work(const std::shared_ptr<Shared>& shared, int me);
  void abandon(Step& step);

  const int num_workers_;
  const int rank_;
  const int owner_pid_;
  std::shared_ptr<Shared> shared_;
};

}  // namespace pe
