// 1F1B: backward first, and at most S - s microbatches in flight at stage s of S. With equal stages this is the
// order of PipeDream-Flush: Narayanan et al., Memory-Efficient Pipeline-Parallel DNN Training, ICML 2021.
#include <algorithm>

#include "schedule/schedule.hpp"

namespace pe {

Schedule one_forward_one_backward() {
  return {"1f1b", Layout::Linear,
          Rule{{Kind::B, Kind::F}, [](const Placement& placement, int stage, int microbatches) {
                 return std::min(placement.num_stages() - stage, microbatches);
               }}};
}

}  // namespace pe
