#include "simulate/in_order_clock.hpp"

#include <algorithm>

#include "schedule/in_order.hpp"

namespace pe {
namespace {

class InOrderClock {
 public:
  using Moment = double;
  static constexpr Moment kNever = -1;

  // Fills the begins of `result`, and its first_start, finish and busy.
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
  // What is the same for all microbatches.
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
    if (vary_ || end > first + 1) return duration_of_cell(first);
    return charge_of(plan_.action(first)).duration;
  }
  // Not inlined: it would slow down the loop over tasks that do not need it.
  [[gnu::noinline]] double duration_of_cell(TaskId first) const {
    return costs_.duration_of_cell(plan_, first);
  }

  static constexpr int kComputes = 4;  // kinds

  const Plan& plan_;
  const Costs& costs_;
  const bool vary_;  // durations by microbatch: then those in `charges_` do not hold
  Simulation& result_;
  std::vector<Charge> charges_;  // by copy, stage and kind
  std::vector<double> link_free_;
};

InOrderClock::InOrderClock(const Plan& plan, const Costs& costs, Simulation& result)
    : plan_(plan), costs_(costs), vary_(costs.vary()), result_(result) {
  result.begin.resize(plan.size());
  for (auto* by_rank : {&result.first_start, &result.finish, &result.busy}) {
    by_rank->assign(plan.num_ranks(), 0.0);
  }
  const Shape& shape = plan.shape();
  for (int copy = 0; copy < shape.num_copies(); ++copy) {
    for (int stage = 0; stage < shape.num_stages; ++stage) {
      for (const Kind kind : {Kind::F, Kind::B, Kind::I, Kind::W}) {
        const Action a{stage, copy == 0 ? 0 : shape.first_of_copy, kind};
        Charge& charge = charges_.emplace_back();
        if (!vary_) charge.duration = costs.of(a);  // there may be no such microbatch
        const int after = plan.stage_after(a);
        charge.crosses =
            after != kNoStage && shape.rank_of(after, a.microbatch) != shape.rank_of(stage, a.microbatch);
        if (!charge.crosses) continue;
        const int boundary = Costs::boundary_sent_over(a);
        if (!costs.overhead.empty()) charge.duration += costs.overhead[boundary];
        charge.latency = costs.latency[boundary];
        if (!costs.transfer.empty()) charge.transfer = costs.transfer[boundary];
        charge.link = costs.link(shape, a);
      }
    }
  }
  if (!costs.transfer.empty()) link_free_.assign(costs.num_links(shape), 0.0);
}

std::size_t InOrderClock::nbytes() const {
  return sizeof(double) * link_free_.size() + sizeof(Charge) * charges_.size();
}

}  // namespace

bool simulate_in_order(const Plan& plan, const Costs& costs, Simulation& result) {
  InOrderClock clock(plan, costs, result);
  if (!run_in_order(plan, clock)) return false;
  result.makespan = *std::max_element(result.finish.begin(), result.finish.end());
  result.peak_in_flight = plan.planned_peaks().of_rank;
  result.peak_in_flight_of_stage = plan.planned_peaks().of_stage;
  result.working_bytes = sizeof(double) * (result.begin.size() + Inputs(plan).size()) + clock.nbytes();
  return true;
}

}  // namespace pe
