// A lower bound on the time of a training step on given ranks, whatever the order.
#pragma once

#include <vector>

#include "simulate/costs.hpp"

namespace pe {

struct LowerBound {
  double makespan = 0;
  double span = 0;  // the largest time, over ranks, from a rank's own first start to its finish
};

// For a step with backwards, full or split, on ranks that run one task at a time and send each result alone.
// Throws PlanError if the costs do not fit.
LowerBound lower_bound(const std::vector<int>& rank_of_stage, int num_ranks, int microbatches,
                       const Costs& costs);

}  // namespace pe
