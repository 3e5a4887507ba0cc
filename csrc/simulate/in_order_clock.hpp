// Virtual time for ranks that run in order: begins, ends and arrivals as the event-driven clock would tell.
#pragma once

#include <algorithm>
#include <vector>

#include "plan/plan.hpp"
#include "simulate/costs.hpp"
#include "simulate/simulator.hpp"

namespace pe {

class InOrderClock {
 public:
  using Moment = double;
  static constexpr Moment kNever = -1;

  // Fills the result's begins, and by rank when it starts and finishes and how long it is busy.
  InOrderClock(const Plan& plan, const Costs& costs, Simulation& result);

  Moment run(int rank, TaskId first, TaskId end_of_cell, Moment arrived) {
    const double begin = std::max(result_.finish[rank], arrived);
    const double duration = duration_of(first, end_of_cell);
    if (first == plan_.first_of_rank(rank)) result_.first_start[rank] = begin;
    for (TaskId t = first; t < end_of_cell; ++t) result_.begin[t] = begin;
    result_.busy[rank] += duration;
    return result_.finish[rank] = begin + duration;
  }

  Moment deliver(TaskId task, Moment end) {
    const Charge& charge = charge_of(plan_.action(task));
    if (!charge.crosses) return end;
    if (link_free_.empty()) return end + charge.latency;
    double& free = link_free_[charge.link];
    free = std::max(free, end) + charge.transfer;
    return free + charge.latency;
  }

  std::size_t nbytes() const;

 private:
  // What does not change from microbatch to microbatch.
  struct Charge {
    double duration = 0;
    double transfer = 0;
    double latency = 0;
    int link = 0;
    bool crosses = false;  // to another rank
  };

  const Charge& charge_of(const Action& a) const {
    const int copy = plan_.shape().on_copy(a.microbatch) ? plan_.num_stages() : 0;
    return charges_[kComputes * (copy + a.stage) + static_cast<int>(a.kind)];
  }
  double duration_of(TaskId first, TaskId end) const {
    if (end > first + 1) return costs_.duration_of_cell(plan_, first);
    return costs_.noise.cv > 0 ? costs_.duration(plan_, first) : charge_of(plan_.action(first)).duration;
  }

  static constexpr int kComputes = 4;  // kinds

  const Plan& plan_;
  const Costs& costs_;
  Simulation& result_;
  std::vector<Charge> charges_;  // by copy, stage and kind
  std::vector<double> link_free_;
};

}  // namespace pe
