// ZB-V: the V placement with the backward split. The first rank also holds the last stage, so the first
// gradient comes early. Every rank holds as much as the first rank does in 1F1B: 2p half chunks. Qi et al.,
// Zero Bubble Pipeline Parallelism, ICLR 2024, section 6. If `F`, `I` and `W` take equal times, no rank is idle
// between its first and its last task with at least 2p - 1 microbatches. With fewer the same pattern runs;
// missing microbatches are skipped. The order is that of torch.distributed.pipelining.
#include <algorithm>

#include "schedule/schedule.hpp"
#include "schedule/two_chunks.hpp"

namespace pe {

Schedule zbv() {
  return {"zbv", Layout::V, OrderOfRank([](const Placement& placement, int rank, int microbatches) {
            const int ranks = placement.num_ranks;
            const int full = std::max(2 * ranks - 1, microbatches);
            TwoChunks rows({Chunk{rank, 0, microbatches}, Chunk{2 * ranks - 1 - rank, 0, microbatches}});
            const auto backward = [&](int chunk) {
              rows.list(chunk, Kind::I);
              rows.list(chunk, Kind::W);
            };
            for (int i = 0; i < 2 * (ranks - rank) - 1; ++i) rows.list(0, Kind::F);
            for (int i = 0; i < rank; ++i) {
              rows.list(1, Kind::F);
              rows.list(0, Kind::F);
            }
            for (int i = 0; i < ranks - rank; ++i) {
              rows.list(1, Kind::F);
              backward(1);
            }
            while (rows.count(1, Kind::F) < full) {
              if (rows.count(0, Kind::F) < full) rows.list(0, Kind::F);
              backward(0);
              rows.list(1, Kind::F);
              backward(1);
            }
            for (int i = 0; i < rank; ++i) {
              rows.list(0, Kind::I);
              rows.list(1, Kind::I);
            }
            for (int i = 0; i < ranks - rank; ++i) backward(0);
            while (rows.count(1, Kind::W) < full) rows.list(1, Kind::W);
            while (rows.count(0, Kind::W) < full) rows.list(0, Kind::W);
            return rows.take();
          })};
}

}  // namespace pe
