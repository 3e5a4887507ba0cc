// Orders for the V placement that repeat a building block: the passes of one microbatch, each in a time slot.
// The block is repeated every six slots, and `W` runs where a rank would be idle. Qi et al., Pipeline
// Parallelism with Controllable Memory, 2024.
#pragma once

#include <array>
#include <functional>

#include "plan/order.hpp"

namespace pe {

// On one rank, the time slots of the first microbatch's `F` of chunk 0, `F` of chunk 1, `I` of chunk 1 and `I`
// of chunk 0.
using Block = std::array<int, 4>;

// While the pipeline fills and drains there is idle time between the blocks. Then a rank runs what is ready:
// `F` as long as it holds at most `most` half chunks, and `W` if nothing else is ready.
Order order_of_blocks(int num_ranks, int microbatches, int most, const std::function<Block(int rank)>& block);

}  // namespace pe
