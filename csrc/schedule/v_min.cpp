// V-Min: the V placement in about a third of the memory of 1F1B, the least with which equal times leave no
// bubble that grows with the microbatches: a rank holds (p + 4) / 3 microbatches at most, rounded down. All
// passes advance a rank every slot. Qi et al., Pipeline Parallelism with Controllable Memory, 2024. Fewer
// microbatches than fill the pipeline run likewise.
#include "schedule/building_block.hpp"
#include "schedule/schedule.hpp"

namespace pe {

Schedule v_min() {
  return {"v-min", Layout::V, OrderOfRanks([](const Placement& placement, int microbatches) {
            const int p = placement.num_ranks;
            // So that no two passes fall into one slot.
            const int wait = p % 3 == 0 ? 2 : 0;
            return order_of_blocks(p, microbatches, 2 * ((p + 4) / 3), [=](int rank) {
              return Block{rank, 2 * p - 1 - rank, 2 * p + wait + rank, 4 * p - 1 + wait - rank};
            });
          })};
}

}  // namespace pe
