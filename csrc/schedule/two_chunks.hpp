// Builds the action list of a rank that holds two stages, chunk 0 and chunk 1.
#pragma once

#include <array>
#include <vector>

#include "plan/action.hpp"

namespace pe {

struct Chunk {
  int stage;
  int begin;  // microbatches it runs
  int end;
};

// Each call lists the next microbatch of a kind and chunk. Microbatches beyond the last one are skipped, so a
// pattern for many microbatches also works for few.
class TwoChunks {
 public:
  explicit TwoChunks(std::array<Chunk, 2> chunks) : chunks_(chunks) {
    for (int c = 0; c < 2; ++c) next_[c].fill(chunks[c].begin);
  }

  void list(int chunk, Kind kind) {
    const int microbatch = next_[chunk][static_cast<int>(kind)]++;
    if (kind == Kind::B) {
      ++next_[chunk][static_cast<int>(Kind::I)];
      ++next_[chunk][static_cast<int>(Kind::W)];
    } else if (kind == Kind::I) {
      ++next_[chunk][static_cast<int>(Kind::B)];
    }
    if (microbatch < chunks_[chunk].end) actions_.push_back({chunks_[chunk].stage, microbatch, kind});
  }

  // Overlaps `F` of one chunk with `B` of the other.
  void list_pair(int forward) {
    const std::size_t before = actions_.size();
    list(forward, Kind::F);
    list(1 - forward, Kind::B);
    if (actions_.size() == before + 2) actions_[before].joins_next = true;
  }

  // How many microbatches of a chunk were listed or skipped for a kind.
  int count(int chunk, Kind kind) const { return next_[chunk][static_cast<int>(kind)] - chunks_[chunk].begin; }

  std::vector<Action> take() { return std::move(actions_); }

 private:
  std::array<Chunk, 2> chunks_;
  std::array<std::array<int, 4>, 2> next_;  // by chunk and compute kind
  std::vector<Action> actions_;
};

}  // namespace pe
