#include "simulate/make_plan.hpp"

#include <string>

#include "schedule/list_scheduler.hpp"
#include "simulate/simulator.hpp"

namespace pe {
namespace {

Placement place(const Schedule& schedule, int num_stages, int num_ranks) {
  const auto refuse = [&](const std::string& need) {
    throw PlanError("'" + schedule.name + "' " + need + ", got " + std::to_string(num_stages) +
                    " stages on " + std::to_string(num_ranks) + " ranks");
  };
  if (!schedule.looped) {
    if (num_stages != num_ranks) refuse("holds exactly one stage on each rank");
    return linear_placement(num_stages);
  }
  if (num_stages % num_ranks != 0) refuse("holds the same number of stages on each rank");
  return looped_placement(num_stages, num_ranks);
}

// The order a rule leads to when all stages cost the same.
Order order_of_rule(const Rule& rule, const Placement& placement, const Shape& shape,
                    const std::vector<int>& limits, PlanOptions options) {
  Order listed(placement.num_ranks);
  for (int s = 0; s < shape.num_stages; ++s) {
    for (const Kind kind : {Kind::F, Kind::B}) {
      for (int m = 0; m < shape.num_microbatches; ++m) {
        listed[placement.rank_of_stage[s]].push_back({s, m, kind});
      }
    }
  }
  options.reactive = true;
  const Plan plan(listed, shape, options, limits, rule.preference);
  return order_of(plan, simulate(plan, Costs::uniform(shape.num_stages)));
}

}  // namespace

Plan make_plan(const Schedule& schedule, int num_stages, int num_ranks, int microbatches,
               PlanOptions options) {
  const Placement placement = place(schedule, num_stages, num_ranks);
  const Shape shape{num_stages, microbatches, true, placement.rank_of_stage};
  if (const Rule* rule = std::get_if<Rule>(&schedule.policy)) {
    std::vector<int> limits;
    for (int s = 0; s < num_stages; ++s) limits.push_back(rule->limit(placement, s, microbatches));
    // The published order runs one task of a rank at a time, whatever the streams may do later.
    const Order order = order_of_rule(*rule, placement, shape, limits, {});
    return Plan(order, shape, options, limits, rule->preference);
  }
  Order order;
  for (int rank = 0; rank < num_ranks; ++rank) {
    order.push_back(std::get<OrderOfRank>(schedule.policy)(placement, rank, microbatches));
  }
  Plan plan(order, shape, options);
  check_ends(plan);
  return plan;
}

Plan make_plan(const Order& order, PlanOptions options) {
  const Shape shape = validate(order);
  Plan plan(order, shape, options);
  check_ends(plan);
  return plan;
}

Plan make_forward_plan(const std::vector<int>& rank_of_stage, int num_ranks, int microbatches,
                       bool overlap) {
  const int num_stages = static_cast<int>(rank_of_stage.size());
  Order order(num_ranks);
  for (int m = 0; m < microbatches; ++m) {
    for (int s = 0; s < num_stages; ++s) order[rank_of_stage[s]].push_back({s, m, Kind::F});
  }
  return Plan(order, {num_stages, microbatches, false, rank_of_stage}, {overlap, true});
}

}  // namespace pe
