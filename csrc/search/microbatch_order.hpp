// Searches for the order in which unequal microbatches enter a step, so that the plan ends soonest.
//
// The plan stays as it is: an order says which of the given microbatches takes each position. Where all
// different orders are few they are all simulated. Otherwise the search starts from sorted orders and varies
// the best by swaps and moves, which are kept unless they make the step longer.
#pragma once

#include <cstdint>
#include <vector>

#include "plan/plan.hpp"
#include "simulate/costs.hpp"

namespace pe {

struct MicrobatchOrder {
  std::vector<int> order;  // by position: a microbatch, as given; equal microbatches keep their order
  double makespan = 0;     // with this order
  double given = 0;        // with the given order
};

// Simulates at most `simulations` orders, and the given one. Returns the given order unless another one is
// shorter. Throws PlanError where `simulate` does.
MicrobatchOrder order_microbatches(const Plan& plan, const Costs& costs, int simulations, std::uint64_t seed);

}  // namespace pe
