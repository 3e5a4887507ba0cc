// Annealing of sequences, token by token.
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

// The better of `tokens` unchanged, and their `F` and `I` with the best slack; nothing if neither ends.
std::optional<RatedSequence> sequence_of(const Problem& problem, const Tokens& tokens);

// Varies `start`; stops early once `ends(best)` is true.
RatedSequence anneal(const Problem& problem, RatedSequence start, long rounds, Random random,
                     const std::function<bool(const Score&)>& ends);

}  // namespace pe
