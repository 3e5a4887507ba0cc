// The event-driven list scheduler: what may start, and what goes first. It has no clock and no
// threads of its own; the simulator drives it with virtual time, the executors with real events.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "plan/plan.hpp"

namespace pe {

class ListScheduler {
 public:
  explicit ListScheduler(const Plan& plan);

  // The task `worker` starts now, or kNoTask. Occupies a slot if the task takes one.
  TaskId take(int worker);

  // `task` has ended: its slot, if it frees one, is free. Its results are not yet anywhere else.
  // Calls wake(worker) for a worker that may now find a task.
  template <class Wake>
  void finish(TaskId task, Wake&& wake);

  // One thing `task` depends on has arrived. Calls wake(worker) if the task waits for nothing more.
  template <class Wake>
  void arrive(TaskId task, Wake&& wake);

  bool done() const { return unfinished_ == 0; }
  bool finished(TaskId task) const { return finished_[task]; }

  // The most microbatches that were in flight at once.
  const std::vector<int>& peak_by_stage() const { return peak_of_stage_; }
  const std::vector<int>& peak_by_rank() const { return peak_of_rank_; }

  // For each worker with tasks left, its foremost one and what that waits for, a line each.
  std::string waiting() const;

 private:
  bool has_slot(TaskId task) const;

  const Plan& plan_;
  std::vector<std::uint16_t> missing_;  // dependencies that have not arrived, by task
  std::vector<bool> finished_;
  std::vector<TaskId> head_;  // position in Plan::queued, by queue
  std::vector<int> in_flight_of_stage_, peak_of_stage_;
  std::vector<int> in_flight_of_rank_, peak_of_rank_;
  TaskId unfinished_;
};

// Runs the plan without time. Throws PlanError with the tasks that wait for one another if it cannot end.
void check_ends(const Plan& plan);

template <class Wake>
void ListScheduler::finish(TaskId task, Wake&& wake) {
  finished_[task] = true;
  --unfinished_;
  if (plan_.frees_slot(task)) {
    const int stage = plan_.action(task).stage;
    const int rank = plan_.rank_of_stage(stage);
    --in_flight_of_stage_[stage];
    --in_flight_of_rank_[rank];
    wake(plan_.options().overlap ? 2 * rank : rank);  // the worker that runs the rank's F
  }
}

template <class Wake>
void ListScheduler::arrive(TaskId task, Wake&& wake) {
  if (--missing_[task] == 0) wake(plan_.worker_of(task));
}

}  // namespace pe
