// ZB-H2: like ZB-H1, but with nearly twice as many `F` before the first `I`, so that no rank waits for the
// first gradient, and with `W` postponed until each rank holds 2p - 1 microbatches. Qi et al., Zero Bubble
// Pipeline Parallelism, ICLR 2024. If `F`, `I` and `W` take equal times, no rank is idle between its first and
// its last task with at least 2p microbatches. Also runs with fewer, with more idle time.
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
