// What the rules of a step say, written down apart from the core, and a record of what its threads do.
#pragma once

#include <cstddef>
#include <cstdint>

#include "plan/plan.hpp"

namespace pe {

inline constexpr int kMostProcesses = 2;

class Watch {
 public:
  struct Delivery {
    int pending, stage, group;
  };
  struct State {
    static constexpr int kTasks = 40, kStages = 4, kMicrobatches = 6, kThreads = 12;
    std::int16_t running[kTasks], ended[kTasks];
    std::int16_t in_flight[kStages];
    std::int16_t last[kStages][2];  // task that computed gradients to send, and that accumulated them
    std::int16_t rank[kMostProcesses], in_step[kMostProcesses], dead[kMostProcesses];
    std::int16_t asks[kMostProcesses], stopped[kMostProcesses];
    std::int16_t process_of[kThreads], took_since[kThreads];  // since its process has stopped
    std::int16_t runs[kThreads];                              // task + 1
    Delivery delivers[kThreads];
    std::int16_t arrived[kStages][kMicrobatches];  // by stage that sent it, and group
  };

  Watch(const Plan& plan, int pack, bool apart, State& now)
      : plan_(plan), pack_(pack), apart_(apart), now_(now) {}

  // A step of `process` begins, which has all tasks or those of one rank; it has returned.
  void step_begins(int process, int rank);
  void step_ended(int process, bool done, bool dead);
  // A thread that runs tasks of `process`.
  void works(int thread, int process) { now_.process_of[thread] = static_cast<std::int16_t>(process); }

  // The task runs now; it ends when its thread takes a mutex again. Fails unless the rules allow it.
  void begins(int thread, TaskId task);
  // It does not end, but raises.
  void raises(int thread);

  // `thread` asks for the end of the step. It is seen once this thread has given back the mutex.
  void asks_to_stop(int thread, int process) { now_.asks[process] = static_cast<std::int16_t>(thread + 1); }
  // `thread` hands over the results of a group, which another process has sent; they are there once it has
  // taken the mutex.
  void delivers(int thread, int stage, int group) { now_.delivers[thread] = {true, stage, group}; }

  void took(int thread);
  void gave_back(int thread);

  int process_of(int thread) const { return now_.process_of[thread]; }
  // Whether all results of the group are there once the running task has ended.
  bool completes_group(TaskId task) const;
  TaskId find(int stage, Kind kind, int microbatch) const;

 private:
  void ends(TaskId task);
  bool is_of(TaskId task, int process) const {
    return now_.rank[process] == kEveryRank || plan_.rank_of(task) == now_.rank[process];
  }
  void needs(TaskId task, int stage, Kind kind, int microbatch);
  void needs_group(TaskId task, int stage, bool forward);

  const Plan& plan_;
  const int pack_;
  const bool apart_;  // ranks are processes
  State& now_;
};

}  // namespace pe
