#include "simulate/lower_bound.hpp"

#include <algorithm>

#include "plan/interrupt.hpp"
#include "plan/size.hpp"
#include "schedule/placement.hpp"

namespace pe {
namespace {

// The least time of one microbatch at each stage, sending included. Overlapped pairs may shorten every time.
struct TaskTimes {
  std::vector<double> forward;
  std::vector<double> input_grad;                   // until the gradient is sent: `I`, or `B`
  std::vector<double> backward;                     // the full backward: `B`, or `I` and `W`
  std::vector<double> transit;                      // of a message, by boundary: on the link and its latency
  std::vector<double> most_forward, most_backward;  // the most time
};

TaskTimes times_of(const std::vector<int>& rank_of_stage, const Costs& costs) {
  TaskTimes least;
  const double share = std::min(1.0, costs.pair);
  const int stages = static_cast<int>(rank_of_stage.size());
  const auto crosses = [&](int b) {
    return b >= 0 && b + 1 < stages && rank_of_stage[b] != rank_of_stage[b + 1];
  };
  const auto sending = [&](int b) { return crosses(b) && !costs.overhead.empty() ? costs.overhead[b] : 0.0; };
  for (int s = 0; s < stages; ++s) {
    const double whole = costs.backward[s];
    const double part = costs.input_grad[s];
    least.forward.push_back(share * (costs.forward[s] + sending(s)));
    least.input_grad.push_back(share * (std::min(whole, part) + sending(s - 1)));
    least.backward.push_back(share * (std::min(whole, part + costs.weight_grad[s]) + sending(s - 1)));
    const double stretched = std::max(1.0, costs.pair);
    least.most_forward.push_back(stretched * (costs.forward[s] + sending(s)));
    least.most_backward.push_back(stretched * (std::max(whole, part + costs.weight_grad[s]) + sending(s - 1)));
    const double occupied = costs.transfer.empty() || !crosses(s) ? 0.0 : costs.transfer[s];
    if (s + 1 < stages) least.transit.push_back(crosses(s) ? costs.latency[s] + occupied : 0.0);
  }
  return least;
}

// One rank's work, and the times of one microbatch from the rank's first stage to the end and back.
struct Part {
  int first;  // the rank's first stage: microbatches reach it first and return to it last
  double forwards = 0, gradients = 0, backwards = 0;
  double wait = 0;     // from the rank's first begin to the first gradient at its last stage
  double alone = 0;    // one microbatch, to the end and back
  double crowded = 0;  // the least time that the rank idles for lack of memory
};

class Bounds {
 public:
  Bounds(const std::vector<int>& rank_of_stage, int num_ranks, int microbatches, const Costs& costs)
      : rank_of_stage_(rank_of_stage),
        microbatches_(microbatches),
        costs_(costs),
        times_(times_of(rank_of_stage, costs)),
        forward_(rank_of_stage.size(), 0.0),
        backward_(rank_of_stage.size(), 0.0),
        gradient_return_(rank_of_stage.size(), 0.0) {
    const int stages = static_cast<int>(rank_of_stage.size());
    for (int s = 1; s < stages; ++s) {
      forward_[s] = forward_[s - 1] + times_.forward[s - 1] + times_.transit[s - 1];
      gradient_return_[s] = gradient_return_[s - 1] + times_.input_grad[s - 1] + times_.transit[s - 1];
    }
    backward_[stages - 1] = forward_[stages - 1] + times_.forward[stages - 1];
    for (int s = stages - 2; s >= 0; --s) {
      backward_[s] = backward_[s + 1] + times_.input_grad[s + 1] + times_.transit[s];
    }
    for (int rank = 0; rank < num_ranks; ++rank) {
      check_interrupt();
      add_part(rank);
    }
  }

  LowerBound find() const {
    LowerBound bound;
    bound.makespan = backward_[0] + times_.backward[0];
    for (const Part& mine : parts_) {
      check_interrupt();
      // The first microbatch's gradient comes first; all `W` may run after the last gradient was sent.
      double span =
          std::max({mine.forwards + mine.backwards + mine.crowded, mine.wait + mine.backwards, mine.alone});
      for (const Part& other : parts_) span = std::max(span, through(other, mine.first));
      bound.span = std::max(bound.span, span);
      bound.makespan = std::max({bound.makespan, forward_[mine.first] + span, through(mine, 0)});
    }
    return bound;
  }

