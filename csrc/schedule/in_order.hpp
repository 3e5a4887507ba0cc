// Runs a plan whose ranks take one task at a time, as planned. That needs no event queue: each rank runs until
// an input is missing, and goes on when that input arrives.
#pragma once

#include <algorithm>
#include <cstddef>
#include <vector>

#include "plan/interrupt.hpp"
#include "plan/plan.hpp"

namespace pe {

// Numbers the inputs that stages get from their neighbours: for every microbatch, one forward and one backward.
class Inputs {
 public:
  static constexpr std::size_t kNone = ~std::size_t{0};

  explicit Inputs(const Plan& plan) : stages_(plan.num_stages()), microbatches_(plan.num_microbatches()) {}

  std::size_t size() const { return 2 * stages_ * microbatches_; }

  // The input that a compute action waits for, or kNone. Its other dependencies ran before on the same rank.
  std::size_t of(const Action& a) const {
    if (a.kind == Kind::F) return a.stage > 0 ? at(0, a.stage, a.microbatch) : kNone;
    if (a.kind == Kind::W || a.stage + 1 == static_cast<int>(stages_)) return kNone;
    return at(1, a.stage, a.microbatch);
  }
  // The input of `stage_after` that the action produces.
  std::size_t from(const Action& a, int stage_after) const {
    return at(a.kind == Kind::F ? 0 : 1, stage_after, a.microbatch);
  }

 private:
  std::size_t at(std::size_t direction, int stage, int microbatch) const {
    return (direction * stages_ + stage) * microbatches_ + microbatch;
  }

  std::size_t stages_;
  std::size_t microbatches_;
};

// A clock without time, to find out whether a plan ends.
struct NoClock {
  using Moment = unsigned char;
  static constexpr Moment kNever = 0;
  Moment run(int, TaskId, TaskId, Moment) { return 1; }
  Moment deliver(TaskId, Moment) { return 1; }
};

// Runs `plan`, which runs_in_order(), and returns whether it ends. `clock` has two functions:
// - Moment run(int rank, TaskId first, TaskId end_of_cell, Moment arrived): the end of the rank's next cell,
// whose
//   inputs have arrived at `arrived`;
// - Moment deliver(TaskId task, Moment end): when the result of `task`, which ended at `end`, arrives.
template <class Clock>
bool run_in_order(const Plan& plan, Clock&& clock) {
  using Moment = typename std::remove_reference_t<Clock>::Moment;
  constexpr Moment kNever = std::remove_reference_t<Clock>::kNever;
  struct Rank {
    TaskId next;
    std::size_t missing = Inputs::kNone;  // the input that the rank waits for
  };
  const Inputs inputs(plan);
  std::vector<Moment> arrived(inputs.size(), kNever);
  std::vector<Rank> ranks;
  std::vector<int> awake;
  for (int rank = 0; rank < plan.num_ranks(); ++rank) {
    ranks.push_back({plan.first_of_rank(rank)});
    awake.push_back(plan.num_ranks() - 1 - rank);
  }
  // Whether an earlier part of the cell that begins with `first` produces the input that `part` waits for.
  const auto is_joined = [&](TaskId first, TaskId part, std::size_t input) {
    for (; first < part; ++first) {
      const int after = plan.stage_after(plan.action(first));
      if (after != kNoStage && inputs.from(plan.action(first), after) == input) return true;
    }
    return false;
  };
  const bool pairs = plan.joins_pairs();
  int running = plan.num_ranks();
  while (!awake.empty()) {
    const int rank = awake.back();
    awake.pop_back();
    const TaskId end_of_rank = plan.end_of_rank(rank);
    TaskId next = ranks[rank].next;
    while (next < end_of_rank) {
      check_interrupt(next);
      const TaskId end_of_cell = pairs ? plan.end_of_cell(next) : next + 1;
      Moment latest = kNever;
      for (TaskId part = next; part < end_of_cell; ++part) {
        const std::size_t input = inputs.of(plan.action(part));
        if (input == Inputs::kNone) continue;
        if (arrived[input] == kNever && !is_joined(next, part, input)) {
          ranks[rank].missing = input;
          break;
        }
        latest = std::max(latest, arrived[input]);
      }
      if (ranks[rank].missing != Inputs::kNone) break;
      const Moment end = clock.run(rank, next, end_of_cell, latest);
      for (; next < end_of_cell; ++next) {
        const Action& a = plan.action(next);
        const int after = plan.stage_after(a);
        if (after == kNoStage) continue;
        const std::size_t input = inputs.from(a, after);
        arrived[input] = clock.deliver(next, end);
        Rank& to = ranks[plan.shape().rank_of(after, a.microbatch)];
        if (to.missing != input) continue;
        to.missing = Inputs::kNone;
        awake.push_back(static_cast<int>(&to - ranks.data()));
      }
    }
    ranks[rank].next = next;
    running -= next == end_of_rank;
  }
  return running == 0;
}

}  // namespace pe
