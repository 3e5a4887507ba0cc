// Orders for the V placement, built round by round: in each, every rank runs one I and then one F.
//
// After Qi et al., Zero Bubble Pipeline Parallelism (ICLR 2024, and its later revisions on arXiv), who give
// ZB-V's heuristic in outline; stages may cost different times here. Weight gradients go where a rank would
// wait, or where memory demands it; and one may make a rank late where the rank has waited less than others.
#pragma once

#include <vector>

#include "search/problem.hpp"

namespace pe {

// The orders that end, of every way to fill; none unless each rank holds two stages in V shape.
std::vector<Tokens> orders_by_rounds(const Problem& problem);

}  // namespace pe
