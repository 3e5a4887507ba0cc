#include "plan/size.hpp"

#include <string>

#include "plan/action.hpp"

namespace pe {
namespace {

void check_count(const char* what, std::int64_t given, std::int64_t most) {
  if (given >= 1 && given <= most) return;
  throw PlanError("a plan of " + std::to_string(given) + " " + what + " cannot be made; give from 1 to " +
                  std::to_string(most));
}

}  // namespace

void check_size(std::int64_t num_stages, std::int64_t num_ranks, std::int64_t microbatches) {
  check_count("stages", num_stages, kMostStages);
  check_count("ranks", num_ranks, kMostStages);
  check_count("microbatches", microbatches, kMostTasks);
  if (2 * num_stages * microbatches <= kMostTasks) return;
  throw PlanError(std::to_string(microbatches) + " microbatches at " + std::to_string(num_stages) +
                  " stages are more tasks than the " + std::to_string(kMostTasks) +
                  " that a plan holds; give fewer");
}

}  // namespace pe
