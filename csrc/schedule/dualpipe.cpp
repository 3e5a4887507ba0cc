// DualPipe: two copies of the parameters, two pipelines that flow against each other, and on each rank F of
// one beside B of the other. DeepSeek-AI, DeepSeek-V3 Technical Report, 2024. The bubble is
// (p/2 - 1)(FB + B - 3W), FB the time of a pair; a rank holds p + 1 microbatches at most. Our extension: of an
// odd number of microbatches the first copy runs one more; fewer than 2p run in the same pattern, which lacks
// then what they are not there for.
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
