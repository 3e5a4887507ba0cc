// How large a plan may be: what is larger is refused before memory is allocated for it.
#pragma once

#include <cstdint>

namespace pe {

inline constexpr int kMostStages = 1 << 15;  // and ranks
inline constexpr std::int64_t kMostTasks = std::int64_t{1} << 25;

// Throws PlanError unless each number is at least 1, and an `F` and a `B` of each microbatch at each stage are
// no more tasks than a plan holds.
void check_size(std::int64_t num_stages, std::int64_t num_ranks, std::int64_t microbatches);

}  // namespace pe
