// The event-driven list scheduler: decides which task may start and which goes first. It has no clock and no
// threads: the simulator drives it with virtual time, the executors with real events.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "plan/plan.hpp"
#include "schedule/memory_use.hpp"

namespace pe {

// Under a memory limit a rank starts its `F` in planned order, each as soon as it fits; other tasks, which free
// memory, start as soon as they can. This does not deadlock if the plan does not deadlock in order. Proof: take
// the first task of the in-order run that has not begun. Its dependencies are done. If it is an `F`, the rank
// holds no more memory than in the in-order run at that moment, so the `F` fits.
class ListScheduler {
 public:
  // Keeps the plan's memory limits, if any. Schedules all tasks, or only those of `rank`; then arrive() must be
  // called for what other ranks send.
  explicit ListScheduler(const Plan& plan, int rank = kEveryRank);
  // Keeps the limits of `memory` instead, and accounts for the memory in use.
  ListScheduler(const Plan& plan, Memory memory);

  // The task that `worker` starts now, or kNoTask. Occupies a slot if the task takes one. Skips tasks for which
  // is_here(task) is false: the simulator uses this for inputs that are sent but have not arrived. Skips a task
  // other than the next planned one if waits(planned, task) is true.
  template <class IsHere, class Waits>
  TaskId take(int worker, IsHere&& is_here, Waits&& waits);
  template <class IsHere>
  TaskId take(int worker, IsHere&& is_here) {
    return take(worker, is_here, [](TaskId, TaskId) { return false; });
  }
  TaskId take(int worker) {
    return take(worker, [](TaskId) { return true; });
  }
  // The first task of the worker, in planned order, that has not begun, or kNoTask.
  TaskId planned_next(int worker) const {
    return first_planned(worker, [](TaskId) { return true; });
  }

  // Takes the next task of a worker that has one queue, to run it joined to the one just taken. The caller has
  // checked that it may start.
  TaskId take_joined(int worker);

  // `task` has ended; frees its slot if it frees one. Its results reach other tasks by arrive(). Calls
  // wake(worker) for a worker that may have a task now.
  template <class Wake>
  void finish(TaskId task, Wake&& wake);

  // One dependency of `task` is done. Calls wake(worker) if it was the last one.
  template <class Wake>
  void arrive(TaskId task, Wake&& wake);

  bool done() const { return unfinished_ == 0; }
  int missing(TaskId task) const { return missing_[task]; }  // dependencies that are not done
  bool finished(TaskId task) const { return missing_[task] == kFinished; }

  // The most microbatches that were in flight at once.
  const std::vector<int>& peak_by_stage() const { return peak_of_stage_; }
  const std::vector<int>& peak_by_rank() const { return peak_of_rank_; }
  // By rank, the most memory in use at once; empty if memory is not accounted for.
  std::vector<double> peak_memory() const { return memory_ ? memory_->peak() : std::vector<double>(); }

  // For each worker with tasks left, one line: its first task and what that task waits for.
  std::string waiting() const;

  // After a deadlock: a cycle of tasks, each of which waits for the next one, one line per task, with their
  // cells.
  std::string cycle() const;

  std::size_t nbytes() const;

 private:
  // The workers whose tasks this scheduler schedules.
  int first_worker() const { return rank_ == kEveryRank ? 0 : rank_ * plan_.workers_per_rank(); }
  int end_worker() const {
    return rank_ == kEveryRank ? plan_.num_workers() : first_worker() + plan_.workers_per_rank();
  }

  bool has_slot(TaskId task) const {
    return !plan_.takes_slot(task) || in_flight_[slots_of(task)] < plan_.limit(plan_.action(task).stage);
  }
  // The two copies of a stage have separate slots.
  int slots_of(TaskId task) const {
    const Action& a = plan_.action(task);
    return a.stage + (plan_.shape().on_copy(a.microbatch) ? plan_.num_stages() : 0);
  }
  void occupy_slot(TaskId task);
  // The first task in planned order that has not begun, among those for which counts(task) is true.
  template <class Counts>
  TaskId first_planned(int worker, Counts&& counts) const;
  TaskId frees_slot_for(TaskId task) const;

  static constexpr std::uint16_t kFinished = kMaxDependencies + 1;

  const Plan& plan_;
  const int rank_;
  const Dependencies& dependencies_;
  std::optional<MemoryUse> memory_;
  std::vector<std::uint16_t> missing_;  // dependencies that are not done, by task; or kFinished
  std::vector<TaskId> head_;            // position in Plan::queued, by queue
  std::vector<int> in_flight_;          // by slots_of
  std::vector<int> peak_of_stage_;
  std::vector<int> in_flight_of_rank_, peak_of_rank_;
  TaskId unfinished_;
};

// Runs the plan without time. If it cannot end, check_ends throws PlanError with the tasks that wait for one
// another.
void check_ends(const Plan& plan);
bool ends(const Plan& plan);
// Whether it ends if every worker takes its tasks exactly as planned.
bool ends_as_planned(const Plan& plan);

template <class Counts>
TaskId ListScheduler::first_planned(int worker, Counts&& counts) const {
  TaskId first = kNoTask;
  int queue = plan_.first_queue_of(worker);
  for (const Queue& q : plan_.queues_of(worker)) {
    const int at = queue++;
    if (head_[at] == q.end) continue;
    const TaskId task = plan_.queued(head_[at]);
    if (counts(task)) first = std::min(first, task);
  }
  return first;
}

template <class IsHere, class Waits>
TaskId ListScheduler::take(int worker, IsHere&& is_here, Waits&& waits) {
  TaskId best = kNoTask;
  int best_queue = -1;
  int best_priority = 0;
  const bool limited = memory_ && memory_->limited();
  const auto is_forward = [&](TaskId task) { return plan_.takes_slot(task); };
  const TaskId forward = limited ? first_planned(worker, is_forward) : kNoTask;
  const TaskId planned = plan_.options().looks_ahead ? planned_next(worker) : kNoTask;
  int queue = plan_.first_queue_of(worker);
  for (const Queue& q : plan_.queues_of(worker)) {
    const int at = queue++;
    if (head_[at] == q.end) continue;
    const TaskId task = plan_.queued(head_[at]);
    if (missing_[task] != 0 || !has_slot(task) || !is_here(task)) continue;
    if (limited && plan_.takes_slot(task) && (task != forward || !memory_->fits(task))) continue;
    if (planned != kNoTask && task != planned && waits(planned, task)) continue;
    if (best == kNoTask || q.priority < best_priority || (q.priority == best_priority && task < best)) {
      best = task;
      best_queue = at;
      best_priority = q.priority;
    }
  }
  if (best == kNoTask) return kNoTask;
  ++head_[best_queue];
  if (plan_.takes_slot(best)) occupy_slot(best);
  if (memory_) memory_->begin(best);
  return best;
}

template <class Wake>
void ListScheduler::finish(TaskId task, Wake&& wake) {
  missing_[task] = kFinished;
  --unfinished_;
  const int rank = plan_.rank_of(task);
  const bool frees_slot = plan_.frees_slot(task);
  if (memory_) memory_->end(task);
  if (frees_slot) {
    --in_flight_[slots_of(task)];
    --in_flight_of_rank_[rank];
  }
  if (frees_slot || (memory_ && memory_->limited())) {
    wake(plan_.options().overlap ? 2 * rank : rank);  // the worker that runs the rank's `F`
  }
}

template <class Wake>
void ListScheduler::arrive(TaskId task, Wake&& wake) {
  if (--missing_[task] == 0) wake(plan_.worker_of(task));
}

}  // namespace pe
