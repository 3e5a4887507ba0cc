// The list scheduler under a virtual clock: computes when each task would run.
#pragma once

#include <vector>

#include "plan/plan.hpp"
#include "simulate/costs.hpp"

namespace pe {

struct Simulation {
  double makespan = 0;
  std::vector<double> begin;          // by task
  std::vector<double> stretched_end;  // by task, if contention stretched tasks; else empty
  std::vector<double> busy;           // by rank: time in which at least one of its tasks runs
  std::vector<double> first_start;    // by rank: when its first task begins
  std::vector<double> finish;         // by rank: when its last task ends
  std::vector<double> peak_memory;    // by rank
  std::vector<int> peak_in_flight;    // by rank
  std::vector<int> peak_in_flight_of_stage;
  std::size_t working_bytes = 0;  // memory of the simulation without the plan, with its result

  double bubble_of(int rank) const { return makespan > 0 ? 1.0 - busy[rank] / makespan : 0.0; }
  double bubble() const;         // mean over ranks
  double bubble_latest() const;  // of the rank that finishes last
  // Of the rank with the longest span from its own first start to its finish, as a share of that span.
  double bubble_from_first_start() const;
};

// Throws PlanError if the costs do not fit the plan, if the plan cannot end, or if its planned order exceeds a
// memory limit. `apart`: ranks are processes, and one that looks ahead knows of the others only the results
// that it has got. `by_events`: use the event clock even for a plan that runs in order, so that tests can
// compare the clocks.
Simulation simulate(const Plan& plan, const Costs& costs, bool by_events = false, bool apart = false);

// When each task ends. Throws PlanError if the times are of another plan, or the costs do not fit this one.
std::vector<double> end_times(const Plan& plan, const Costs& costs, const Simulation& simulation);

// Each rank's tasks in the order they began, ties in planned order. Pairs that did not run as one become
// single. Throws PlanError if the times are of another plan.
Order order_of(const Plan& plan, const Simulation& simulation);

}  // namespace pe
