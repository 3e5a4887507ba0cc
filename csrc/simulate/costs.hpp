// What the simulator charges for tasks and for results that travel between ranks. One unit of time
// throughout, whichever the caller likes.
#pragma once

#include <algorithm>
#include <vector>

#include "plan/plan.hpp"
#include "simulate/noise.hpp"

namespace pe {

struct Costs {
  std::vector<double> forward;      // by stage
  std::vector<double> backward;     // by stage, the full backward
  std::vector<double> input_grad;   // by stage
  std::vector<double> weight_grad;  // by stage
  // Of messages to another rank, by boundary (stage s to s + 1), as in the LogGP model (Alexandrov et al.,
  // SPAA 1995): the way of each; what its sender spends on it; how long each result in it occupies the link.
  // A skip's are charged as what else its sender sends in that direction, and share the link with it.
  std::vector<double> latency;
  std::vector<double> overhead;  // empty: none
  std::vector<double> transfer;  // empty: none
  double contention = 1.0;       // how much longer a task takes beside one of its rank's other stream
  double pair = 1.0;             // time of an overlapped pair, as a share of its actions' one after another
  // Memory of one microbatch, in one unit throughout; what neither I nor W has freed goes with the last of
  // them.
  std::vector<double> taken;                // by stage, by F; empty: 1
  std::vector<double> freed_by_input_grad;  // by stage; empty: none, W frees it all
  std::vector<double> memory_limit;         // by rank; empty: none
  Noise noise{};                            // of the times of tasks

  // F = 1 and B = 2 at every stage, I and W half of B, no latency.
  static Costs uniform(int num_stages);

  // Throws PlanError unless there is one finite, non-negative number for each stage, boundary and rank.
  void validate(int num_stages, int num_ranks) const;

  // What microbatches take of ranks, of which they took 1 each where nothing is said.
  Memory memory(int num_stages) const;

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

  // How long `task` keeps its worker, with sending its results.
  double duration(const Plan& plan, TaskId task) const {
    const Action& action = plan.action(task);
    const double alone = noise.cv > 0 ? of(action) * noise.factor(action) : of(action);
    const int messages = overhead.empty() ? 0 : plan.num_messages(task);
    return messages == 0 ? alone : alone + messages * overhead[boundary_sent_over(action)];
  }

  // How long the cell that `task` begins keeps its rank, where that runs the parts of a pair as one.
  double duration_of_cell(const Plan& plan, TaskId task) const {
    const TaskId end = plan.end_of_cell(task);
    double sum = duration(plan, task);
    if (end == task + 1) return sum;
    while (++task < end) sum += duration(plan, task);
    return pair * sum;
  }

  // Each boundary has a link in each direction, and each copy of the stages has links of its own.
  int num_links(const Shape& shape) const { return 2 * static_cast<int>(latency.size()) * shape.num_copies(); }
  int link(const Shape& shape, const Action& action) const {
    const int boundary =
        boundary_sent_over(action) + (shape.on_copy(action.microbatch) ? static_cast<int>(latency.size()) : 0);
    return 2 * boundary + static_cast<int>(stream_of(action.kind));
  }

  // The boundary across which the results of `action` go to another stage.
  static int boundary_sent_over(const Action& action) {
    return action.kind == Kind::F || action.kind == Kind::SendF ? action.stage : action.stage - 1;
  }
};

}  // namespace pe
