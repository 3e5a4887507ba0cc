#include "schedule/zero_bubble.hpp"

#include <algorithm>

namespace pe {

std::vector<Action> zero_bubble_order(int stage, int ahead, int late, int microbatches) {
  std::vector<Action> order;
  int f = 0;
  int w = 0;
  for (int m = 0; m < microbatches; ++m) {
    while (f < std::min(microbatches, m + ahead)) order.push_back({stage, f++, Kind::F});
    order.push_back({stage, m, Kind::I});
    if (m >= late) order.push_back({stage, w++, Kind::W});
  }
  while (w < microbatches) order.push_back({stage, w++, Kind::W});
  return order;
}

}  // namespace pe
