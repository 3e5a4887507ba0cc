#include "simulate/microbatch_factors.hpp"

#include <cmath>
#include <cstdint>
#include <string>
#include <utility>

namespace pe {

MicrobatchFactors::MicrobatchFactors(std::vector<double> values, const std::array<int, 3>& shape)
    : values_(std::move(values)), stages_(shape[0]), microbatches_(shape[1]), kinds_(shape[2]) {
  const auto [stages, microbatches, kinds] = shape;
  const auto size = static_cast<std::int64_t>(values_.size());
  // Divided rather than multiplied, so that nothing overflows.
  const bool fits = stages >= 1 && microbatches >= 1 && (kinds == 1 || kinds == kKinds) && size > 0 &&
                    size % stages == 0 && size / stages % kinds == 0 && size / stages / kinds == microbatches;
  if (!fits && (size > 0 || stages != 0 || microbatches != 0 || kinds != 0)) {
    throw PlanError(std::to_string(size) + " factors of microbatches do not fit " + std::to_string(stages) +
                    " stages x " + std::to_string(microbatches) + " microbatches x " + std::to_string(kinds) +
                    " kinds; give one for each, with 1 or 4 kinds");
  }
  for (const double value : values_) {
    if (!std::isfinite(value) || value < 0) {
      throw PlanError("microbatch holds " + std::to_string(value) + "; a factor is finite and at least 0");
    }
  }
}

void MicrobatchFactors::validate(int num_stages, int num_microbatches) const {
  if (!given()) return;
  if (microbatches_ != num_microbatches) {
    throw PlanError("microbatch has factors for " + std::to_string(microbatches_) +
                    " microbatches; give one for each of the " + std::to_string(num_microbatches) +
                    " microbatches");
  }
  if (stages_ != 1 && stages_ != num_stages) {
    throw PlanError("microbatch has lists for " + std::to_string(stages_) +
                    " stages; give one list for all, or one for each of the " + std::to_string(num_stages) +
                    " stages");
  }
}

MicrobatchFactors MicrobatchFactors::reordered(const std::vector<int>& order) const {
  if (!given()) return {};
  std::vector<double> values;
  values.reserve(order.size() * stages_ * kinds_);
  for (int s = 0; s < stages_; ++s) {
    for (const int m : order) {
      const auto first = values_.begin() + static_cast<std::ptrdiff_t>(first_of(s, m));
      values.insert(values.end(), first, first + kinds_);
    }
  }
  return {std::move(values), {stages_, static_cast<int>(order.size()), kinds_}};
}

std::vector<double> MicrobatchFactors::of_microbatch(int m) const { return reordered({m}).values_; }

}  // namespace pe
