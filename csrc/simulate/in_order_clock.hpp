// Virtual time for ranks that run in order. Gives the same times as the event-driven clock, faster.
#pragma once

#include "plan/plan.hpp"
#include "simulate/costs.hpp"
#include "simulate/simulator.hpp"

namespace pe {

// For a plan that runs_in_order(). Fills `result` except for the memory; returns false if the plan cannot end.
bool simulate_in_order(const Plan& plan, const Costs& costs, Simulation& result);

}  // namespace pe
