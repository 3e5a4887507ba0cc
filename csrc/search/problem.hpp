// The input of a search for a zero-bubble order: the placement, the costs of tasks and messages, and the memory
// limits.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "schedule/placement.hpp"
#include "simulate/costs.hpp"

namespace pe {

enum class Pass : std::uint8_t { F, I, W };  // the backward is always split
inline constexpr int kNumPasses = 3;
inline constexpr Kind kKindOf[kNumPasses] = {Kind::F, Kind::I, Kind::W};

// One entry of a rank's order. Its microbatch is the number of earlier entries with the same (stage, pass).
struct Token {
  std::int16_t stage = 0;
  Pass pass = Pass::F;

  friend bool operator==(const Token&, const Token&) = default;
};
using Tokens = std::vector<std::vector<Token>>;  // by rank

enum class Objective {
  Makespan,  // the latest end of any rank
  Span,      // the largest time, over ranks, from a rank's own first begin to its end
};

struct Score {
  double time = 0;  // the objective
  double mean = 0;  // the mean over ranks of what the objective takes the largest of

  // The number to minimise: ranks other than the slowest count a little.
  double cost(double share_of_mean) const { return time + share_of_mean * mean; }
};

class Problem {
 public:
  // Throws PlanError for costs that do not fit, more stages than a Token can number, a rank without stages, or
  // a memory limit too small for one microbatch at each of a rank's stages.
  Problem(const Placement& placement, int microbatches, const Costs& costs, Objective objective);

  // The same problem with only its first microbatches.
  Problem with_first(int microbatches) const;

  int num_ranks() const { return static_cast<int>(stages_of_.size()); }
  int num_stages() const { return static_cast<int>(rank_of_.size()); }
  int microbatches() const { return microbatches_; }
  int rank_of(int stage) const { return rank_of_[stage]; }
  int chunk_of(int stage) const { return chunk_of_[stage]; }  // its index among its rank's stages
  const std::vector<int>& stages_of(int rank) const { return stages_of_[rank]; }  // ascending
  int num_tasks() const { return kNumPasses * num_stages() * microbatches_; }

  // How long a pass of microbatch `m` keeps its rank busy, sending its result included.
  double time(Pass pass, int stage, int m) const {
    return varies_ ? time_of(pass, stage, m) : times_[static_cast<int>(pass)][stage];
  }
  double taken(int stage) const { return taken_[stage]; }                    // at `F`
  double freed_by_input(int stage) const { return freed_by_input_[stage]; }  // at `I`
  double freed_by_weight(int stage) const { return taken_[stage] - freed_by_input_[stage]; }
  bool fits(int rank, double memory) const { return memory <= limit_[rank]; }

  bool crosses(int boundary) const { return rank_of_[boundary] != rank_of_[boundary + 1]; }
  double latency(int boundary) const { return latency_[boundary]; }
  double transfer(int boundary) const { return transfer_[boundary]; }  // how long a result occupies the link

  // A rank's part in the objective.
  double share(double begin, double end) const { return objective_ == Objective::Span ? end - begin : end; }
  // The score of ranks that begin and end at these times.
  Score score(const std::vector<double>& begin, const std::vector<double>& end) const;
  // No order has a lower objective.
  double lower_bound() const { return lower_bound_; }

  Order to_order(const Tokens& tokens) const;
  // The `F`, `I` and `W` of an order; `B` becomes `I` and `W`. Throws PlanError if they are not this problem's.
  Tokens to_tokens(const Order& order) const;

 private:
  double time_of(Pass pass, int stage, int m) const;

  Placement placement_;
  Costs costs_;
  int microbatches_;
  Objective objective_;
  std::vector<int> rank_of_, chunk_of_;
  std::vector<std::vector<int>> stages_of_;
  std::array<std::vector<double>, kNumPasses> times_, sending_;  // by pass and stage; sending is part of time
  bool varies_;                                                  // by microbatch: then `times_` do not hold
  std::vector<double> taken_, freed_by_input_;
  std::vector<double> limit_;
  std::vector<double> latency_, transfer_;
  double lower_bound_ = 0;
};

// When results arrive. There is a link in each direction across each boundary, which carries one result at a
// time.
class Links {
 public:
  explicit Links(const Problem& problem)
      : problem_(problem), free_(std::size_t{2} * problem.num_stages(), 0.0) {}

  void reset() { free_.assign(free_.size(), 0.0); }

  // The arrival of the result that `stage` sends at `time` to the next stage, or to the one before.
  double arrival(int stage, bool forward, double time) {
    const int boundary = forward ? stage : stage - 1;
    if (!problem_.crosses(boundary)) return time;
    double& free = free_[2 * boundary + (forward ? 1 : 0)];
    free = (free > time ? free : time) + problem_.transfer(boundary);
    return free + problem_.latency(boundary);
  }

 private:
  const Problem& problem_;
  std::vector<double> free_;
};

}  // namespace pe
