// Factors on the times of tasks, by microbatch. They make the microbatches of a step unequal.
#pragma once

#include <array>
#include <cstddef>
#include <vector>

#include "plan/action.hpp"

namespace pe {

class MicrobatchFactors {
 public:
  static constexpr int kKinds = 4;  // `F`, `B`, `I`, `W`

  MicrobatchFactors() = default;  // all are 1
  // `values` by stage, microbatch and kind, in this order; `shape` has their numbers. The number of stages is 1
  // if all stages have the same factors, and that of kinds if all kinds have. Throws PlanError for another
  // shape, and for a factor that is negative or not finite.
  MicrobatchFactors(std::vector<double> values, const std::array<int, 3>& shape);

  bool given() const { return !values_.empty(); }
  int num_microbatches() const { return microbatches_; }

  // Of a compute action, if given().
  double of(const Action& a) const {
    const std::size_t kind = kinds_ == 1 ? 0 : static_cast<std::size_t>(a.kind);
    return values_[first_of(a.stage, a.microbatch) + kind];
  }

  // Throws PlanError unless there are factors for this many stages and microbatches, or none at all.
  void validate(int num_stages, int num_microbatches) const;

  // The factors of a step whose microbatch i is microbatch `order[i]` of this one.
  MicrobatchFactors reordered(const std::vector<int>& order) const;

  // All factors of one microbatch: microbatches with equal ones take equal times.
  std::vector<double> of_microbatch(int m) const;

 private:
  std::size_t first_of(int stage, int m) const {
    const std::size_t row = stages_ == 1 ? 0 : static_cast<std::size_t>(stage);
    return (row * microbatches_ + m) * kinds_;
  }

  std::vector<double> values_;
  int stages_ = 0, microbatches_ = 0, kinds_ = 0;
};

}  // namespace pe
