// From a schedule to a plan. A rule becomes an order by simulating it.
#pragma once

#include <vector>

#include "plan/plan.hpp"
#include "schedule/schedule.hpp"
#include "simulate/in_flight.hpp"

namespace pe {

// Throws PlanError, naming the schedule, where it cannot place the stages so.
Placement place(const Schedule& schedule, int num_stages, int num_ranks);

// Throws PlanError where the schedule cannot place `num_stages` on `num_ranks`, or the step would never end
// with so few slots.
Plan make_plan(const Schedule& schedule, int num_stages, int num_ranks, int microbatches, PlanOptions options,
               const Slots& slots = {});

// The order is validated and shown to end. It is kept, unless the plan is reactive, and results leave together
// or `slots` are given. Throws PlanError where it must be kept and does not end so, or needs more slots.
Plan make_plan(const Order& order, PlanOptions options, const Slots& slots = {});

// Every F and nothing else, microbatch by microbatch.
Plan make_forward_plan(const std::vector<int>& rank_of_stage, int num_ranks, int microbatches,
                       bool overlap = false, std::vector<Skip> skips = {}, bool reactive = true);

}  // namespace pe
