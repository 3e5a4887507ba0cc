// Breadth-first: each rank runs all microbatches through one of its stages before the next stage. Lamy-Poirier,
// Breadth-First Pipeline Parallelism, MLSys 2023. As in torch.distributed.pipelining, except that backwards run
// in ascending order, as in all our schedules; by symmetry that takes the same time.
#include <ranges>

#include "schedule/schedule.hpp"

namespace pe {

Schedule looped_bfs() {
  return {"looped-bfs", Layout::Looped, OrderOfRank([](const Placement& placement, int rank, int microbatches) {
            const std::vector<int> stages = placement.stages_of(rank);
            std::vector<Action> order;
            for (const int stage : stages) {
              for (int m = 0; m < microbatches; ++m) order.push_back({stage, m, Kind::F});
            }
            for (const int stage : std::views::reverse(stages)) {
              for (int m = 0; m < microbatches; ++m) order.push_back({stage, m, Kind::B});
            }
            return order;
          })};
}

}  // namespace pe
