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

void Costs::validate(int num_stages, int num_ranks) const {
  const auto check = [](const char* what, const std::vector<double>& values, int expected,
                        const char* of_what) {
    if (static_cast<int>(values.size()) != expected) {
      throw PlanError(std::string(what) + " has " + std::to_string(values.size()) +
                      " entries; give one number, or one for each of the " +
                      std::to_string(expected) + " " + of_what);
    }
    for (const double value : values) {
      if (!std::isfinite(value) || value < 0) {
        throw PlanError(std::string(what) + " holds " + std::to_string(value) +
                        "; what is charged is finite and not negative");
      }
    }
  };
  check("forward", forward, num_stages, "stages");
  check("backward", backward, num_stages, "stages");
  check("input_grad", input_grad, num_stages, "stages");
  check("weight_grad", weight_grad, num_stages, "stages");
  check("latency", latency, num_stages - 1, "boundaries");
  if (!overhead.empty()) check("overhead", overhead, num_stages - 1, "boundaries");
  if (!transfer.empty()) check("transfer", transfer, num_stages - 1, "boundaries");
  if (!taken.empty()) check("act_memory", taken, num_stages, "stages");
  if (!freed_by_input_grad.empty()) check("mem_i", freed_by_input_grad, num_stages, "stages");
  if (!memory_limit.empty()) check("memory_limit", memory_limit, num_ranks, "ranks");
  if (!std::isfinite(pair) || pair <= 0) {
    throw PlanError("pair is " + std::to_string(pair) + "; it is a factor above 0");
  }
  if (!std::isfinite(contention) || contention < 1.0) {
    throw PlanError("contention is " + std::to_string(contention) +
                    "; it is a factor of at least 1");
  }
}

}  // namespace pe
