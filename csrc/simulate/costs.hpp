// What the simulator charges for tasks and for messages between ranks. All times are in the same unit, which
// the caller chooses.
#pragma once

#include <algorithm>
#include <vector>

#include "plan/plan.hpp"
#include "simulate/microbatch_factors.hpp"
#include "simulate/noise.hpp"

namespace pe {

struct Costs {
  std::vector<double> forward;      // by stage
  std::vector<double> backward;     // by stage, the full backward
  std::vector<double> input_grad;   // by stage
  std::vector<double> weight_grad;  // by stage
  // Messages to another rank, by boundary (stage s to s + 1), in the LogGP model (Alexandrov et al., SPAA
  // 1995): the latency; the time that the sender spends on each; the time that each result in it occupies the
  // link. Messages of a skip are charged like the sender's other messages in that direction, and share their
  // link.
  std::vector<double> latency;
  std::vector<double> overhead;  // empty: none
  std::vector<double> transfer;  // empty: none
  double contention = 1.0;       // factor on a task's time while the rank's other stream is busy
  double pair = 1.0;             // time of an overlapped pair, as a share of the sum of its parts
  // Memory of one microbatch, all in the same unit. `W` frees what `I` has not freed.
  std::vector<double> taken;                // by stage, at `F`; empty: 1
  std::vector<double> freed_by_input_grad;  // by stage; empty: none, `W` frees it all
  std::vector<double> memory_limit;         // by rank; empty: none
  Noise noise{};                            // on the times of tasks
  MicrobatchFactors microbatch{};           // on the times of tasks, but not of sending

  // `F` = 1, `B` = 2, `I` = `W` = 1 at every stage, no latency.
  static Costs uniform(int num_stages);

  // Throws PlanError unless there is one finite, non-negative number for each stage, boundary and rank, and a
  // factor, if any, for each microbatch.
  void validate(int num_stages, int num_ranks, int num_microbatches) const;

  // The memory costs; a microbatch takes 1 at each stage if none are given.
  Memory memory(int num_stages) const;

  // Whether the tasks of one stage and kind may take different times.
  bool vary() const { return noise.cv > 0 || microbatch.given(); }

  // The time of an action without noise and sending.
  double of(const Action& action) const {
    if (!is_compute(action.kind)) return 0.0;
    const double time = of_stage(action.kind, action.stage);
    return microbatch.given() ? time * microbatch.of(action) : time;
  }

  // How long `task` keeps its worker busy, sending its results included.
  double duration(const Plan& plan, TaskId task) const {
    const Action& action = plan.action(task);
    const double alone = noise.cv > 0 ? of(action) * noise.factor(action) : of(action);
    const int messages = overhead.empty() ? 0 : plan.num_messages(task);
    return messages == 0 ? alone : alone + messages * overhead[boundary_sent_over(action)];
  }

  // How long the cell that begins with `task` keeps its rank busy, if an overlapped pair runs as one task.
  double duration_of_cell(const Plan& plan, TaskId task) const {
    const TaskId end = plan.end_of_cell(task);
    double sum = duration(plan, task);
    if (end == task + 1) return sum;
    while (++task < end) sum += duration(plan, task);
    return pair * sum;
  }

  // Each boundary has a link in each direction. Each copy of the stages has its own links.
  int num_links(const Shape& shape) const { return 2 * static_cast<int>(latency.size()) * shape.num_copies(); }
  int link(const Shape& shape, const Action& action) const {
    const int boundary =
        boundary_sent_over(action) + (shape.on_copy(action.microbatch) ? static_cast<int>(latency.size()) : 0);
    return 2 * boundary + static_cast<int>(stream_of(action.kind));
  }

  // The boundary that the results of `action` are sent across.
  static int boundary_sent_over(const Action& action) {
    return action.kind == Kind::F || action.kind == Kind::SendF ? action.stage : action.stage - 1;
  }

 private:
  double of_stage(Kind kind, int stage) const {
    switch (kind) {
      case Kind::F:
        return forward[stage];
      case Kind::B:
        return backward[stage];
      case Kind::I:
        return input_grad[stage];
      default:
        return weight_grad[stage];
    }
  }
};

}  // namespace pe
