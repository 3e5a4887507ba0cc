#include "schedule/placement.hpp"

#include <algorithm>
#include <array>
#include <string>

namespace pe {

namespace {

constexpr std::array<std::string_view, 4> kNames = {"linear", "looped", "v", "bidirectional"};

}  // namespace

std::string_view layout_name(Layout layout) { return kNames[static_cast<int>(layout)]; }

Layout layout_of_name(std::string_view name) {
  const auto it = std::find(kNames.begin(), kNames.end(), name);
  if (it == kNames.end()) {
    throw PlanError("there is no placement '" + std::string(name) +
                    "'; there are linear, looped, v, bidirectional");
  }
  return static_cast<Layout>(it - kNames.begin());
}

std::vector<int> Placement::stages_of(int rank) const {
  std::vector<int> stages;
  for (int s = 0; s < num_stages(); ++s) {
    if (rank_of_stage[s] == rank) stages.push_back(s);
  }
  return stages;
}

Placement place(Layout layout, int num_stages, int num_ranks) {
  const auto require = [&](bool fits, const char* need) {
    if (fits) return;
    throw PlanError(std::string(need) + ", got " + std::to_string(num_stages) + " stages on " +
                    std::to_string(num_ranks) + " ranks");
  };
  Placement placement{num_ranks, {}};
  switch (layout) {
    case Layout::Linear:
      require(num_stages == num_ranks, "holds exactly one stage on each rank");
      break;
    case Layout::Looped:
      require(num_stages % num_ranks == 0, "holds the same number of stages on each rank");
      break;
    case Layout::V:
      require(num_stages == 2 * num_ranks, "holds exactly two stages on each rank");
      break;
    case Layout::Bidirectional:
      require(num_stages == num_ranks && num_ranks % 2 == 0,
              "holds exactly one stage on each rank, and a copy of another, on an even number of ranks");
      for (int s = 0; s < num_stages; ++s) placement.rank_of_copy.push_back(num_ranks - 1 - s);
  }
  for (int s = 0; s < num_stages; ++s) {
    const bool returns = layout == Layout::V && s >= num_ranks;
    placement.rank_of_stage.push_back(returns ? num_stages - 1 - s : s % num_ranks);
  }
  return placement;
}

void check_ranks(const std::vector<int>& rank_of_stage, int num_ranks) {
  for (const int rank : rank_of_stage) {
    if (rank >= 0 && rank < num_ranks) continue;
    throw PlanError("a stage is placed on rank " + std::to_string(rank) + "; there are ranks 0 to " +
                    std::to_string(num_ranks - 1));
  }
}

Shape shape_of(const Placement& placement, int microbatches) {
  Shape shape{placement.num_stages(), microbatches, true, placement.rank_of_stage, placement.rank_of_copy};
  if (shape.num_copies() > 1) shape.first_of_copy = first_of_copy(microbatches);
  return shape;
}

}  // namespace pe
