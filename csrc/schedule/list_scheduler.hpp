// The event-driven list scheduler: what may start, and what goes first. It has no clock and no
// threads of its own; the simulator drives it with virtual time, the executors with real events.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "plan/plan.hpp"

namespace pe {

class ListScheduler {
 public:
  explicit ListScheduler(const Plan& plan);

  // The task `worker` starts now, or kNoTask. Occupies a slot if the task takes one. A task that waits
  // for nothing more is still passed over while is_here(task) is false: a clock that knows when its
  // inputs will have travelled can say so.
  template <class IsHere>
  TaskId take(int worker, IsHere&& is_here);
  TaskId take(int worker) {
    return take(worker, [](TaskId) { return true; });
  }

  // The next task of a worker that has one queue: it runs joined to the one just taken, as it waits for
  // nothing that is not.
  TaskId take_joined(int worker);

  // `task` has ended: its slot, if it frees one, is free. Its results are not yet anywhere else.
  // Calls wake(worker) for a worker that may now find a task.
  template <class Wake>
  void finish(TaskId task, Wake&& wake);

  // One thing `task` depends on is done. Calls wake(worker) if the task waits for nothing more.
  template <class Wake>
  void arrive(TaskId task, Wake&& wake);

  bool done() const { return unfinished_ == 0; }
  int missing(TaskId task) const { return missing_[task]; }  // dependencies that are not done
  bool finished(TaskId task) const { return missing_[task] == kFinished; }

  // The most microbatches that were in flight at once.
  const std::vector<int>& peak_by_stage() const { return peak_of_stage_; }
  const std::vector<int>& peak_by_rank() const { return peak_of_rank_; }

  // For each worker with tasks left, its foremost one and what that waits for, a line each.
  std::string waiting() const;

  std::size_t nbytes() const;

 private:
  bool has_slot(TaskId task) const {
    return !plan_.takes_slot(task) || in_flight_[slots_of(task)] < plan_.limit(plan_.action(task).stage);
  }
  // A stage's two copies have slots of their own.
  int slots_of(TaskId task) const {
    const Action& a = plan_.action(task);
    return a.stage + (plan_.shape().on_copy(a.microbatch) ? plan_.num_stages() : 0);
  }
  void occupy_slot(TaskId task);

  static constexpr std::uint16_t kFinished = kMaxDependencies + 1;

  const Plan& plan_;
  std::vector<std::uint16_t> missing_;  // dependencies that are not done, by task; or kFinished
  std::vector<TaskId> head_;  // position in Plan::queued, by queue
  std::vector<int> in_flight_;  // by slots_of
  std::vector<int> peak_of_stage_;
  std::vector<int> in_flight_of_rank_, peak_of_rank_;
  TaskId unfinished_;
};

// Runs the plan without time. Throws PlanError with the tasks that wait for one another if it cannot end.
void check_ends(const Plan& plan);
bool ends(const Plan& plan);

template <class IsHere>
TaskId ListScheduler::take(int worker, IsHere&& is_here) {
  TaskId best = kNoTask;
  int best_queue = -1;
  int best_priority = 0;
  int queue = plan_.first_queue_of(worker);
  for (const Queue& q : plan_.queues_of(worker)) {
    const int at = queue++;
    if (head_[at] == q.end) continue;
    const TaskId task = plan_.queued(head_[at]);
    if (missing_[task] != 0 || !has_slot(task) || !is_here(task)) continue;
    if (best == kNoTask || q.priority < best_priority ||
        (q.priority == best_priority && task < best)) {
      best = task;
      best_queue = at;
      best_priority = q.priority;
    }
  }
  if (best == kNoTask) return kNoTask;
  ++head_[best_queue];
  if (plan_.takes_slot(best)) occupy_slot(best);
  return best;
}

template <class Wake>
void ListScheduler::finish(TaskId task, Wake&& wake) {
  missing_[task] = kFinished;
  --unfinished_;
  if (plan_.frees_slot(task)) {
    const int rank = plan_.rank_of(task);
    --in_flight_[slots_of(task)];
    --in_flight_of_rank_[rank];
    wake(plan_.options().overlap ? 2 * rank : rank);  // the worker that runs the rank's F
  }
}

template <class Wake>
void ListScheduler::arrive(TaskId task, Wake&& wake) {
  if (--missing_[task] == 0) wake(plan_.worker_of(task));
}

}  // namespace pe
