// DualPipe: two copies of the parameters make two pipelines that flow in opposite directions; each rank
// overlaps `F` of one with `B` of the other. DeepSeek-AI, DeepSeek-V3 Technical Report, 2024. The bubble is
// (p/2 - 1)(FB + B - 3W), where FB is the time of a pair. A rank holds at most p + 1 microbatches. Our
// extension: of an odd number of microbatches the first copy runs one more than the second. With fewer than 2p
// microbatches the same pattern runs; missing microbatches are skipped.
#include <algorithm>

#include "schedule/dual_pipe.hpp"
#include "schedule/schedule.hpp"

namespace pe {

Schedule dualpipe() {
  return {"dualpipe", Layout::Bidirectional,
          OrderOfRank([](const Placement& placement, int rank, int microbatches) {
            const int last = placement.num_ranks - 1;
            const int outer = std::min(rank, last - rank);
            const int half = first_of_copy(microbatches);
            Chunk inward{outer, 0, half};
            Chunk outward{last - outer, half, microbatches};
            if (rank != outer) {
              inward = {outer, half, microbatches};
              outward = {last - outer, 0, half};
            }
            return dual_pipe_order(placement.num_ranks / 2, outer, inward, outward);
          })};
}

}  // namespace pe
