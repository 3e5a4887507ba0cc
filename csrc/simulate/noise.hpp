// Times that vary: a factor for each action, which depends on nothing but the action and a seed, so that runs
// of it in different modes can be compared in pairs.
#pragma once

#include <cstdint>

#include "plan/action.hpp"

namespace pe {

struct Noise {
  double cv = 0;  // coefficient of variation; 0: none
  std::uint64_t seed = 0;

  // Log-normal, of mean 1.
  double factor(const Action& action) const;
};

}  // namespace pe
