// Makes an order from a policy: under a virtual clock each rank takes the ready task it prefers, or waits for a
// better one that will arrive soon.
//
// When a rank chooses, it knows the arrival of every result whose task has begun. Weight gradients fill the
// time in which neither an `F` nor an `I` is ready, as in the heuristics of Qi et al., Zero Bubble Pipeline
// Parallelism, ICLR 2024. How eagerly they do, and what is worth waiting for, are parameters of each rank,
// which the search varies.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <vector>

#include "search/problem.hpp"
#include "simulate/event_heap.hpp"

namespace pe {

// A rank is in its first phase until its first `I` begins.
inline constexpr int kNumPhases = 2;

struct RankPolicy {
  // How much a `W` may delay the next `I`, and the next `F`, as a share of the time of the `W`.
  double input_slack = 0, forward_slack = 0;
  // By phase: the rank waits for a better `F` or `I` that arrives within this share of the ready one's time.
  std::array<double, kNumPhases> hold{};
  struct Preference {
    bool forward_first = false;          // `F` before `I`
    bool early_stages_forward = false;   // among the `F` of its stages, the earlier stage's
    bool early_stages_backward = false;  // the same among `I`
  };
  std::array<Preference, kNumPhases> preference{};
  bool early_stages_weights = false;
  bool alternates = false;  // after an `F` it prefers an `I`, and after an `I` an `F`
};

struct Policy {
  std::vector<std::array<int, kNumPhases>> limits;  // microbatches between `F` and `I`, by stage and phase
  std::vector<RankPolicy> ranks;
};

class Greedy {
 public:
  explicit Greedy(const Problem& problem);

  // Nothing if the ranks deadlock.
  std::optional<Score> run(const Policy& policy) { return run(policy, nullptr); }
  // Also returns the order.
  std::optional<Score> run(const Policy& policy, Tokens& tokens) { return run(policy, &tokens); }

 private:
  struct Rank {
    double free_at, begin, end;
    double memory, freed_at_end;
    std::optional<Pass> last;  // the last `F` or `I`
    int num_inputs;            // `I` that have begun
  };
  struct Choice {
    int stage = -1;
    Pass pass = Pass::F;
    int liking = -1;
  };

  std::optional<Score> run(const Policy& policy, Tokens* tokens);
  void reset();
  Choice choose(const Policy& policy, int rank, double now);
  void start(int rank, const Choice& choice, double now);
  double reserved_after(int stage) const;
  // The time of a pass of the first microbatch that has not begun it.
  double time_of_next(Pass pass, int stage) const;

  std::size_t at(int stage, int m) const {
    return static_cast<std::size_t>(stage) * problem_.microbatches() + m;
  }

  const Problem& problem_;
  Links links_;
  std::vector<double> forward_arrival_, input_arrival_;  // by stage and microbatch
  std::vector<int> forwards_, inputs_, weights_;         // begun, by stage
  std::vector<Rank> ranks_;
  std::vector<double> begin_, end_;
  EventHeap events_;
};

}  // namespace pe
