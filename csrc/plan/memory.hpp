// What a microbatch takes of a rank's memory, from its F until I, W or B have freed it.
#pragma once

#include <vector>

#include "plan/action.hpp"

namespace pe {

class Plan;

struct Memory {
  // In one unit throughout; what I does not free of it goes with W, and all of it with B.
  std::vector<double> taken;                // by stage, by F
  std::vector<double> freed_by_input_grad;  // by stage; empty: none
  std::vector<double> limit;                // by rank; empty: none

  bool limited() const { return !limit.empty(); }
  // Whether `rank` may hold so much: sums of the same numbers differ in their last bits.
  bool allows(int rank, double held) const { return !limited() || held <= limit[rank] * (1 + 1e-9); }

  // Throws PlanError unless there is one finite, non-negative number for each stage and rank.
  void validate(int num_stages, int num_ranks) const;

  // What `kind` takes at its begin, or frees at its end, of the memory of one microbatch of `stage`.
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

// Throws PlanError unless `values`, called `what`, are one finite, non-negative number for each of `of_what`.
void check_charges(const char* what, const std::vector<double>& values, int expected, const char* of_what);

// By rank, the most it holds when all run their cells as planned. Throws PlanError where that exceeds a limit:
// it names the first such cell, what the rank would hold and what is allowed, with a table that marks it.
std::vector<double> peak_memory(const Plan& plan, const Memory& memory);

}  // namespace pe
