// Virtual time for any plan: the list scheduler, told by events when tasks end and results arrive.
#pragma once

#include "plan/plan.hpp"
#include "simulate/costs.hpp"
#include "simulate/simulator.hpp"

namespace pe {

// Fills all of `result` but what there is by rank of times. Throws PlanError if the plan cannot end.
void simulate_events(const Plan& plan, const Costs& costs, Simulation& result);

}  // namespace pe
