// What DualPipe and DualPipeV share: a rank that holds two chunks runs F of one beside B of the other.
#pragma once

#include <vector>

#include "schedule/two_chunks.hpp"

namespace pe {

// What the rank `rank` steps from the outermost does, of `depth` in a row whose chunks 0 flow inward and whose
// chunks 1 flow outward.
std::vector<Action> dual_pipe_order(int depth, int rank, const Chunk& inward, const Chunk& outward);

}  // namespace pe
