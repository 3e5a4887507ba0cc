#include "simulate/in_order_clock.hpp"

namespace pe {

InOrderClock::InOrderClock(const Plan& plan, const Costs& costs, Simulation& result)
    : plan_(plan), costs_(costs), result_(result) {
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
        charge.duration = costs.of(a);
        const int after = plan.stage_after(a);
        charge.crosses = after != kNoStage && shape.rank_of(after, a.microbatch) != shape.rank_of(stage, a.microbatch);
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

}  // namespace pe
