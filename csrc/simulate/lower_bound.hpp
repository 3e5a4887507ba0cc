// What no order can beat: a bound from below on how long a step takes on given ranks.
#pragma once

#include <vector>

#include "simulate/costs.hpp"

namespace pe {

struct LowerBound {
  double makespan = 0;
  double span = 0;  // the largest over ranks of the time from a rank's own first start to its finish
};

// Of a step with backwards, whole or split, on ranks that run one task at a time and send each result alone.
// Throws PlanError if the costs do not fit.
LowerBound lower_bound(const std::vector<int>& rank_of_stage, int num_ranks, int microbatches,
                       const Costs& costs);

}  // namespace pe
