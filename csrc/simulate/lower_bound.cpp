#include "simulate/lower_bound.hpp"

#include <algorithm>
#include <limits>

#include "plan/interrupt.hpp"
#include "plan/size.hpp"
#include "schedule/placement.hpp"

namespace pe {
namespace {

constexpr double kNever = std::numeric_limits<double>::infinity();

// Times at each stage, sending included. Overlapped pairs may shorten or stretch every time.
struct TaskTimes {
  // The least of any microbatch.
  std::vector<double> forward;
  std::vector<double> input_grad;  // until the gradient is sent: `I`, or `B`
  std::vector<double> rest;        // from then to the end of the backward
  std::vector<double> transit;     // of a message, by boundary: on the link and its latency
  // The most of any microbatch.
  std::vector<double> most_forward, most_backward, most_weight;
  std::vector<double> alone;  // from the begin of its `F` to the end of its backward, whatever else runs
  // Of all microbatches together.
  std::vector<double> forwards, input_grads, backwards;
};

TaskTimes times_of(const std::vector<int>& rank_of_stage, int microbatches, const Costs& costs) {
  TaskTimes times;
  const double share = std::min(1.0, costs.pair);
  const double stretched = std::max(1.0, costs.pair);
  const int stages = static_cast<int>(rank_of_stage.size());
  const auto crosses = [&](int b) {
    return b >= 0 && b + 1 < stages && rank_of_stage[b] != rank_of_stage[b + 1];
  };
  const auto sending = [&](int b) { return crosses(b) && !costs.overhead.empty() ? costs.overhead[b] : 0.0; };
  for (int s = 0; s + 1 < stages; ++s) {
    const double occupied = costs.transfer.empty() ? 0.0 : costs.transfer[s];
    times.transit.push_back(crosses(s) ? costs.latency[s] + occupied : 0.0);
  }
  for (auto* least : {&times.forward, &times.input_grad, &times.rest}) least->assign(stages, kNever);
  for (auto* most : {&times.most_forward, &times.most_backward, &times.most_weight, &times.alone,
                     &times.forwards, &times.input_grads, &times.backwards}) {
    most->assign(stages, 0.0);
  }
  const int different = costs.microbatch.given() ? microbatches : 1;
  const double alike = costs.microbatch.given() ? 1.0 : microbatches;
  const auto lower = [](double& least, double value) { least = std::min(least, value); };
  const auto raise = [](double& most, double value) { most = std::max(most, value); };
  for (int m = 0; m < different; ++m) {
    double way = 0;  // of this microbatch, to the last stage and back
    for (int s = stages - 1; s >= 0; --s) {
      check_interrupt(static_cast<std::size_t>(s));
      const auto time = [&](Kind kind) { return costs.of({s, m, kind}); };
      const double whole = time(Kind::B);
      const double part = time(Kind::I);
      const double weight = time(Kind::W);
      const double forward = time(Kind::F) + sending(s);
      const double input_grad = share * (std::min(whole, part) + sending(s - 1));
      const double backward = share * (std::min(whole, part + weight) + sending(s - 1));
      lower(times.forward[s], share * forward);
      lower(times.input_grad[s], input_grad);
      lower(times.rest[s], backward - input_grad);
      raise(times.most_forward[s], stretched * forward);
      raise(times.most_backward[s], stretched * (std::max(whole, part + weight) + sending(s - 1)));
      raise(times.most_weight[s], stretched * weight);
      times.forwards[s] += alike * share * forward;
      times.input_grads[s] += alike * input_grad;
      times.backwards[s] += alike * backward;
      if (s + 1 < stages) way += 2 * times.transit[s];
      raise(times.alone[s], way + share * forward + backward);
      way += share * forward + input_grad;
    }
  }
  return times;
}

// One rank's work, and the times of one microbatch from the rank's first stage to the end and back.
struct Part {
  int first;  // the rank's first stage: microbatches reach it first and return to it last
  double forwards = 0, gradients = 0, backwards = 0;
  double wait = 0;     // from the rank's first begin to the first gradient at its last stage
  double crowded = 0;  // the least time that the rank idles for lack of memory
};

class Bounds {
 public:
  Bounds(const std::vector<int>& rank_of_stage, int num_ranks, int microbatches, const Costs& costs)
      : rank_of_stage_(rank_of_stage),
        microbatches_(microbatches),
        costs_(costs),
        times_(times_of(rank_of_stage, microbatches, costs)),
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
    bound.makespan = times_.alone[0];
    for (const Part& mine : parts_) {
      check_interrupt();
      // The first microbatch's gradient comes first; all `W` may run after the last gradient was sent.
      double span = std::max({mine.forwards + mine.backwards + mine.crowded, mine.wait + mine.backwards,
                              times_.alone[mine.first]});
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
      part.forwards += times_.forwards[s];
      part.gradients += times_.input_grads[s];
      part.backwards += times_.backwards[s];
      last = s;
    }
    part.wait = backward_[last] - forward_[part.first];
    part.crowded = crowded(rank, part);
    parts_.push_back(part);
  }

  // From the begin at stage `from` until it has run the last backward whose gradient came through `other`,
  // weight gradient included.
  double through(const Part& other, int from) const {
    if (other.first < from) return 0.0;
    return forward_[other.first] - forward_[from] + std::max(other.forwards, other.wait) + other.gradients +
           gradient_return_[other.first] - gradient_return_[from] + times_.rest[from];
  }

  // Until its first gradient comes, a rank can only run the `F` that fit its memory. From the end of the last
  // `F` of its first stage until that microbatch has returned, it can only run what is left of the microbatches
  // in its memory.
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
      drain = std::max(drain, times_.most_weight[s] / freed_by_weight);
      rest += times_.most_forward[s] + times_.most_backward[s];
    }
    drain = std::max(drain, (rest - times_.most_forward[part.first]) / taken(part.first));
    const int first = part.first;
    const double returned = backward_[first] + times_.input_grad[first] + times_.rest[first] - forward_[first] -
                            times_.forward[first];
    return std::max(0.0, part.wait - limit * fill) + std::max(0.0, returned - limit * drain);
  }

  const std::vector<int>& rank_of_stage_;
  const int microbatches_;
  const Costs& costs_;
  const TaskTimes times_;
  // The earliest that the `F`, and the backward, of a microbatch begin at each stage.
  std::vector<double> forward_, backward_;
  std::vector<double> gradient_return_;  // from a stage's begin of backward to the first stage's
  std::vector<Part> parts_;              // the ranks that hold stages
};

}  // namespace

LowerBound lower_bound(const std::vector<int>& rank_of_stage, int num_ranks, int microbatches,
                       const Costs& costs) {
  check_size(static_cast<std::int64_t>(rank_of_stage.size()), num_ranks, microbatches);
  check_ranks(rank_of_stage, num_ranks);
  costs.validate(static_cast<int>(rank_of_stage.size()), num_ranks, microbatches);
  return Bounds(rank_of_stage, num_ranks, microbatches, costs).find();
}

}  // namespace pe