 private:
  void add_part(int rank) {
    const auto home = [&](int of) { return of == rank; };
    const auto found = std::find_if(rank_of_stage_.begin(), rank_of_stage_.end(), home);
    if (found == rank_of_stage_.end()) return;
    Part part{static_cast<int>(found - rank_of_stage_.begin())};
    int last = part.first;
    for (int s = part.first; s < static_cast<int>(rank_of_stage_.size()); ++s) {
      if (rank_of_stage_[s] != rank) continue;
      part.forwards += microbatches_ * times_.forward[s];
      part.gradients += microbatches_ * times_.input_grad[s];
      part.backwards += microbatches_ * times_.backward[s];
      last = s;
    }
    part.wait = backward_[last] - forward_[part.first];
    part.alone = backward_[part.first] + times_.backward[part.first] - forward_[part.first];
    part.crowded = crowded(rank, part);
    parts_.push_back(part);
  }

  // From the begin at stage `from` until it has run the last backward whose gradient came through `other`,
  // weight gradient included.
  double through(const Part& other, int from) const {
    if (other.first < from) return 0.0;
    return forward_[other.first] - forward_[from] + std::max(other.forwards, other.wait) + other.gradients +
           gradient_return_[other.first] - gradient_return_[from] + times_.backward[from] -
           times_.input_grad[from];
  }

  // Until its first gradient comes, a rank can only run the `F` that fit its memory. From the begin of the last
  // `F` of its first stage until that microbatch returns, it can only run what is left of the microbatches in
  // its memory.
  double crowded(int rank, const Part& part) const {
    if (costs_.memory_limit.empty()) return 0.0;
    const double limit = costs_.memory_limit[rank];
    const auto taken = [&](int s) { return costs_.taken.empty() ? 1.0 : costs_.taken[s]; };
    // If all microbatches fit, the two periods may overlap.
    if (microbatches_ * taken(part.first) <= limit) return 0.0;
    double fill = 0;   // most time of `F` per unit of memory
    double drain = 0;  // most time of what is left per unit of memory
    double rest = 0;   // time left of a microbatch that is in flight at the first stage only
    for (std::size_t s = 0; s < rank_of_stage_.size(); ++s) {
      if (rank_of_stage_[s] != rank) continue;
      const int stage = static_cast<int>(s);
      const double freed_by_weight =
          taken(stage) - (costs_.freed_by_input_grad.empty() ? 0.0 : costs_.freed_by_input_grad[s]);
      fill = std::max(fill, times_.most_forward[s] / taken(stage));
      drain = std::max(drain, std::max(1.0, costs_.pair) * costs_.weight_grad[s] / freed_by_weight);
      rest += times_.most_forward[s] + times_.most_backward[s];
    }
    const double first = times_.most_forward[part.first];
    drain = std::max(drain, (rest - first) / taken(part.first));
    return std::max(0.0, part.wait - limit * fill) + std::max(0.0, part.alone - first - limit * drain);
  }

  const std::vector<int>& rank_of_stage_;
  const int microbatches_;
  const Costs& costs_;
  const TaskTimes times_;
  // For one microbatch alone: when its `F`, and its backward, begin at each stage.
  std::vector<double> forward_, backward_;
  std::vector<double> gradient_return_;  // from a stage's begin of backward to the first stage's
  std::vector<Part> parts_;              // the ranks that hold stages
};

}  // namespace

LowerBound lower_bound(const std::vector<int>& rank_of_stage, int num_ranks, int microbatches,
                       const Costs& costs) {
  check_size(static_cast<std::int64_t>(rank_of_stage.size()), num_ranks, microbatches);
  check_ranks(rank_of_stage, num_ranks);
  costs.validate(static_cast<int>(rank_of_stage.size()), num_ranks);
  return Bounds(rank_of_stage, num_ranks, microbatches, costs).find();
}

}  // namespace pe
