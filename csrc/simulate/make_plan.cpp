#include "simulate/make_plan.hpp"

#include <algorithm>
#include <limits>
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

void check(const Packs& packs, const Shape& shape) {
  const auto check_one = [&](const char* what, const std::vector<int>& ks) {
    if (ks.empty()) return;
    if (static_cast<int>(ks.size()) != shape.num_stages - 1) {
      throw PlanError(std::string(what) + " packs are given for " + std::to_string(ks.size()) +
                      " boundaries; there are " + std::to_string(shape.num_stages - 1));
    }
    for (const int k : ks) {
      if (k < 1 || k > shape.num_microbatches) {
        throw PlanError(std::string(what) + " packs hold " + std::to_string(k) +
                        " microbatches; a message holds from 1 to all " +
                        std::to_string(shape.num_microbatches));
      }
    }
  };
  check_one("forward", packs.forward);
  check_one("backward", packs.backward);
}

// A rule on a placement: what it leads to depends on how many microbatches each stage may hold.
class RuleOnRanks {
 public:
  RuleOnRanks(const Rule& rule, const Placement& placement, const Shape& shape, const Packs& packs)
      : rule_(rule), shape_(shape), listed_(placement.num_ranks) {
    options_.reactive = true;
    options_.packs = packs;
    for (int s = 0; s < shape.num_stages; ++s) {
      limits_.push_back(rule.limit(placement, s, shape.num_microbatches));
      for (const Kind kind : {Kind::F, Kind::B}) {
        for (int m = 0; m < shape.num_microbatches; ++m) {
          listed_[placement.rank_of_stage[s]].push_back({s, m, kind});
        }
      }
    }
  }

  // The rule's own limits, `times` as high, within `most` if that is given.
  std::vector<int> limits(int times, const std::vector<int>& most) const {
    std::vector<int> limits = limits_;
    for (int s = 0; s < shape_.num_stages; ++s) {
      const long raised = std::min<long>(static_cast<long>(limits[s]) * times, shape_.num_microbatches);
      limits[s] = static_cast<int>(most.empty() ? raised : std::min<long>(raised, most[s]));
    }
    return limits;
  }

  // The order it leads to when all stages cost the same, as published: a rank runs one task at a time.
  Order order(const std::vector<int>& limits) const {
    const Plan plan = with(limits);
    return order_of(plan, simulate(plan, Costs::uniform(shape_.num_stages)));
  }

  // Infinite if it never ends.
  double makespan(const std::vector<int>& limits) const {
    const Plan plan = with(limits);
    if (!ends(plan)) return std::numeric_limits<double>::infinity();
    return simulate(plan, Costs::uniform(shape_.num_stages)).makespan;
  }

 private:
  Plan with(const std::vector<int>& limits) const {
    return Plan(listed_, shape_, options_, limits, rule_.preference);
  }

  const Rule& rule_;
  const Shape& shape_;
  Order listed_;
  PlanOptions options_;
  std::vector<int> limits_;
};

// The smallest number from 1 to `last` for which `holds` does, if it holds for all larger ones.
template <class Holds>
int smallest(int last, Holds&& holds) {
  int low = 1;
  while (low < last) {
    const int middle = low + (last - low) / 2;
    if (holds(middle)) {
      last = middle;
    } else {
      low = middle + 1;
    }
  }
  return last;
}

// Packing delays the stages upstream, so they must hold more microbatches: the fewest that cost no time.
std::vector<int> limits_for(const RuleOnRanks& rule, const Packs& packs, const Shape& shape,
                            const std::vector<int>& most) {
  if (!packs.any() && most.empty()) return rule.limits(1, most);
  const int all = shape.num_microbatches;
  const double best = rule.makespan(rule.limits(all, most));
  if (best == std::numeric_limits<double>::infinity()) {
    const int needed = smallest(all, [&](int limit) {
      const std::vector<int> uniform(shape.num_stages, limit);
      return rule.makespan(rule.limits(all, uniform)) < std::numeric_limits<double>::infinity();
    });
    throw PlanError("with so few microbatches in flight the step would never end: groups that leave "
                    "together wait for one another; allow " +
                    std::to_string(needed) + " in flight at each stage, or pack fewer");
  }
  return rule.limits(smallest(all,
                              [&](int times) {
                                return rule.makespan(rule.limits(times, most)) <= 1.001 * best;
                              }),
                     most);
}

}  // namespace

Plan make_plan(const Schedule& schedule, int num_stages, int num_ranks, int microbatches,
               PlanOptions options, const std::vector<int>& most_in_flight) {
  const Placement placement = place(schedule, num_stages, num_ranks);
  const Shape shape{num_stages, microbatches, true, placement.rank_of_stage};
  check(options.packs, shape);
  if (const Rule* rule = std::get_if<Rule>(&schedule.policy)) {
    const RuleOnRanks on_ranks(*rule, placement, shape, options.packs);
    const std::vector<int> limits = limits_for(on_ranks, options.packs, shape, most_in_flight);
    return Plan(on_ranks.order(limits), shape, options, limits, rule->preference);
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
  check(options.packs, shape);
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
