// What ZB-H1 and ZB-H2 share: `F` and `I` alternate, and each `W` runs a fixed number of `I` after its own `I`.
#pragma once

#include <vector>

#include "plan/action.hpp"

namespace pe {

// `ahead` `F` run before the first `I`. `W` of a microbatch runs after the `I` of the microbatch `late` later.
std::vector<Action> zero_bubble_order(int stage, int ahead, int late, int microbatches);

}  // namespace pe
