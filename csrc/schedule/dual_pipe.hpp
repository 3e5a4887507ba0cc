// What DualPipe and DualPipeV share: a rank holds two chunks and overlaps `F` of one with `B` of the other.
#pragma once

#include <vector>

#include "schedule/two_chunks.hpp"

namespace pe {

// The actions of one rank in a row of `depth` ranks; rank 0 is the outermost. Chunk 0 of the ranks flows
// inward, chunk 1 outward.
std::vector<Action> dual_pipe_order(int depth, int rank, const Chunk& inward, const Chunk& outward);

}  // namespace pe
