// Virtual time for ranks that run in order: begins, ends and arrivals as the event-driven clock would tell.
#pragma once

#include "plan/plan.hpp"
#include "simulate/costs.hpp"
#include "simulate/simulator.hpp"

namespace pe {

// Of a plan that runs_in_order(). Fills all of `result` but the memory; false if the plan cannot end.
bool simulate_in_order(const Plan& plan, const Costs& costs, Simulation& result);

}  // namespace pe
