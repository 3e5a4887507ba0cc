// The event-driven list scheduler: what may start, and what goes first. It has no clock and no
// threads of its own; the simulator drives it with virtual time, the executors with real events.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "plan/plan.hpp"
#include "schedule/memory_use.hpp"

namespace pe {

// Under a limit of memory a rank starts its F as planned, each when it fits, while what frees memory goes as
// soon as it can. That cannot deadlock if the plan run in order does not: take the first task, in such a run,
// that has not begun. What it waits for is done. If it is an F, all that its rank holds the plan's own run
// holds at that moment too, so it fits.
class ListScheduler {
 public:
  // Keeps the plan's own limits of memory, if it has any. Schedules the tasks of `rank` alone, or all; what
  // other ranks do then arrives from outside.
  explicit ListScheduler(const Plan& plan, int rank = kEveryRank);
  // Keeps those of `memory`, and accounts for what is taken.
  ListScheduler(const Plan& plan, Memory memory);

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
  // The most that was held at once, by rank; empty where memory is not accounted for.
  std::vector<double> peak_memory() const { return memory_ ? memory_->peak() : std::vector<double>(); }

  // For each worker with tasks left, its foremost one and what that waits for, a line each.
  std::string waiting() const;

  // Where nothing runs and nothing may start: tasks each of which waits for the next and the last one for the
  // first, a line each, with their cells.
  std::string cycle() const;

  std::size_t nbytes() const;

 private:
  // Workers of the ranks whose tasks it schedules.
  int first_worker() const { return rank_ == kEveryRank ? 0 : rank_ * plan_.workers_per_rank(); }
  int end_worker() const {
    return rank_ == kEveryRank ? plan_.num_workers() : first_worker() + plan_.workers_per_rank();
  }

  bool has_slot(TaskId task) const {
    return !plan_.takes_slot(task) || in_flight_[slots_of(task)] < plan_.limit(plan_.action(task).stage);
  }
  // A stage's two copies have slots of their own.
  int slots_of(TaskId task) const {
    const Action& a = plan_.action(task);
    return a.stage + (plan_.shape().on_copy(a.microbatch) ? plan_.num_stages() : 0);
  }
  void occupy_slot(TaskId task);
  // The first F of the worker's rank, as planned, that has not begun.
  TaskId next_forward(int worker) const;
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

// Runs the plan without time. Throws PlanError with the tasks that wait for one another if it cannot end.
void check_ends(const Plan& plan);
bool ends(const Plan& plan);

template <class IsHere>
TaskId ListScheduler::take(int worker, IsHere&& is_here) {
  TaskId best = kNoTask;
  int best_queue = -1;
  int best_priority = 0;
  const bool limited = memory_ && memory_->limited();
  const TaskId forward = limited ? next_forward(worker) : kNoTask;
  int queue = plan_.first_queue_of(worker);
  for (const Queue& q : plan_.queues_of(worker)) {
    const int at = queue++;
    if (head_[at] == q.end) continue;
    const TaskId task = plan_.queued(head_[at]);
    if (missing_[task] != 0 || !has_slot(task) || !is_here(task)) continue;
    if (limited && plan_.takes_slot(task) && (task != forward || !memory_->fits(task))) continue;
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
    wake(plan_.options().overlap ? 2 * rank : rank);  // the worker that runs the rank's F
  }
}

template <class Wake>
void ListScheduler::arrive(TaskId task, Wake&& wake) {
  if (--missing_[task] == 0) wake(plan_.worker_of(task));
}

}  // namespace pe
