// Random times: a factor for each action that depends only on the action and a seed, so that different
// schedules can be compared under the same noise.
#pragma once

#include <cstdint>

#include "plan/action.hpp"

namespace pe {

struct Noise {
  double cv = 0;  // coefficient of variation; 0: none
  std::uint64_t seed = 0;

  // Log-normal with mean 1.
  double factor(const Action& action) const;
};

}  // namespace pe
