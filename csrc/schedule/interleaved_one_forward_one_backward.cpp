// Interleaved 1F1B: each rank holds several stages and runs them in turn, each for a group of microbatches.
// Narayanan et al., Efficient Large-Scale Language Model Training on GPU Clusters Using Megatron-LM, SC 2021.
// There a group has as many microbatches as there are ranks. Our extension for other numbers of microbatches:
// as many groups as could be full, whose sizes differ by at most one, the larger first. Equal to
// torch.distributed.pipelining where that is defined.
#include <algorithm>

#include "schedule/schedule.hpp"

namespace pe {
namespace {

int num_groups(int ranks, int microbatches) { return std::max(1, microbatches / ranks); }

// The actions of one kind in the order a rank runs them: group by group, and stage by stage within a group.
std::vector<Action> visits(const std::vector<int>& stages, int groups, int microbatches, Kind kind) {
  std::vector<Action> list;
  int first = 0;
  for (int group = 0; group < groups; ++group) {
    const int end = first + microbatches / groups + (group < microbatches % groups ? 1 : 0);
    for (const int stage : stages) {
      for (int m = first; m < end; ++m) list.push_back({stage, m, kind});
    }
    first = end;
  }
  return list;
}

}  // namespace

Schedule interleaved_one_forward_one_backward() {
  return {"interleaved-1f1b", Layout::Looped,
          OrderOfRank([](const Placement& placement, int rank, int microbatches) {
            const int ranks = placement.num_ranks;
            std::vector<int> stages = placement.stages_of(rank);
            const int chunks = static_cast<int>(stages.size());
            const int groups = num_groups(ranks, microbatches);
            const auto forward = visits(stages, groups, microbatches, Kind::F);
            std::reverse(stages.begin(), stages.end());
            const auto backward = visits(stages, groups, microbatches, Kind::B);

            const int total = static_cast<int>(forward.size());
            const int largest = (microbatches + groups - 1) / groups;
            const int warmup = std::min(total, (chunks - 1) * largest + 2 * (ranks - rank - 1));
            std::vector<Action> order(forward.begin(), forward.begin() + warmup);
            for (int i = 0; i < total; ++i) {
              if (warmup + i < total) order.push_back(forward[warmup + i]);
              order.push_back(backward[i]);
            }
            return order;
          })};
}

}  // namespace pe
