// The list scheduler under a virtual clock: when would each task run?
#pragma once

#include <vector>

#include "plan/plan.hpp"
#include "simulate/costs.hpp"

namespace pe {

struct Simulation {
  double makespan = 0;
  std::vector<double> begin;          // by task
  std::vector<double> stretched_end;  // by task, where tasks took longer than they cost; else empty
  std::vector<double> busy;           // by rank: time in which at least one of its tasks runs
  std::vector<double> first_start;    // by rank: when its first task begins
  std::vector<double> finish;         // by rank: when its last task ends
  std::vector<double> peak_memory;    // by rank
  std::vector<int> peak_in_flight;    // by rank
  std::vector<int> peak_in_flight_of_stage;
  std::size_t working_bytes = 0;  // that the simulation took beside the plan, its result included

  double bubble_of(int rank) const { return makespan > 0 ? 1.0 - busy[rank] / makespan : 0.0; }
  double bubble() const;         // mean over ranks
  double bubble_latest() const;  // of the rank that finishes last
  // Of the rank with the longest span from its own first start to its finish, and relative to that span.
  double bubble_from_first_start() const;
};

// Throws PlanError if the costs do not fit the plan, the plan cannot end, or its planned order exceeds a limit
// of memory. `by_events`: even where the plan needs none, so that tests can compare the two clocks.
Simulation simulate(const Plan& plan, const Costs& costs, bool by_events = false);

// When each task ends.
std::vector<double> end_times(const Plan& plan, const Costs& costs, const Simulation& simulation);

// Each rank's tasks as they began, ties as planned. Pairs are taken apart where they did not run as one.
Order order_of(const Plan& plan, const Simulation& simulation);

}  // namespace pe
