// V-Half: the V placement with about half the memory of 1F1B. A rank holds at most (p + 2) / 2 microbatches,
// rounded down. `F` of the first chunk reaches the next rank every two slots, all other passes every slot. Qi
// et al., Pipeline Parallelism with Controllable Memory, 2024. Also runs with too few microbatches to fill the
// pipeline.
#include "schedule/building_block.hpp"
#include "schedule/schedule.hpp"

namespace pe {

Schedule v_half() {
  return {"v-half", Layout::V, OrderOfRanks([](const Placement& placement, int microbatches) {
            const int p = placement.num_ranks;
            // Keeps two passes out of the same slot.
            const int wait = p % 2 == 0 ? 3 : 0;
            return order_of_blocks(p, microbatches, 2 * ((p + 2) / 2), [=](int rank) {
              return Block{2 * rank, 3 * p - 2 - rank, 3 * p - 1 + wait + 2 * rank, 6 * p - 2 + wait - rank};
            });
          })};
}

}  // namespace pe
