// Which rank holds each stage.
#pragma once

#include <string_view>
#include <vector>

#include "plan/order.hpp"

namespace pe {

// The ways in which schedules place S stages on p ranks.
enum class Layout {
  Linear,  // one stage a rank
  // Stage s on rank s % p: each rank holds several stages ("virtual stages"). Narayanan et al., Efficient
  // Large-Scale Language Model Training on GPU Clusters Using Megatron-LM, SC 2021.
  Looped,
  // Stages s and 2p - 1 - s on rank s: what the first rank begins, it ends. Qi et al., Zero Bubble Pipeline
  // Parallelism, ICLR 2024.
  V,
  // Stage s on rank s, and a second copy of it on rank p - 1 - s: two pipelines that flow against each other,
  // each with half of the microbatches. DeepSeek-AI, DeepSeek-V3 Technical Report, 2024.
  Bidirectional,
};

std::string_view layout_name(Layout layout);
Layout layout_of_name(std::string_view name);  // throws PlanError listing the names there are

struct Placement {
  int num_ranks = 0;
  std::vector<int> rank_of_stage;
  std::vector<int> rank_of_copy{};  // of each stage's second copy; empty: there is none

  int num_stages() const { return static_cast<int>(rank_of_stage.size()); }
  std::vector<int> stages_of(int rank) const;  // ascending, of the first copy
};

// Throws PlanError, saying what fits, where the stages cannot be placed so.
Placement place(Layout layout, int num_stages, int num_ranks);

// The first of the microbatches that the second copy runs, where there is one.
inline int first_of_copy(int microbatches) { return (microbatches + 1) / 2; }

// Of a step with F, and backwards, of each stage for each microbatch.
Shape shape_of(const Placement& placement, int microbatches);

}  // namespace pe
