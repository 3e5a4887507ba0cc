// The list scheduler on host threads: native threads that run one step after another, with the tasks of all
// ranks or of this process's rank. A thread sleeps until the end of a task, a delivery or the start of a step
// may give it work.
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

constexpr std::chrono::duration<double> kForever{1e9};  // of which a clock's time has no overflow

enum class Outcome {
  Done,
  Failed,       // a body threw, or fail() was called
  Interrupted,  // `poll` returned true
  TimedOut,     // nothing began or ended for `timeout`
  Closed,       // close() was called during the step
};

struct StepResult {
  Outcome outcome = Outcome::Done;
  TaskId failed_task = kNoTask;
  std::exception_ptr error;  // what the first body threw, or what was given to fail()
  std::string waiting;       // TimedOut: who waits for what
  Nanoseconds begin = 0;
  Nanoseconds end = 0;
  std::vector<Nanoseconds> task_begin;  // by task; 0 if it did not begin; empty unless recorded
  std::vector<Nanoseconds> task_end;    // by task; 0 if it did not end
  std::vector<int> peak_by_stage;       // microbatches in flight
  std::vector<int> peak_by_rank;
};

struct RunOptions {
  bool record = true;
  bool look_ahead = true;  // false: a reactive rank runs whatever is ready
  std::chrono::duration<double> timeout{1800};
  std::function<bool()> poll;  // called about every 50 ms on the caller's thread; true: stop
};

class HostExecutor {
 public:
  // Called on each thread when it starts and before it ends.
  struct ThreadHooks {
    std::function<void(int worker)> start;
    std::function<void(int worker)> stop;
  };

  // Starts one thread per worker of `rank`, or of all ranks. They live until close(). If it `follows`, its one
  // worker runs the tasks in the order given to decide(). Throws std::invalid_argument if it follows with
  // several workers, or with all ranks.
  HostExecutor(int num_workers, const std::vector<std::string>& thread_names, ThreadHooks hooks,
               int rank = kEveryRank, bool follows = false);
  ~HostExecutor();
  HostExecutor(const HostExecutor&) = delete;
  HostExecutor& operator=(const HostExecutor&) = delete;

  // Runs one step and returns when no task runs any more. Unless the outcome is Done, tasks that had not begun
  // never begin. If a body does not return within `timeout` after the step was stopped, or `poll` returns true
  // a second time, the body's thread is abandoned and the executor is dead. Throws std::logic_error if closed,
  // dead, busy, or given a program for another number of workers.
  StepResult run(std::shared_ptr<const Program> program, const RunOptions& options);

  // The results of another rank's `task` for `stage` and these microbatches have arrived. If no step is
  // running, they are for the next one.
  void deliver(TaskId task, int stage, const std::vector<int>& microbatches);

  // The process that this one follows has taken `task`. If no step is running, it is for the next one. Throws
  // std::out_of_range for a task that is not its rank's, std::invalid_argument if it follows nobody.
  void decide(TaskId task);

  // Stops the running step as if a body had thrown `error`. Returns whether a step was running; if not, the
  // next one stops when it begins: it may be just about to begin.
  bool fail(std::exception_ptr error);

  // Stops a running step, waits for its end, and joins all threads that are not abandoned. A body that does not
  // return within `limit` is abandoned. If a body or `poll` calls it, it only requests the stop, and the
  // destructor does the rest. Does nothing in a forked child, which has no threads.
  void close(std::chrono::duration<double> limit = kForever);

  bool dead() const;

 private:
  struct Delivery;
  struct Step;
  struct Shared;

  static void work(const std::shared_ptr<Shared>& shared, int me);
  void abandon(Step& step);

  const int num_workers_;
  const int rank_;
  const bool follows_;
  const int owner_pid_;
  std::shared_ptr<Shared> shared_;
};

}  // namespace pe
