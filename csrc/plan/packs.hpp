// How many microbatches' results leave together, in one message, across each boundary.
#pragma once

#include <algorithm>
#include <vector>

#include "plan/action.hpp"

namespace pe {

struct Packs {
  std::vector<int> forward;   // K of activations, by boundary (stage s to s + 1); empty: 1 everywhere
  std::vector<int> backward;  // K of gradients, by boundary

  // K of what `kind` sends across `boundary`.
  int of(Kind kind, int boundary) const {
    const std::vector<int>& packs = kind == Kind::F ? forward : backward;
    return packs.empty() ? 1 : packs[boundary];
  }

  bool any() const {
    const auto packed = [](int k) { return k > 1; };
    return std::any_of(forward.begin(), forward.end(), packed) ||
           std::any_of(backward.begin(), backward.end(), packed);
  }
};

}  // namespace pe
