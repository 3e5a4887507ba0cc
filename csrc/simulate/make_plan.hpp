// From a schedule to a plan. A rule becomes an order by simulating it.
#pragma once

#include <vector>

#include "plan/plan.hpp"
#include "schedule/schedule.hpp"

namespace pe {

// Throws PlanError where the schedule cannot place `num_stages` on `num_ranks`.
Plan make_plan(const Schedule& schedule, int num_stages, int num_ranks, int microbatches,
               PlanOptions options, const std::vector<int>& most_in_flight = {});

// The order is validated and shown to end.
Plan make_plan(const Order& order, PlanOptions options);

// Every F and nothing else, microbatch by microbatch.
Plan make_forward_plan(const std::vector<int>& rank_of_stage, int num_ranks, int microbatches,
                       bool overlap = false);

}  // namespace pe
