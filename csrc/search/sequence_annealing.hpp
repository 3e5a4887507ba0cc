// Sequences of forwards and input gradients, varied token by token.
#pragma once

#include <functional>
#include <optional>

#include "search/annealing.hpp"
#include "search/sequence.hpp"

namespace pe {

struct RatedSequence {
  Sequence sequence;
  Score score;
};

// The better of `tokens` as they are, and their F and I with the slack that serves best; nothing if neither
// ends.
std::optional<RatedSequence> sequence_of(const Problem& problem, const Tokens& tokens);

// From `start` on; ends early where `ends(best)` says so.
RatedSequence anneal(const Problem& problem, RatedSequence start, long rounds, Random random,
                     const std::function<bool(const Score&)>& ends);

}  // namespace pe
