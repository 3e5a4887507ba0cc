// What ZB-H1 and ZB-H2 share: one F and one I in turn, each W a fixed number of I after its own.
#pragma once

#include <vector>

#include "plan/action.hpp"

namespace pe {

// `ahead` F come before the first I, and W of a microbatch after the I of the `late`-th one after it.
std::vector<Action> zero_bubble_order(int stage, int ahead, int late, int microbatches);

}  // namespace pe
