// What the simulator charges for tasks and for results that travel between ranks. One unit of time
// throughout, whichever the caller likes.
#pragma once

#include <algorithm>
#include <vector>

#include "plan/plan.hpp"

namespace pe {

struct Costs {
  std::vector<double> forward;       // by stage
  std::vector<double> backward;      // by stage, the full backward
  std::vector<double> input_grad;    // by stage
  std::vector<double> weight_grad;   // by stage
  std::vector<double> latency;       // by boundary (stage s to s + 1): a result's way to another rank
  double contention = 1.0;           // how much longer a task takes beside one of its rank's other stream

  // F = 1 and B = 2 at every stage, I and W half of B, no latency.
  static Costs uniform(int num_stages);

  // Throws PlanError unless there is one finite, non-negative number for each stage and boundary.
  void validate(int num_stages) const;

  double of(const Action& action) const {
    switch (action.kind) {
      case Kind::F:
        return forward[action.stage];
      case Kind::B:
        return backward[action.stage];
      case Kind::I:
        return input_grad[action.stage];
      case Kind::W:
        return weight_grad[action.stage];
      default:
        return 0.0;
    }
  }

  double latency_between(const Plan& plan, TaskId from, TaskId to) const {
    const int a = plan.action(from).stage;
    const int b = plan.action(to).stage;
    return plan.rank_of_stage(a) == plan.rank_of_stage(b) ? 0.0 : latency[std::min(a, b)];
  }
};

}  // namespace pe
