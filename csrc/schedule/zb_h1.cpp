// ZB-H1: 1F1B with the backward split. Each rank postpones `W` until it holds as many microbatches as the first
// rank does in 1F1B; `W` then runs while the rank waits for the next gradient. Qi et al., Zero Bubble Pipeline
// Parallelism, ICLR 2024. The bubble is (p - 1)(F + I - W) with at least 2p microbatches. Also runs with fewer.
#include "schedule/schedule.hpp"
#include "schedule/zero_bubble.hpp"

namespace pe {

Schedule zb_h1() {
  return {"zb-h1", Layout::Linear, OrderOfRank([](const Placement& placement, int rank, int microbatches) {
            return zero_bubble_order(rank, placement.num_ranks - rank, rank, microbatches);
          })};
}

}  // namespace pe
