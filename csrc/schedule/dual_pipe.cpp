#include "schedule/dual_pipe.hpp"

#include <algorithm>
#include <deque>

namespace pe {

std::vector<Action> dual_pipe_order(int depth, int rank, const Chunk& inward, const Chunk& outward) {
  const int inner = depth - 1 - rank;  // ranks further inward
  const int microbatches = std::max({2 * depth, inward.end - inward.begin, outward.end - outward.begin});
  TwoChunks rows({inward, outward});
  std::deque<int> late;  // chunks whose `W` is still to run, in the order of their `I`
  const auto list_input = [&](int chunk) {
    rows.list(chunk, Kind::I);
    late.push_back(chunk);
  };
  const auto list_late = [&] {
    rows.list(late.front(), Kind::W);
    late.pop_front();
  };

  for (int i = 0; i < 2 * inner; ++i) rows.list(0, Kind::F);
  for (int i = 0; i < rank + 1; ++i) {
    rows.list(0, Kind::F);
    rows.list(1, Kind::F);
  }
  for (int i = 0; i < inner; ++i) {
    list_input(1);
    list_late();
    rows.list(1, Kind::F);
  }
  for (int i = 0; i < microbatches - 2 * depth + rank + 1; ++i) {
    if (i == 0 && inner == 0) {  // not as a pair, so the innermost rank sends its `F` sooner
      rows.list(0, Kind::F);
      rows.list(1, Kind::B);
    } else {
      rows.list_pair(0);
    }
    rows.list_pair(1);
  }
  for (int i = 0; i < inner; ++i) {
    rows.list(1, Kind::B);
    rows.list_pair(1);
  }
  // In the second half of these, `W` is postponed to fill the idle time that follows.
  for (int i = 0; i < 2 * (rank + 1); ++i) {
    const int chunk = 1 - i % 2;
    if (i > rank) {
      list_input(chunk);
    } else {
      rows.list(chunk, Kind::B);
    }
  }
  for (int i = 0; i < inner; ++i) {
    list_late();
    list_input(0);
  }
  while (!late.empty()) list_late();
  return rows.take();
}

}  // namespace pe
