// ZB-H2: as ZB-H1, with nearly twice as many F before the first I, so that nobody waits for the first
// gradient, and W put off until all ranks hold 2p - 1 microbatches. Qi et al., Zero Bubble Pipeline
// Parallelism, ICLR 2024. With equal times of F, I and W and 2p microbatches or more, no rank is ever idle
// between its first and its last task; fewer run likewise, with less to fill the waits.
#include "schedule/schedule.hpp"
#include "schedule/zero_bubble.hpp"

namespace pe {

Schedule zb_h2() {
  return {"zb-h2", Layout::Linear, OrderOfRank([](const Placement& placement, int rank, int microbatches) {
            const int ahead = 2 * (placement.num_ranks - rank) - 1;
            return zero_bubble_order(rank, ahead, 2 * rank, microbatches);
          })};
}

}  // namespace pe
