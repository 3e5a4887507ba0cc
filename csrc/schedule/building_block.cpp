#include "schedule/building_block.hpp"

#include <algorithm>
#include <deque>
#include <limits>
#include <optional>

#include "plan/interrupt.hpp"

namespace pe {
namespace {

constexpr int kPeriod = 6;
constexpr int kNever = std::numeric_limits<int>::max();
constexpr int kW = 4;  // a pass: 0 to 3 as in Block, or `W` of either chunk

bool is_forward(int pass) { return pass < 2; }
// Passes 0 and 3 are of chunk 0. Passes 0 and 2 get their input from the previous rank, 1 and 3 from the next
// one.
int chunk_of(int pass) { return pass == 1 || pass == 2 ? 1 : 0; }
bool comes_from_before(int pass) { return pass % 2 == 0; }

// One rank, and what it has run so far.
class BlockRank {
 public:
  BlockRank(const Block& block, int microbatches, int most)
      : block_(block), microbatches_(microbatches), most_(most), w_slot_(next_w_slot(0)) {}

  int count(int pass) const { return done_[pass]; }
  bool finished() const { return done_[kW] == 2 * microbatches_; }

  // The pass to run now: the one with the earliest slot. If that one is not ready, another may run instead, but
  // only outside the slots from `settled` to `drained`.
  template <class IsReady>
  std::optional<int> choose(int settled, int drained, IsReady&& is_ready) const {
    std::array<int, 5> passes = {0, 1, 2, 3, kW};
    std::sort(passes.begin(), passes.end(), [&](int a, int b) { return slot(a) < slot(b); });
    for (const int pass : passes) {
      const bool may_go_early = slot(pass) < settled || slot(pass) > drained;
      if (slot(pass) == kNever || (pass != passes.front() && !may_go_early)) break;
      const bool ready = pass == kW ? !late_.empty() && slot(kW) <= drained : is_ready(pass) && has_room(pass);
      if (ready) return pass;
    }
    if (!late_.empty() && slot(passes.front()) > drained) return kW;
    return std::nullopt;
  }

  Action run(int pass, int stage_of_chunk_0, int stage_of_chunk_1) {
    int chunk = chunk_of(pass);
    int microbatch = done_[pass]++;
    if (pass == kW) {
      chunk = late_.front();
      late_.pop_front();
      microbatch = w_of_chunk_[chunk]++;
      --held_;
      w_slot_ = next_w_slot(w_slot_ + 1);
    } else if (is_forward(pass)) {
      ++held_;
    } else {
      late_.push_back(chunk);
    }
    const Kind kind = pass == kW ? Kind::W : is_forward(pass) ? Kind::F : Kind::I;
    return {chunk == 0 ? stage_of_chunk_0 : stage_of_chunk_1, microbatch, kind};
  }

 private:
  int slot(int pass) const {
    if (done_[pass] == (pass == kW ? 2 : 1) * microbatches_) return kNever;
    return pass == kW ? w_slot_ : block_[pass] + kPeriod * done_[pass];
  }

  // How many microbatches have `pass` scheduled before `slot`.
  int count_before(int pass, int slot) const {
    return std::clamp((slot - block_[pass] + kPeriod - 1) / kPeriod, 0, microbatches_);
  }

  // Leaves room for the `F` of the other chunk that the blocks place before this one.
  bool has_room(int pass) const {
    if (!is_forward(pass)) return true;
    const int other = 1 - pass;
    return held_ + 1 + std::max(0, count_before(other, slot(pass)) - done_[other]) <= most_;
  }

  // The first slot from `slot` on that no block uses and for which there is a `W` whose `I` has run.
  int next_w_slot(int slot) const {
    const auto taken = [&](int pass) { return count_before(pass, slot + 1) > count_before(pass, slot); };
    while (done_[kW] < 2 * microbatches_ && (count_before(2, slot) + count_before(3, slot) <= done_[kW] ||
                                             taken(0) || taken(1) || taken(2) || taken(3))) {
      ++slot;
    }
    return slot;
  }

  Block block_;
  int microbatches_;
  int most_;
  std::array<int, 5> done_{};
  std::array<int, 2> w_of_chunk_{};
  std::deque<int> late_;  // chunks whose `W` is still to run, in the order of their `I`
  int held_ = 0;          // half chunks
  int w_slot_;
};

}  // namespace

Order order_of_blocks(int num_ranks, int microbatches, int most, const std::function<Block(int rank)>& block) {
  std::vector<BlockRank> ranks;
  ranks.reserve(num_ranks);
  for (int rank = 0; rank < num_ranks; ++rank) ranks.emplace_back(block(rank), microbatches, most);
  // Between the end of the first microbatch and the begin of the last one, the blocks leave no idle time.
  const int settled = block(0)[3];
  const int drained = std::max(settled, block(0)[0] + kPeriod * (microbatches - 1));
  const auto is_ready = [&](int rank, int pass) {
    const int microbatch = ranks[rank].count(pass);
    const int neighbour = comes_from_before(pass) ? rank - 1 : rank + 1;
    if (neighbour >= 0 && neighbour < num_ranks) return ranks[neighbour].count(pass) > microbatch;
    return pass == 0 || ranks[rank].count(pass - 1) > microbatch;
  };

  Order order(num_ranks);
  std::vector<std::optional<int>> chosen(num_ranks);
  // A rank that chose nothing chooses nothing again until it or a neighbour has run a pass.
  std::vector<char> looks(num_ranks + 2, true);  // from 1 on
  const auto unfinished = [](const BlockRank& rank) { return !rank.finished(); };
  while (std::any_of(ranks.begin(), ranks.end(), unfinished)) {
    check_interrupt();
    for (int rank = 0; rank < num_ranks; ++rank) {
      chosen[rank] = ranks[rank].finished() || !looks[rank + 1]
                         ? std::nullopt
                         : ranks[rank].choose(settled, drained, [&](int pass) { return is_ready(rank, pass); });
    }
    std::fill(looks.begin(), looks.end(), false);
    for (int rank = 0; rank < num_ranks; ++rank) {
      const std::optional<int>& pass = chosen[rank];
      if (!pass) continue;
      order[rank].push_back(ranks[rank].run(*pass, rank, 2 * num_ranks - 1 - rank));
      std::fill_n(looks.begin() + rank, 3, true);
    }
  }
  return order;
}

}  // namespace pe
