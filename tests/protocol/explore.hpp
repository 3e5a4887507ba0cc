// Goes through all states of a world: depth first, each state once.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "protocol/world.hpp"

namespace world {

struct Explored {
  std::size_t states = 0;
  std::size_t transitions = 0;
  std::size_t ends = 0;            // states in which all threads have ended
  std::size_t longest = 0;         // transitions from the first state
  std::string violation;           // empty: every property holds in every state
  std::vector<std::string> trace;  // how it came about
};

// `prepare` puts `watched` into its first state; then `body` is the first thread. Besides what the body checks:
// - some thread can go on in each state that is not an end, without a limit of time that passes;
// - from each state an end can be reached.
// Stops at `most_states`, which is a violation.
Explored explore(const Rules& rules, const std::function<void()>& prepare, const std::function<void()>& body,
                 std::span<std::byte> watched, std::size_t most_states);

}  // namespace world
