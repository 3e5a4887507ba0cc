// Policies drawn at random, and varied.
#pragma once

#include <functional>
#include <optional>

#include "search/annealing.hpp"
#include "search/greedy.hpp"

namespace pe {

struct RatedPolicy {
  Policy policy;
  Score score;
};

Policy random_policy(const Problem& problem, Random& random);

// With the limits that another number of microbatches allows.
std::optional<RatedPolicy> rate(const Problem& problem, Policy policy);

// From `start` on; ends early where `ends(best)` says so.
RatedPolicy anneal(const Problem& problem, RatedPolicy start, long rounds, Random random,
                   const std::function<bool(const Score&)>& ends);

}  // namespace pe
