#include "simulate/costs.hpp"

#include <cmath>

namespace pe {

Costs Costs::uniform(int num_stages) {
  Costs costs;
  costs.forward.assign(num_stages, 1.0);
  costs.backward.assign(num_stages, 2.0);
  costs.input_grad.assign(num_stages, 1.0);
  costs.weight_grad.assign(num_stages, 1.0);
  costs.latency.assign(num_stages - 1, 0.0);
  return costs;
}

Memory Costs::memory(int num_stages) const {
  return {taken.empty() ? std::vector<double>(num_stages, 1.0) : taken, freed_by_input_grad, memory_limit};
}

void Costs::validate(int num_stages, int num_ranks, int num_microbatches) const {
  check_charges("forward", forward, num_stages, "stages");
  check_charges("backward", backward, num_stages, "stages");
  check_charges("input_grad", input_grad, num_stages, "stages");
  check_charges("weight_grad", weight_grad, num_stages, "stages");
  check_charges("latency", latency, num_stages - 1, "boundaries");
  if (!overhead.empty()) check_charges("overhead", overhead, num_stages - 1, "boundaries");
  if (!transfer.empty()) check_charges("transfer", transfer, num_stages - 1, "boundaries");
  memory(num_stages).validate(num_stages, num_ranks);
  microbatch.validate(num_stages, num_microbatches);
  if (!std::isfinite(pair) || pair <= 0) {
    throw PlanError("pair is " + std::to_string(pair) + "; it is a factor above 0");
  }
  constexpr double kMostNoise = 1000;  // above that a factor may not be a number
  if (!(noise.cv >= 0) || noise.cv > kMostNoise) {
    throw PlanError("noise is " + std::to_string(noise.cv) +
                    "; it is a coefficient of variation, from 0 to 1000");
  }
  if (!std::isfinite(contention) || contention < 1.0) {
    throw PlanError("contention is " + std::to_string(contention) + "; it is a factor of at least 1");
  }
}

}  // namespace pe
