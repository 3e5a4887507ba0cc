// The memory of a rank that a microbatch occupies, from its `F` until `I`, `W` or `B` has freed it.
#pragma once

#include <vector>

#include "plan/action.hpp"

namespace pe {

class Plan;

struct Memory {
  // All in the same unit. `I` frees its part and `W` the rest; `B` frees everything.
  std::vector<double> taken;                // by stage, at `F`
  std::vector<double> freed_by_input_grad;  // by stage; empty: none
  std::vector<double> limit;                // by rank; empty: none

  bool limited() const { return !limit.empty(); }
  // Whether `rank` may hold this much. Allows for rounding: sums of the same numbers differ in their last bits.
  bool allows(int rank, double held) const { return !limited() || held <= limit[rank] * (1 + 1e-9); }

  // Throws PlanError unless there is one finite, non-negative number for each stage and rank.
  void validate(int num_stages, int num_ranks) const;

  // The memory of one microbatch at `stage` that `kind` takes when it begins, or frees when it ends.
  double takes(Kind kind, int stage) const { return kind == Kind::F ? taken[stage] : 0.0; }
  double frees(Kind kind, int stage, bool has_backward) const {
    const double by_input_grad = freed_by_input_grad.empty() ? 0.0 : freed_by_input_grad[stage];
    switch (kind) {
      case Kind::F:
        return has_backward ? 0.0 : taken[stage];
      case Kind::B:
        return taken[stage];
      case Kind::I:
        return by_input_grad;
      case Kind::W:
        return taken[stage] - by_input_grad;
      default:
        return 0.0;
    }
  }
};

// Throws PlanError unless `values`, named `what`, hold one finite, non-negative number for each of `of_what`.
void check_charges(const char* what, const std::vector<double>& values, int expected, const char* of_what);

// By rank, the most memory it holds if all ranks run their cells as planned. Throws PlanError if that exceeds a
// limit: the message names the first such cell, what the rank would hold and its limit, and a table marks the
// cell.
std::vector<double> peak_memory(const Plan& plan, const Memory& memory);

}  // namespace pe
