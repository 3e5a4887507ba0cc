// V-Min: the V placement with about a third of the memory of 1F1B, the least for which, with equal times, the
// bubble does not grow with the number of microbatches. A rank holds at most (p + 4) / 3 microbatches, rounded
// down. All passes reach the next rank every slot. Qi et al., Pipeline Parallelism with Controllable Memory,
// 2024. Also runs with too few microbatches to fill the pipeline.
#include "schedule/building_block.hpp"
#include "schedule/schedule.hpp"

namespace pe {

Schedule v_min() {
  return {"v-min", Layout::V, OrderOfRanks([](const Placement& placement, int microbatches) {
            const int p = placement.num_ranks;
            // Keeps two passes out of the same slot.
            const int wait = p % 3 == 0 ? 2 : 0;
            return order_of_blocks(p, microbatches, 2 * ((p + 4) / 3), [=](int rank) {
              return Block{rank, 2 * p - 1 - rank, 2 * p + wait + rank, 4 * p - 1 + wait - rank};
            });
          })};
}

}  // namespace pe
