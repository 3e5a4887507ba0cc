// How long the tasks of each stage and kind took in the last step: what a rank that looks ahead expects.
#pragma once

#include <memory>
#include <utility>
#include <vector>

#include "plan/plan.hpp"

namespace pe {

class MeanTimes {
 public:
  // A step of `plan` begins. Forgets the times of another plan.
  void begin(const std::shared_ptr<const Plan>& plan) {
    if (plan != plan_) {
      plan_ = plan;
      means_.clear();
    }
    sums_.assign(static_cast<std::size_t>(plan->num_stages()) * kNumKinds, {});
  }
  void note(const Action& action, double seconds) {
    Sum& sum = sums_[index(action)];
    sum.seconds += seconds;
    ++sum.tasks;
  }
  // The step has done all its tasks.
  void end() {
    means_.assign(sums_.size(), 0.0);
    for (int kind = 0; kind < kNumKinds; ++kind) {
      Sum of_kind;
      for (std::size_t at = kind; at < sums_.size(); at += kNumKinds) {
        of_kind.seconds += sums_[at].seconds;
        of_kind.tasks += sums_[at].tasks;
      }
      for (std::size_t at = kind; at < sums_.size(); at += kNumKinds) {
        means_[at] = sums_[at].tasks > 0 ? sums_[at].mean() : of_kind.mean();
      }
    }
  }

  // Whether a step of the plan has ended.
  bool known() const { return !means_.empty(); }
  // Seconds. A stage of another process is taken to be as fast as those of this one.
  double of(const Action& action) const { return means_[index(action)]; }

 private:
  struct Sum {
    double seconds = 0;
    int tasks = 0;
    double mean() const { return tasks > 0 ? seconds / tasks : 0.0; }
  };

  static std::size_t index(const Action& action) {
    return static_cast<std::size_t>(action.stage) * kNumKinds + static_cast<std::size_t>(action.kind);
  }

  std::shared_ptr<const Plan> plan_;
  std::vector<Sum> sums_;      // of the running step, by stage and kind
  std::vector<double> means_;  // of the last one; empty if none has ended
};

}  // namespace pe
