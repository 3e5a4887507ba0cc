// Makes plans from schedules. A rule becomes an order by simulation.
#pragma once

#include <vector>

#include "plan/plan.hpp"
#include "schedule/schedule.hpp"
#include "simulate/in_flight.hpp"

namespace pe {

// Throws PlanError, which names the schedule, if it cannot place the stages.
Placement place(const Schedule& schedule, int num_stages, int num_ranks);

// Throws PlanError if the schedule cannot place `num_stages` on `num_ranks`, or if the step would never end
// with the given slots.
Plan make_plan(const Schedule& schedule, int num_stages, int num_ranks, int microbatches, PlanOptions options,
               const Slots& slots = {});

// Checks the order and that it ends. The order may change only if the plan is reactive and has packs or
// `slots`. Throws PlanError if the order may not change and does not end, or needs more slots.
Plan make_plan(const Order& order, PlanOptions options, const Slots& slots = {});

// A plan of all `F`, and nothing else, microbatch by microbatch. Throws PlanError for numbers that do not fit.
Plan make_forward_plan(const std::vector<int>& rank_of_stage, int num_ranks, int microbatches,
                       bool overlap = false, std::vector<Skip> skips = {}, bool reactive = true);

}  // namespace pe
