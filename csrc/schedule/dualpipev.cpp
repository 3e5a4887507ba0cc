// DualPipeV: DualPipe folded into the V placement, so that one copy of the parameters is enough; after Qi et
// al. and DeepSeek-AI, github.com/deepseek-ai/DualPipe. The largest bubble is (p - 1)(FB + B - 3W), FB the time
// of a pair; a rank holds 2p + 1 half chunks at most. Fewer than 2p microbatches, where the publication is
// undefined, run in the same pattern, which lacks then what they are not there for.
#include "schedule/dual_pipe.hpp"
#include "schedule/schedule.hpp"

namespace pe {

Schedule dualpipev() {
  return {"dualpipev", Layout::V, OrderOfRank([](const Placement& placement, int rank, int microbatches) {
            const int ranks = placement.num_ranks;
            return dual_pipe_order(ranks, rank, {rank, 0, microbatches},
                                   {2 * ranks - 1 - rank, 0, microbatches});
          })};
}

}  // namespace pe
