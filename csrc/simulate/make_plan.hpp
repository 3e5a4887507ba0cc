// From a schedule to a plan. A rule becomes an order by simulating it.
#pragma once

#include <vector>

#include "plan/plan.hpp"
#include "schedule/schedule.hpp"

namespace pe {

// `most_in_flight` are slots by stage, empty: as many as the schedule needs. Throws PlanError where the
// schedule cannot place `num_stages` on `num_ranks`, or the step would never end with so few slots.
Plan make_plan(const Schedule& schedule, int num_stages, int num_ranks, int microbatches,
               PlanOptions options, const std::vector<int>& most_in_flight = {});

// The order is validated and shown to end. It is kept, unless results leave together or `most_in_flight` is
// given, and the plan is reactive or the order would not end so.
Plan make_plan(const Order& order, PlanOptions options,
               const std::vector<int>& most_in_flight = {});

// Every F and nothing else, microbatch by microbatch.
Plan make_forward_plan(const std::vector<int>& rank_of_stage, int num_ranks, int microbatches,
                       bool overlap = false);

}  // namespace pe
