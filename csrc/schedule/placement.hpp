// Which rank holds each stage.
#pragma once

#include <string_view>
#include <vector>

#include "plan/order.hpp"

namespace pe {

// How a schedule places S stages on p ranks.
enum class Layout {
  Linear,  // one stage per rank
  // Stage s on rank s % p: each rank holds several stages ("virtual stages"). Narayanan et al., Efficient
  // Large-Scale Language Model Training on GPU Clusters Using Megatron-LM, SC 2021.
  Looped,
  // Stages s and 2p - 1 - s on rank s, so the first rank holds the first and the last stage. Qi et al., Zero
  // Bubble Pipeline Parallelism, ICLR 2024.
  V,
  // Stage s on rank s, and a second copy of it on rank p - 1 - s: two pipelines that flow in opposite
  // directions, each with half of the microbatches. DeepSeek-AI, DeepSeek-V3 Technical Report, 2024.
  Bidirectional,
};

std::string_view layout_name(Layout layout);
Layout layout_of_name(std::string_view name);  // throws PlanError with the known names

struct Placement {
  int num_ranks = 0;
  std::vector<int> rank_of_stage;
  std::vector<int> rank_of_copy{};  // by stage, of its second copy; empty: no copies

  int num_stages() const { return static_cast<int>(rank_of_stage.size()); }
  std::vector<int> stages_of(int rank) const;  // ascending; first copies only
};

// Throws PlanError, which says what is needed, if the layout cannot hold these stages.
Placement place(Layout layout, int num_stages, int num_ranks);

// Throws PlanError unless each stage is on one of the ranks.
void check_ranks(const std::vector<int>& rank_of_stage, int num_ranks);

// The first microbatch that runs on the second copy, if there is one.
inline int first_of_copy(int microbatches) { return (microbatches + 1) / 2; }

// The shape of a training step in which each stage runs each microbatch forward and backward.
Shape shape_of(const Placement& placement, int microbatches);

}  // namespace pe
