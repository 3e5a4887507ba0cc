// Which rank holds each stage.
#pragma once

#include <vector>

namespace pe {

struct Placement {
  int num_ranks = 0;
  std::vector<int> rank_of_stage;

  int num_stages() const { return static_cast<int>(rank_of_stage.size()); }
  std::vector<int> stages_of(int rank) const;  // ascending
};

// One stage a rank.
Placement linear_placement(int num_stages);

// Stage s on rank s % num_ranks: each rank holds several stages ("virtual stages"). Narayanan et al.,
// Efficient Large-Scale Language Model Training on GPU Clusters Using Megatron-LM, SC 2021.
Placement looped_placement(int num_stages, int num_ranks);

}  // namespace pe
