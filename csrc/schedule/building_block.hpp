// Orders of the V placement made from a building block: what one microbatch does, in slots of one pass each,
// repeated every six slots, with W where a rank is idle. Qi et al., Pipeline Parallelism with Controllable
// Memory, 2024.
#pragma once

#include <array>
#include <functional>

#include "plan/order.hpp"

namespace pe {

// On one rank, the slots in which the first microbatch has F of chunk 0 and of chunk 1, I of chunk 1 and of
// chunk 0.
using Block = std::array<int, 4>;

// While the first microbatches come in and the last go out, there is idle time between the blocks: ranks go
// on then with what is ready, F with no more than `most` half chunks held, and W when nothing else is.
Order order_of_blocks(int num_ranks, int microbatches, int most, const std::function<Block(int rank)>& block);

}  // namespace pe
