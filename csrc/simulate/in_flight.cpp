#include "simulate/in_flight.hpp"

#include <algorithm>
#include <limits>
#include <string>

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

// The draft's limits `times` over, within `most` and the microbatches there are.
std::vector<int> raised(const Draft& draft, int times, const std::vector<int>& most) {
  std::vector<int> limits = draft.limits;
  for (std::size_t s = 0; s < limits.size(); ++s) {
    const long all = draft.shape.num_microbatches;
    long limit = std::min(static_cast<long>(limits[s]) * times, all);
    if (!most.empty()) limit = std::min<long>(limit, most[s]);
    limits[s] = static_cast<int>(limit);
  }
  return limits;
}

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

[[noreturn]] void refuse(const Draft& draft, const Packs& packs, const std::vector<int>& most) {
  const int needed = smallest(draft.shape.num_microbatches, [&](int limit) {
    const std::vector<int> uniform(draft.shape.num_stages, limit);
    return ends(plan_of(draft, packs, uniform));
  });
  throw PlanError("with at most " + std::to_string(*std::min_element(most.begin(), most.end())) +
                  " microbatches in flight the step would never end, because results that leave together "
                  "wait for one another; allow " +
                  std::to_string(needed) + " in flight at each stage, or pack fewer");
}

}  // namespace

Settled settle(const Draft& draft, const Packs& packs, const std::vector<int>& most) {
  int times = 1;
  if (packs.any() || !most.empty()) {
    const int all = draft.shape.num_microbatches;
    const double best = makespan(draft, packs, raised(draft, all, most));
    if (best == kNever) refuse(draft, packs, most);
    times = smallest(all, [&](int n) {
      return makespan(draft, packs, raised(draft, n, most)) <= kNoLonger * best;
    });
  }
  const Plan plan = plan_of(draft, packs, raised(draft, times, most));
  const Simulation simulation = simulate(plan, Costs::uniform(plan.num_stages()));
  return {order_of(plan, simulation), simulation.peak_in_flight_of_stage};
}

}  // namespace pe
