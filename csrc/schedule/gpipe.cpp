// All forwards, then all backwards. Huang et al., GPipe: Efficient Training of Giant Neural Networks using
// Pipeline Parallelism, NeurIPS 2019. Backwards run in ascending order, as in torch.distributed.pipelining.
#include "schedule/schedule.hpp"

namespace pe {

Schedule gpipe() {
  return {"gpipe", Layout::Linear, OrderOfRank([](const Placement&, int rank, int microbatches) {
            std::vector<Action> order;
            for (const Kind kind : {Kind::F, Kind::B}) {
              for (int m = 0; m < microbatches; ++m) order.push_back({rank, m, kind});
            }
            return order;
          })};
}

}  // namespace pe
