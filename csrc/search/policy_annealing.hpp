// Random policies, and annealing of policies.
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

// Runs a policy, made for another number of microbatches perhaps; nothing if it deadlocks.
std::optional<RatedPolicy> rate(const Problem& problem, Policy policy);

// Varies `start`; stops early once `ends(best)` is true.
RatedPolicy anneal(const Problem& problem, RatedPolicy start, long rounds, Random random,
                   const std::function<bool(const Score&)>& ends);

}  // namespace pe
