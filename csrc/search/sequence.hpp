// Makes an order from each rank's sequence of `F` and `I`: inserts `W` where the rank would wait or memory
// requires it, unless the sequence contains the `W` itself.
#pragma once

#include <optional>
#include <vector>

#include "search/problem.hpp"

namespace pe {

struct Sequence {
  Tokens tokens;
  bool has_weights = false;   // the tokens contain `W`; none are inserted
  std::vector<double> slack;  // by rank: how much a `W` may delay what follows, as a share of its own time
};

class Filler {
 public:
  explicit Filler(const Problem& problem);

  // Nothing if the sequence cannot end or does not fit the memory.
  std::optional<Score> run(const Sequence& sequence) { return run(sequence, nullptr); }
  // Also returns the order, with its `W`.
  std::optional<Score> run(const Sequence& sequence, Tokens& tokens) { return run(sequence, &tokens); }

  // Of the last run that ended: how long each rank waited for each of its tokens, and the rank with the largest
  // share of the objective.
  const std::vector<std::vector<double>>& waits() const { return waits_; }
  int slowest_rank() const;

 private:
  struct Rank {
    std::size_t next;  // token
    double now, begin, memory;
    int num_pending;  // weight gradients
    bool is_listed;   // in ready_
  };

  std::optional<Score> run(const Sequence& sequence, Tokens* tokens);
  bool advance(const Sequence& sequence, int rank, Tokens* tokens);
  void run_weight(int rank, int stage, Tokens* tokens);
  int next_weight(int rank) const;
  double time_of_weight(int stage) const;
  bool lacks_memory(int rank, const Token& token) const;
  void hand_over(int from, int to, std::vector<double>& arrivals, int m, double time);

  std::size_t at(int stage, int m) const {
    return static_cast<std::size_t>(stage) * problem_.microbatches() + m;
  }

  const Problem& problem_;
  Links links_;
  std::vector<double> forward_arrival_, input_arrival_;  // by stage and microbatch; negative: unknown
  std::vector<int> forwards_, inputs_, pending_;         // by stage
  std::vector<Rank> ranks_;
  std::vector<int> ready_;  // ranks that may continue
  std::vector<std::vector<double>> waits_;
  std::vector<double> begin_, end_;
};

}  // namespace pe
