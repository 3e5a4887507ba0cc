// How many microbatches each stage may hold, if results are packed or the caller sets limits.
//
// The results of a pack wait for its last one, so the stages upstream must hold more. How many is found by
// simulation.
#pragma once

#include <vector>

#include "plan/plan.hpp"

namespace pe {

// A placed schedule whose limits of microbatches in flight are not final.
struct Draft {
  Order order;
  Shape shape;
  std::vector<int> limits;       // slots by stage, without packing
  std::vector<Kind> preference;  // among a rank's ready tasks; empty: the order decides
};

// The caller's limits, by stage.
struct Slots {
  std::vector<int> most{};  // at most this many; empty: as many as the schedule needs
  std::vector<int> room{};  // at least this many, within `most`, even if fewer suffice; empty: none

  bool given() const { return !most.empty() || !room.empty(); }
};

struct Settled {
  // The order in a simulation with equal stages and one task at a time per rank. If it changed, it has no
  // pairs.
  Order order;
  std::vector<int> limits;
};

// Finds the smallest limits within `slots` that make the step no slower than the largest ones do. Throws
// PlanError, which names the limit needed, if the step would never end within `slots.most`.
Settled settle(Draft draft, const Packs& packs, const Slots& slots);

}  // namespace pe
