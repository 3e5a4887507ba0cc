// Orders for the V placement, built round by round: in each round every rank runs one `I` and then one `F`.
//
// After Qi et al., Zero Bubble Pipeline Parallelism (ICLR 2024, and later revisions on arXiv), who outline the
// heuristic of ZB-V; here stages may have different times. `W` runs where a rank would wait, or where memory
// requires it. A `W` may also delay a rank that has waited less than others.
#pragma once

#include <vector>

#include "search/problem.hpp"

namespace pe {

// The orders that end, with every rule for filling; none unless each rank holds two stages in V shape.
std::vector<Tokens> orders_by_rounds(const Problem& problem);

}  // namespace pe
