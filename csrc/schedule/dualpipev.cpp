// DualPipeV: DualPipe folded into the V placement, which needs one copy of the parameters only. After Qi et al.
// and DeepSeek-AI, github.com/deepseek-ai/DualPipe. The largest bubble is (p - 1)(FB + B - 3W), where FB is the
// time of a pair. A rank holds at most 2p + 1 half chunks. The publication needs 2p microbatches; with fewer
// the same pattern runs, and missing microbatches are skipped.
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
