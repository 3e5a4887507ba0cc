// How many microbatches share one message: across each boundary, and for each skip.
#pragma once

#include <algorithm>
#include <vector>

#include "plan/action.hpp"

namespace pe {

// A tensor that goes from a stage directly to a later, not adjacent one. Its gradient returns the same way.
struct Skip {
  int source = 0;
  int target = 0;
  int forward = 1;   // K of the tensors
  int backward = 1;  // K of their gradients

  friend bool operator==(const Skip&, const Skip&) = default;
};

struct Packs {
  std::vector<int> forward;   // K of activations, by boundary (stage s to s + 1); empty: 1 everywhere
  std::vector<int> backward;  // K of gradients, by boundary
  std::vector<Skip> skips{};

  // K of the results that `kind` sends across `boundary`.
  int of(Kind kind, int boundary) const {
    const std::vector<int>& packs = kind == Kind::F ? forward : backward;
    return packs.empty() ? 1 : packs[boundary];
  }

  bool any() const {
    const auto packed = [](int k) { return k > 1; };
    const auto packs = [](const Skip& skip) { return skip.forward > 1 || skip.backward > 1; };
    return std::any_of(forward.begin(), forward.end(), packed) ||
           std::any_of(backward.begin(), backward.end(), packed) ||
           std::any_of(skips.begin(), skips.end(), packs);
  }
};

}  // namespace pe
