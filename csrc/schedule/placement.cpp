#include "schedule/placement.hpp"

namespace pe {

std::vector<int> Placement::stages_of(int rank) const {
  std::vector<int> stages;
  for (int s = 0; s < num_stages(); ++s) {
    if (rank_of_stage[s] == rank) stages.push_back(s);
  }
  return stages;
}

Placement linear_placement(int num_stages) { return looped_placement(num_stages, num_stages); }

Placement looped_placement(int num_stages, int num_ranks) {
  Placement placement{num_ranks, {}};
  for (int s = 0; s < num_stages; ++s) placement.rank_of_stage.push_back(s % num_ranks);
  return placement;
}

}  // namespace pe
