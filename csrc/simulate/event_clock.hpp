// Virtual time for any plan: drives the list scheduler with events, the ends of tasks and the arrivals of
// results.
#pragma once

#include "plan/plan.hpp"
#include "simulate/costs.hpp"
#include "simulate/simulator.hpp"

namespace pe {

// Fills `result` except for `busy`, `first_start` and `finish`; `apart` as in simulate(). Throws PlanError if
// the plan cannot end.
void simulate_events(const Plan& plan, const Costs& costs, Simulation& result, bool apart);

}  // namespace pe
