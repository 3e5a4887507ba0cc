// An order made by a policy: under a virtual clock each rank takes the ready task it likes best, or waits for
// a better one that is on its way.
//
// What a rank knows when it chooses is what will have arrived when: a result's way is known once its task has
// begun. Weight gradients fill the time in which neither a forward nor an input gradient is there, as in the
// heuristics of Qi et al., Zero Bubble Pipeline Parallelism, ICLR 2024; how eagerly, and what is worth
// waiting for, is a parameter of each rank, for a search to set.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <vector>

#include "search/problem.hpp"
#include "simulate/event_heap.hpp"

namespace pe {

// A rank is in its first phase until its first I begins.
inline constexpr int kNumPhases = 2;

struct RankPolicy {
  // A W may make the next I, and the next F, late by so much of its own time.
  double input_slack = 0, forward_slack = 0;
  // The rank waits for a better F or I that arrives within so much of the time of the one at hand; by phase.
  std::array<double, kNumPhases> hold{};
  struct Preference {
    bool forward_first = false;          // F before I
    bool early_stages_forward = false;   // among its stages' F, the earlier stage's
    bool early_stages_backward = false;  // among its stages' I
  };
  std::array<Preference, kNumPhases> preference{};
  bool early_stages_weights = false;
  bool alternates = false;  // after an F it likes an I better, and after an I an F
};

struct Policy {
  std::vector<std::array<int, kNumPhases>> limits;  // microbatches between F and I, by stage and phase
  std::vector<RankPolicy> ranks;
};

class Greedy {
 public:
  explicit Greedy(const Problem& problem);

  // Nothing if the ranks come to wait for one another.
  std::optional<Score> run(const Policy& policy) { return run(policy, nullptr); }
  // The order too.
  std::optional<Score> run(const Policy& policy, Tokens& tokens) { return run(policy, &tokens); }

 private:
  struct Rank {
    double free_at, begin, end;
    double memory, freed_at_end;
    std::optional<Pass> last;  // of F and I
    int num_inputs;            // I that have begun
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
