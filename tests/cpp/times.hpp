// When the simulator runs the tasks of a plan.
#pragma once

#include <utility>

#include "runtime/stream_plan.hpp"
#include "simulate/simulator.hpp"

namespace pe {

inline TaskTimes times_of(const Plan& plan, const Costs& costs) {
  Simulation simulation = simulate(plan, costs);
  std::vector<double> end = end_times(plan, costs, simulation);
  return {std::move(simulation.begin), std::move(end)};
}

}  // namespace pe
