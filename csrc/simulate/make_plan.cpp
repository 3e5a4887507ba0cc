#include "simulate/make_plan.hpp"

#include <string>

#include "schedule/list_scheduler.hpp"
#include "simulate/in_flight.hpp"

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

void check(const std::vector<int>& most_in_flight, const Shape& shape) {
  if (most_in_flight.empty()) return;
  if (static_cast<int>(most_in_flight.size()) != shape.num_stages) {
    throw PlanError("limits of microbatches in flight are given for " +
                    std::to_string(most_in_flight.size()) + " stages; there are " +
                    std::to_string(shape.num_stages));
  }
  for (const int most : most_in_flight) {
    if (most < 1) {
      throw PlanError("at most " + std::to_string(most) +
                      " microbatches in flight is too few; a stage holds at least 1");
    }
  }
}

Draft draft_of(const Rule& rule, const Placement& placement, const Shape& shape) {
  Draft draft{Order(placement.num_ranks), shape, {}, rule.preference};
  for (int s = 0; s < shape.num_stages; ++s) {
    draft.limits.push_back(rule.limit(placement, s, shape.num_microbatches));
    for (const Kind kind : {Kind::F, Kind::B}) {
      for (int m = 0; m < shape.num_microbatches; ++m) {
        draft.order[placement.rank_of_stage[s]].push_back({s, m, kind});
      }
    }
  }
  return draft;
}

Draft draft_of(const Order& order, const Shape& shape) {
  return {order, shape, peak_in_flight(order, shape), {}};
}

bool sends_explicitly(const Order& order) {
  for (const auto& actions : order) {
    for (const Action& a : actions) {
      if (a.kind == Kind::SendF || a.kind == Kind::SendB) return true;
    }
  }
  return false;
}

// The order may change, where results that leave together or the caller's limits demand it.
Plan settled_plan(const Order& order, const Shape& shape, const PlanOptions& options,
                  const std::vector<int>& most_in_flight) {
  const Settled settled = settle(draft_of(order, shape), options.packs, most_in_flight);
  return Plan(settled.order, shape, options, settled.limits);
}

bool within(const std::vector<int>& limits, const std::vector<int>& most) {
  for (std::size_t s = 0; s < most.size(); ++s) {
    if (limits[s] > most[s]) return false;
  }
  return true;
}

}  // namespace

Plan make_plan(const Schedule& schedule, int num_stages, int num_ranks, int microbatches,
               PlanOptions options, const std::vector<int>& most_in_flight) {
  const Placement placement = place(schedule, num_stages, num_ranks);
  const Shape shape{num_stages, microbatches, true, placement.rank_of_stage};
  check(options.packs, shape);
  check(most_in_flight, shape);
  if (const Rule* rule = std::get_if<Rule>(&schedule.policy)) {
    const Draft draft = draft_of(*rule, placement, shape);
    const Settled settled = settle(draft, options.packs, most_in_flight);
    return Plan(settled.order, shape, options, settled.limits, rule->preference);
  }
  Order order;
  for (int rank = 0; rank < num_ranks; ++rank) {
    order.push_back(std::get<OrderOfRank>(schedule.policy)(placement, rank, microbatches));
  }
  if (options.packs.any() || !most_in_flight.empty()) {
    return settled_plan(order, shape, options, most_in_flight);
  }
  Plan plan(order, shape, options);
  check_ends(plan);
  return plan;
}

Plan make_plan(const Order& order, PlanOptions options, const std::vector<int>& most_in_flight) {
  const Shape shape = validate(order);
  check(options.packs, shape);
  check(most_in_flight, shape);
  if (options.packs.any() && sends_explicitly(order)) {
    throw PlanError("the schedule lists its sends, one for each result, so that none leave together; leave "
                    "out SEND and RECV, or pack=1");
  }
  Plan plan(order, shape, options);
  const bool exact = !options.reactive && within(plan.limits(), most_in_flight) && ends(plan);
  if (!exact && (options.packs.any() || !most_in_flight.empty())) {
    return settled_plan(order, shape, options, most_in_flight);
  }
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
