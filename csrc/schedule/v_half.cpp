// V-Half: the V placement in about half the memory of 1F1B: a rank holds (p + 2) / 2 microbatches at most,
// rounded down. F of the first chunk advances a rank every two slots, all else every slot. Qi et al., Pipeline
// Parallelism with Controllable Memory, 2024. Fewer microbatches than fill the pipeline run likewise.
#include "schedule/building_block.hpp"
#include "schedule/schedule.hpp"

namespace pe {

Schedule v_half() {
  return {"v-half", Layout::V, OrderOfRanks([](const Placement& placement, int microbatches) {
            const int p = placement.num_ranks;
            // So that no two passes fall into one slot.
            const int wait = p % 2 == 0 ? 3 : 0;
            return order_of_blocks(p, microbatches, 2 * ((p + 2) / 2), [=](int rank) {
              return Block{2 * rank, 3 * p - 2 - rank, 3 * p - 1 + wait + 2 * rank, 6 * p - 2 + wait - rank};
            });
          })};
}

}  // namespace pe
