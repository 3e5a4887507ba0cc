#include "simulate/in_flight.hpp"

#include <algorithm>
#include <limits>
#include <string>
#include <utility>

#include "schedule/list_scheduler.hpp"
#include "simulate/simulator.hpp"

namespace pe {
namespace {

constexpr double kNever = std::numeric_limits<double>::infinity();
constexpr double kNoLonger = 1.001;

Plan plan_of(const Draft& draft, const Packs& packs, const std::vector<int>& limits) {
  return Plan(draft.order, draft.shape, {.reactive = true, .packs = packs}, limits, draft.preference);
}

double makespan(const Draft& draft, const Packs& packs, const std::vector<int>& limits) {
  const Plan plan = plan_of(draft, packs, limits);
  return ends(plan) ? simulate(plan, Costs::uniform(plan.num_stages())).makespan : kNever;
}

// How many stages, from the first, are upstream of a packed boundary or of the end of a packed skip: they wait
// for its packs.
int num_delayed(const Draft& draft, const Packs& packs) {
  const std::vector<int>& ranks = draft.shape.rank_of_stage;
  int delayed = 0;
  for (int b = 0; b + 1 < draft.shape.num_stages; ++b) {
    const bool packed = packs.of(Kind::F, b) > 1 || packs.of(Kind::B, b) > 1;
    if (packed && ranks[b] != ranks[b + 1]) delayed = b + 1;
  }
  for (const Skip& skip : packs.skips) {
    const bool packed = skip.forward > 1 || skip.backward > 1;
    if (packed && ranks[skip.source] != ranks[skip.target]) delayed = std::max(delayed, skip.target);
  }
  return delayed;
}

// The draft's limits, multiplied by `times` for the first `delayed` stages; at most `most` and the number of
// microbatches.
std::vector<int> raised(const Draft& draft, int times, int delayed, const std::vector<int>& most) {
  std::vector<int> limits = draft.limits;
  for (int s = 0; s < draft.shape.num_stages; ++s) {
    const long all = draft.shape.num_microbatches;
    long limit = std::min(static_cast<long>(limits[s]) * (s < delayed ? times : 1), all);
    if (!most.empty()) limit = std::min<long>(limit, most[s]);
    limits[s] = static_cast<int>(limit);
  }
  return limits;
}

// The smallest number from 1 to `last` for which `holds` is true, given that it is then true for all larger
// ones.
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

// With packs or a changed order, the parts of a pair might wait for one another.
void take_pairs_apart(Order& order) {
  for (auto& actions : order) {
    for (Action& a : actions) a.joins_next = false;
  }
}

// Whether an order that need not change takes less time than the one in which ranks react with more room.
bool is_shorter_as_given(const Draft& draft, const Packs& packs, const Slots& slots, double makespan) {
  if (packs.any() || !slots.most.empty() || !draft.preference.empty()) return false;
  const Plan given(draft.order, draft.shape, {});
  return ends(given) && simulate(given, Costs::uniform(given.num_stages())).makespan < makespan / kNoLonger;
}

[[noreturn]] void refuse(const Draft& draft, const Packs& packs, const std::vector<int>& most) {
  const int num_stages = draft.shape.num_stages;
  const int needed = smallest(draft.shape.num_microbatches, [&](int limit) {
    return ends(plan_of(draft, packs, std::vector<int>(num_stages, limit)));
  });
  // The stages whose limit is too small even if all others have what is needed.
  std::vector<int> limits(num_stages, needed);
  std::string tight;
  for (int s = 0; s < num_stages; ++s) {
    limits[s] = most[s];
    if (ends(plan_of(draft, packs, limits))) continue;
    limits[s] = needed;
    tight += (tight.empty() ? "" : ", ") + std::to_string(most[s]) + " at stage " + std::to_string(s);
  }
  const char* why = packs.any() ? "results that leave together wait for one another" : "its order needs more";
  const char* or_else = packs.any() ? ", or pack fewer" : ", or give another order";
  throw PlanError("with so few microbatches in flight (" + tight + ") the step would never end, because " +
                  why + "; allow " + std::to_string(needed) + " in flight at each stage" + or_else);
}

}  // namespace

Settled settle(Draft draft, const Packs& packs, const Slots& slots) {
  for (std::size_t s = 0; s < slots.room.size(); ++s) {
    draft.limits[s] = std::max(draft.limits[s], slots.room[s]);
  }
  const int delayed = num_delayed(draft, packs);
  const auto limits_of = [&](int times) { return raised(draft, times, delayed, slots.most); };
  int times = 1;
  if (delayed > 0 || !slots.most.empty()) {
    const int all = draft.shape.num_microbatches;
    const double best = makespan(draft, packs, limits_of(all));
    if (best == kNever) {
      // Where no limit helps, this throws, and says which tasks wait for one another.
      simulate(plan_of(draft, packs, std::vector<int>(draft.shape.num_stages, all)),
               Costs::uniform(draft.shape.num_stages));
      refuse(draft, packs, slots.most.empty() ? limits_of(all) : slots.most);
    }
    times = smallest(all, [&](int n) { return makespan(draft, packs, limits_of(n)) <= kNoLonger * best; });
  }
  const std::vector<int> allowed = limits_of(times);
  const Plan plan = plan_of(draft, packs, allowed);
  const Simulation simulation = simulate(plan, Costs::uniform(plan.num_stages()));
  if (is_shorter_as_given(draft, packs, slots, simulation.makespan)) return {std::move(draft.order), allowed};
  std::vector<int> limits = simulation.peak_in_flight_of_stage;
  for (std::size_t s = 0; s < slots.room.size(); ++s) {
    limits[s] = std::max(limits[s], std::min(slots.room[s], allowed[s]));
  }
  Order order = order_of(plan, simulation);
  if (packs.any() || order != draft.order) take_pairs_apart(order);
  return {std::move(order), limits};
}

}  // namespace pe
