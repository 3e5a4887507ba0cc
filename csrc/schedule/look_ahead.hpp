// Whether a rank whose next planned task is not ready should wait for it, although it could run another one.
//
// It waits if the planned task is expected to be ready before the other one would end: a backward that runs
// early makes the forward that comes meanwhile late, at this stage and at all later ones. It does not wait for
// what is long overdue. Waiting never deadlocks where the planned order ends. Proof: suppose no task runs. Take
// the first task of the in-order run that has not begun. All tasks planned before it on its worker have ended,
// and so have its dependencies; it is what its worker waits for, and it is ready.
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

  // How long a worker should leave `other` and wait for `planned`, at most; 0: not at all.
  // `expected(task)`: how long a task takes, its results' way included.
  template <class Expected>
  double wait(TaskId planned, TaskId other, double now, Expected&& expected) const {
    const double length = expected(other);
    const Estimate inputs = inputs_of(planned, {now, kPatience * length}, expected, 1);
    return inputs.ready_in < length ? inputs.holds_for : 0;
  }

 private:
  static constexpr double kNever = std::numeric_limits<double>::infinity();
  // How long a task may be overdue, in lengths of the other task, before nobody waits for it any more.
  static constexpr double kPatience = 4;
  // Of another process only the earliest time is known. What it waits for may be all other ranks away.
  double patience_apart() const { return std::max(24, 8 * plan_.num_ranks()); }

  struct Estimate {
    double ready_in = 0;        // kNever: nothing is known
    double holds_for = kNever;  // how long the estimate may be believed

    void add(const Estimate& other) {
      ready_in = std::max(ready_in, other.ready_in);
      holds_for = std::min(holds_for, other.holds_for);
    }
  };
  struct Moment {
    double now;
    double patience;

    Estimate due(double time) const {
      const double left = time - now;
      if (left + patience <= 0) return {kNever, 0};
      return {std::max(0.0, left), left + patience};
    }
  };

  // `depth`: how many tasks that have not begun may lie between what runs now and `task`.
  template <class Expected>
  Estimate inputs_of(TaskId task, const Moment& moment, Expected& expected, int depth) const {
    Estimate all;
    for (const TaskId before : plan_.dependencies().predecessors(task)) {
      all.add(end_of(before, moment, expected, depth));
    }
    return all;
  }

  template <class Expected>
  Estimate end_of(TaskId task, const Moment& moment, Expected& expected, int depth) const {
    if (rank_ != kEveryRank && plan_.rank_of(task) != rank_) return heard(task, moment, expected);
    if (scheduler_.finished(task)) return {};
    const int worker = plan_.worker_of(task);
    const TaskId running = running_[worker];
    Estimate end;
    if (running != kNoTask) end = moment.due(since_[worker] + expected(running));
    if (running == task) return end;
    const bool computes = is_compute(plan_.action(task).kind);
    if (computes && depth == 0) return {kNever, 0};
    end.add(inputs_of(task, moment, expected, depth - computes));
    end.ready_in += expected(task);
    return end;
  }

  // For a task of another process: its rank is taken to run on, as planned, since the last result it sent here.
  template <class Expected>
  Estimate heard(TaskId task, const Moment& moment, Expected& expected) const {
    if (heard_[task]) return {};
    const int rank = plan_.rank_of(task);
    const TaskId last = last_[rank];
    double work = 0;
    for (TaskId t = last == kNoTask ? plan_.first_of_rank(rank) : last + 1; t <= task; ++t) {
      if (!heard_[t]) work += expected(t);
    }
    const Moment apart{moment.now, moment.patience * patience_apart() / kPatience};
    return apart.due(since_[plan_.worker_of(last == kNoTask ? task : last)] + work);
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
