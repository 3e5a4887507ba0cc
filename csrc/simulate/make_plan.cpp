#include "simulate/make_plan.hpp"

#include <algorithm>
#include <string>
#include <utility>

#include "plan/interrupt.hpp"
#include "plan/size.hpp"
#include "schedule/list_scheduler.hpp"
#include "simulate/in_flight.hpp"

namespace pe {
namespace {

void check(const Packs& packs, const Shape& shape) {
  const auto check_pack = [&](const char* what, int k) {
    if (k >= 1 && k <= shape.num_microbatches) return;
    throw PlanError(std::string(what) + " packs hold " + std::to_string(k) +
                    " microbatches; a message holds from 1 to all " + std::to_string(shape.num_microbatches));
  };
  const auto check_one = [&](const char* what, const std::vector<int>& ks) {
    if (ks.empty()) return;
    if (static_cast<int>(ks.size()) != shape.num_stages - 1) {
      throw PlanError(std::string(what) + " packs are given for " + std::to_string(ks.size()) +
                      " boundaries; there are " + std::to_string(shape.num_stages - 1));
    }
    for (const int k : ks) check_pack(what, k);
  };
  check_one("forward", packs.forward);
  check_one("backward", packs.backward);
  for (const Skip& skip : packs.skips) {
    if (skip.source < 0 || skip.source >= skip.target || skip.target >= shape.num_stages) {
      throw PlanError("a skip goes from stage " + std::to_string(skip.source) + " to stage " +
                      std::to_string(skip.target) + "; it goes to a later one of the stages 0 to " +
                      std::to_string(shape.num_stages - 1));
    }
    check_pack("skips' forward", skip.forward);
    check_pack("skips' backward", skip.backward);
  }
}

void check(const Slots& slots, const Shape& shape) {
  for (const std::vector<int>* given : {&slots.most, &slots.room}) {
    if (given->empty()) continue;
    if (static_cast<int>(given->size()) != shape.num_stages) {
      throw PlanError("limits of microbatches in flight are given for " + std::to_string(given->size()) +
                      " stages; there are " + std::to_string(shape.num_stages));
    }
    for (const int limit : *given) {
      if (limit < 1) {
        throw PlanError(std::to_string(limit) +
                        " microbatches in flight are too few; a stage holds at least 1");
      }
    }
  }
}

void check(const Rule& rule) {
  std::vector<Kind> kinds = rule.preference;
  std::sort(kinds.begin(), kinds.end());
  if (kinds == std::vector{Kind::F, Kind::B} || kinds == std::vector{Kind::F, Kind::I, Kind::W}) return;
  throw PlanError("a rule prefers F and B, or F, I and W, each once and in any order");
}

Draft draft_of(const Rule& rule, const Placement& placement, const Shape& shape) {
  Draft draft{Order(placement.num_ranks), shape, {}, rule.preference};
  for (int s = 0; s < shape.num_stages; ++s) {
    check_interrupt();
    draft.limits.push_back(rule.limit(placement, s, shape.num_microbatches));
    for (const Kind kind : {Kind::F, Kind::B, Kind::I, Kind::W}) {
      const auto& kinds = rule.preference;
      if (std::find(kinds.begin(), kinds.end(), kind) == kinds.end()) continue;
      for (int m = 0; m < shape.num_microbatches; ++m) {
        draft.order[placement.rank_of_stage[s]].push_back({s, m, kind});
      }
    }
  }
  return draft;
}

Draft draft_of(const Order& order, const Shape& shape) {
  return {order, shape, peak_in_flight(order, shape).of_stage, {}};
}

Order order_of(const Schedule& schedule, const Placement& placement, int microbatches) {
  if (const auto* whole = std::get_if<OrderOfRanks>(&schedule.policy)) return (*whole)(placement, microbatches);
  Order order;
  for (int rank = 0; rank < placement.num_ranks; ++rank) {
    check_interrupt();
    order.push_back(std::get<OrderOfRank>(schedule.policy)(placement, rank, microbatches));
  }
  return order;
}

bool sends_explicitly(const Order& order) {
  for (const auto& actions : order) {
    for (const Action& a : actions) {
      if (a.kind == Kind::SendF || a.kind == Kind::SendB) return true;
    }
  }
  return false;
}

// Reactive ranks look ahead if the order ends as planned. Otherwise they run whatever is ready.
Plan plan_of(const Order& order, const Shape& shape, PlanOptions options, const std::vector<int>& limits = {}) {
  options.looks_ahead = options.reactive;
  Plan plan(order, shape, options, limits);
  if (!options.looks_ahead || ends_as_planned(plan)) return plan;
  options.looks_ahead = false;
  return Plan(order, shape, std::move(options), limits);
}

// Changes the order if packs or the caller's limits require it.
Plan settled_plan(const Order& order, const Shape& shape, const PlanOptions& options, const Slots& slots) {
  const Settled settled = settle(draft_of(order, shape), options.packs, slots);
  Plan plan = plan_of(settled.order, shape, options, settled.limits);
  check_ends(plan);
  return plan;
}

// Throws PlanError if `plan`, in the given order, holds more than `slots` allow or would never end.
void check_kept(const Plan& plan, const Slots& slots) {
  for (std::size_t s = 0; s < slots.most.size(); ++s) {
    const int holds = plan.limits()[s];
    if (holds > slots.most[s]) {
      throw PlanError("the order given holds " + std::to_string(holds) + " microbatches at stage " +
                      std::to_string(s) + ", in_flight allows " + std::to_string(slots.most[s]) +
                      "; give another order, allow more, or let ranks change it with reactive=True");
    }
  }
  if (plan.options().packs.any() && !ends(plan)) {
    check_ends(Plan(plan.order(), plan.shape(), {plan.options().overlap, plan.options().reactive}));
    throw PlanError(
        "in exactly the order given the step would never end, because results that leave together "
        "wait for one another; pack fewer, give another order, or let ranks change it with "
        "reactive=True");
  }
  check_ends(plan);
}

}  // namespace

Placement place(const Schedule& schedule, int num_stages, int num_ranks) {
  check_size(num_stages, num_ranks, 1);
  try {
    return place(schedule.layout, num_stages, num_ranks);
  } catch (const PlanError& error) {
    throw PlanError("'" + schedule.name + "' " + error.what());
  }
}

Plan make_plan(const Schedule& schedule, int num_stages, int num_ranks, int microbatches, PlanOptions options,
               const Slots& slots) {
  check_size(num_stages, num_ranks, microbatches);
  const Placement placement = place(schedule, num_stages, num_ranks);
  const Shape shape = shape_of(placement, microbatches);
  check(options.packs, shape);
  check(slots, shape);
  if (options.memory.limited()) options.memory.validate(num_stages, num_ranks);
  if (const Rule* rule = std::get_if<Rule>(&schedule.policy)) {
    check(*rule);
    const Draft draft = draft_of(*rule, placement, shape);
    Settled settled = settle(draft, options.packs, slots);
    for (int s = 0; options.overlap && s < num_stages; ++s) {
      // One more slot: a microbatch runs forward while another runs backward.
      const int most = slots.most.empty() ? microbatches : std::min(slots.most[s], microbatches);
      settled.limits[s] = std::min(settled.limits[s] + 1, std::max(most, settled.limits[s]));
    }
    // From here on the planned order decides, also for reactive ranks: if they followed the preference instead,
    // 1F1B would be a tenth slower when times vary.
    return plan_of(settled.order, shape, std::move(options), settled.limits);
  }
  const Order order = order_of(schedule, placement, microbatches);
  if (options.packs.any() || slots.given()) return settled_plan(order, shape, options, slots);
  Plan plan = plan_of(order, shape, std::move(options));
  check_ends(plan);
  return plan;
}

Plan make_plan(const Order& order, PlanOptions options, const Slots& slots) {
  const Shape shape = validate(order);
  check(options.packs, shape);
  check(slots, shape);
  if (options.memory.limited()) options.memory.validate(shape.num_stages, static_cast<int>(order.size()));
  if (options.packs.any() && sends_explicitly(order)) {
    throw PlanError(
        "the schedule lists its sends, one for each result, so that none leave together; leave "
        "out SEND and RECV, or pack=1, of skips too");
  }
  if (options.reactive && (options.packs.any() || slots.given())) {
    return settled_plan(order, shape, options, slots);
  }
  Plan plan = plan_of(order, shape, std::move(options));
  check_kept(plan, slots);
  return plan;
}

Plan make_forward_plan(const std::vector<int>& rank_of_stage, int num_ranks, int microbatches, bool overlap,
                       std::vector<Skip> skips, bool reactive) {
  check_size(static_cast<std::int64_t>(rank_of_stage.size()), num_ranks, microbatches);
  check_ranks(rank_of_stage, num_ranks);
  const int num_stages = static_cast<int>(rank_of_stage.size());
  const Shape shape{num_stages, microbatches, false, rank_of_stage};
  const Packs packs{{}, {}, std::move(skips)};
  check(packs, shape);
  Order order(num_ranks);
  for (int m = 0; m < microbatches; ++m) {
    check_interrupt(m);
    for (int s = 0; s < num_stages; ++s) order[rank_of_stage[s]].push_back({s, m, Kind::F});
  }
  return Plan(order, shape, {overlap, reactive, packs});
}

}  // namespace pe
