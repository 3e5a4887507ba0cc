// Whether a rank whose next planned task is not ready should wait for it, although it could run another one.
//
// It waits if the planned task is expected to be ready before the other one would end. The planned order has
// reasons that no rank sees alone: a backward that runs early fills a slot's time, and the forward that comes
// meanwhile is late at every later stage. Waiting never deadlocks where the planned order ends. Proof: suppose
// no task runs. Take the first task of the in-order run that has not begun. All tasks planned before it on its
// worker have ended, and so have its dependencies; it is what its worker waits for, and it is ready.
#pragma once

#include <algorithm>
#include <limits>
#include <vector>

#include "plan/plan.hpp"
#include "schedule/list_scheduler.hpp"

namespace pe {

// What the ranks are doing, as far as it is known here. The caller's times are in one unit, from one clock.
class LookAhead {
 public:
  // `rank`: the only one whose tasks are known; kEveryRank: all are.
  LookAhead(const Plan& plan, const ListScheduler& scheduler, int rank, double now)
      : plan_(plan),
        scheduler_(scheduler),
        rank_(rank),
        running_(plan.num_workers(), kNoTask),
        since_(plan.num_workers(), now),
        last_(rank == kEveryRank ? 0 : plan.num_ranks(), kNoTask),
        heard_(rank == kEveryRank ? 0 : plan.size(), false) {}

  void begin(TaskId task, double now) {
    const int worker = plan_.worker_of(task);
    running_[worker] = task;
    since_[worker] = now;
  }
  void end(TaskId task) { running_[plan_.worker_of(task)] = kNoTask; }
  // A result of another rank's `task` has arrived.
  void hear(TaskId task, double now) {
    heard_[task] = true;
    last_[plan_.rank_of(task)] = task;
    since_[plan_.worker_of(task)] = now;
  }

  // How long from now until the inputs of `task` are expected. What nothing is known of never comes.
  // `expected(task)`: how long a task takes, its results' way included.
  template <class Expected>
  double ready_in(TaskId task, double now, Expected&& expected) const {
    return ready_in(task, now, expected, 1);
  }

 private:
  static constexpr double kNever = std::numeric_limits<double>::infinity();

  // `depth`: how many tasks that have not begun may lie between what runs now and `task`.
  template <class Expected>
  double ready_in(TaskId task, double now, Expected& expected, int depth) const {
    double wait = 0;
    for (const TaskId before : plan_.dependencies().predecessors(task)) {
      wait = std::max(wait, done_in(before, now, expected, depth));
    }
    return wait;
  }

  template <class Expected>
  double done_in(TaskId task, double now, Expected& expected, int depth) const {
    const int worker = plan_.worker_of(task);
    if (rank_ != kEveryRank && plan_.rank_of(task) != rank_) return heard_in(task, now, expected);
    if (scheduler_.finished(task)) return 0;
    const TaskId running = running_[worker];
    const double rest = running == kNoTask ? 0 : std::max(0.0, since_[worker] + expected(running) - now);
    if (running == task) return rest;
    const bool computes = is_compute(plan_.action(task).kind);
    if (computes && depth == 0) return kNever;
    return std::max(rest, ready_in(task, now, expected, depth - computes)) + expected(task);
  }

  // For a task of another process: its rank is taken to run on, as planned, since the last result it sent here.
  template <class Expected>
  double heard_in(TaskId task, double now, Expected& expected) const {
    if (heard_[task]) return 0;
    const int rank = plan_.rank_of(task);
    const TaskId last = last_[rank];
    double work = 0;
    for (TaskId t = last == kNoTask ? plan_.first_of_rank(rank) : last + 1; t <= task; ++t) {
      if (!heard_[t]) work += expected(t);
    }
    return std::max(0.0, since_[plan_.worker_of(last == kNoTask ? task : last)] + work - now);
  }

  const Plan& plan_;
  const ListScheduler& scheduler_;
  const int rank_;
  std::vector<TaskId> running_;  // by worker
  std::vector<double> since_;    // by worker: when `running_` began; of another rank: when it was heard of
  std::vector<TaskId> last_;     // by rank, the last task heard of
  std::vector<bool> heard_;      // by task
};

}  // namespace pe
