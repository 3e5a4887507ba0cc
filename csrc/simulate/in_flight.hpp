// How many microbatches each stage may hold, where results leave in groups or the caller sets a limit.
//
// A group's results wait for its last, so the stages upstream must hold more. By how much is simulated.
#pragma once

#include <vector>

#include "plan/plan.hpp"

namespace pe {

// A schedule on its ranks, before it is settled how many microbatches a stage may hold.
struct Draft {
  Order order;
  Shape shape;
  std::vector<int> limits;       // slots by stage, where results leave one by one
  std::vector<Kind> preference;  // of a rank among its ready tasks; empty: the order alone decides
};

// What the caller says of them, by stage.
struct Slots {
  std::vector<int> most{};  // empty: as many as the schedule needs
  std::vector<int> room{};  // at least so many, within `most`, though fewer would do; empty: none

  bool given() const { return !most.empty() || !room.empty(); }
};

struct Settled {
  // As simulated with equal stages, a rank running one task at a time; pairs come apart where it changes.
  Order order;
  std::vector<int> limits;
};

// The smallest limits that `slots` allow with which packing costs no more time than it must. Throws PlanError,
// naming the limit it would take, if with those of `slots.most` the step would never end.
Settled settle(Draft draft, const Packs& packs, const Slots& slots);

}  // namespace pe
