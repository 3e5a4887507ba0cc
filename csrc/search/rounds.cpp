#include "search/rounds.hpp"

#include <algorithm>
#include <deque>
#include <optional>

#include "plan/interrupt.hpp"

namespace pe {
namespace {

constexpr double kUnknown = -1.0;

struct Fills {
  bool before_forward, before_input;
};

struct Built {
  Tokens tokens;
  std::vector<double> idle;  // by rank, from its first begin on
  double most_idle() const { return *std::max_element(idle.begin(), idle.end()); }
};

class Rounds {
 public:
  // `allowed`: the idle time of each rank in an earlier order; ranks that idled less may now idle as much as
  // the most.
  Rounds(const Problem& problem, Fills fills, const std::vector<double>& allowed)
      : problem_(problem),
        fills_(fills),
        allowed_(allowed),
        most_allowed_(allowed.empty() ? 0.0 : *std::max_element(allowed.begin(), allowed.end())),
        ranks_(problem.num_ranks()),
        microbatches_(problem.microbatches()),
        links_(problem),
        forward_arrival_(at(problem.num_stages(), 0), kUnknown),
        input_arrival_(at(problem.num_stages(), 0), kUnknown),
        forwards_(problem.num_stages(), 0),
        inputs_(problem.num_stages(), 0),
        weights_(problem.num_stages(), 0),
        now_(ranks_, 0.0),
        memory_(ranks_, 0.0),
        pending_(ranks_),
        built_{Tokens(ranks_), std::vector<double>(ranks_, 0.0)} {
    std::fill_n(forward_arrival_.begin(), microbatches_, 0.0);
  }

  std::optional<Built> build() {
    if (!warm_up()) return std::nullopt;
    for (int round = 0; round < 2 * microbatches_; ++round) {
      check_interrupt();
      if (!input_round() || !forward_round()) return std::nullopt;
    }
    for (int rank = 0; rank < ranks_; ++rank) {
      while (!pending_[rank].empty()) run_weight(rank);
    }
    return std::move(built_);
  }

 private:
  int early(int rank) const { return rank; }
  int late(int rank) const { return problem_.num_stages() - 1 - rank; }
  std::size_t at(int stage, int m) const { return static_cast<std::size_t>(stage) * microbatches_ + m; }

  // Runs `F` until each rank has run as many as the rank before it.
  bool warm_up() {
    for (int rank = 0; rank < ranks_; ++rank) {
      if (!run(Pass::F, early(rank))) return false;
    }
    for (int rank = ranks_ - 1; rank >= 0; --rank) {
      // More of the early stage while the first input of the late stage is in transit, if memory allows.
      while (rank + 1 < ranks_ && forwards_[early(rank)] < microbatches_ &&
             now_[rank] + problem_.time(Pass::F, early(rank), forwards_[early(rank)]) <=
                 forward_arrival_[at(late(rank), 0)] &&
             problem_.fits(rank, memory_[rank] + (2 + 2 * rank) * problem_.taken(early(rank)))) {
        for (int r = 0; r <= rank; ++r) {
          if (!run(Pass::F, early(r))) return false;
        }
      }
      if (!run(Pass::F, late(rank))) return false;
    }
    bool is_late = false;
    const auto count = [&](int rank) { return forwards_[early(rank)] + forwards_[late(rank)]; };
    for (int rank = 1; rank < ranks_; ++rank) {
      const auto behind = [&] {
        const int before = forwards_[late(rank - 1)];
        return count(rank) < count(rank - 1) || (forwards_[late(rank)] <= before && before < microbatches_);
      };
      for (int turns = 0; behind(); ++turns, is_late = !is_late) {
        if (turns > 4 * microbatches_) return false;
        for (int r = ranks_ - 1; r >= rank; --r) {
          const int stage = is_late ? late(r) : early(r);
          if (forwards_[stage] < microbatches_ && !run(Pass::F, stage)) return false;
        }
      }
    }
    return true;
  }

  bool input_round() {
    const auto takes_early = [&](int rank) {
      const int done = inputs_[early(rank)];
      if (done >= inputs_[late(rank)]) return false;
      return inputs_[late(rank)] == microbatches_ || input_arrival_[at(early(rank), done)] >= 0;
    };
    std::vector<int> stages;
    for (int rank = ranks_ - 1; rank >= 0; --rank) {
      if (takes_early(rank)) stages.push_back(early(rank));
    }
    for (int rank = 0; rank < ranks_; ++rank) {
      if (!takes_early(rank)) stages.push_back(late(rank));
    }
    return std::all_of(stages.begin(), stages.end(), [&](int stage) {
      return fill(Pass::I, stage, fills_.before_input || stage < ranks_) && run(Pass::I, stage);
    });
  }

  bool forward_round() {
    for (int rank = 0; rank < ranks_; ++rank) {
      const int late_done = forwards_[late(rank)];
      const int early_done = forwards_[early(rank)];
      if (late_done == microbatches_) continue;
      const bool late_is_there = late_done < early_done && forward_arrival_[at(late(rank), late_done)] >= 0;
      if (!late_is_there && early_done == microbatches_) continue;
      const int stage = late_is_there ? late(rank) : early(rank);
      if (forward_arrival_[at(stage, forwards_[stage])] < 0) continue;
      if (!fill(Pass::F, stage, fills_.before_forward) || !run(Pass::F, stage)) return false;
    }
    return true;
  }

  double arrival(Pass pass, int stage) const {
    return pass == Pass::F ? forward_arrival_[at(stage, forwards_[stage])]
                           : input_arrival_[at(stage, inputs_[stage])];
  }

  // Runs `W` before the next `F` or `I` of a stage. False if memory is short and no `W` is left.
  bool fill(Pass pass, int stage, bool may_delay) {
    const int rank = problem_.rank_of(stage);
    auto& pending = pending_[rank];
    while (pass == Pass::F && !problem_.fits(rank, memory_[rank] + problem_.taken(stage))) {
      if (pending.empty()) return false;
      run_weight(rank);
    }
    const int done = pass == Pass::F ? forwards_[stage] : inputs_[stage];
    if (done == microbatches_) return false;
    const double until = arrival(pass, stage);
    while (!pending.empty() && now_[rank] + time_of_weight(pending.front()) <= until) run_weight(rank);
    double most = built_.most_idle();
    if (!allowed_.empty()) most = std::max(most, most_allowed_ - allowed_[rank]);
    if (may_delay && !pending.empty() && until - now_[rank] > most - built_.idle[rank]) run_weight(rank);
    return true;
  }

  // Runs the next `F` or `I` of a stage. False if its input is missing or memory is short.
  bool run(Pass pass, int stage) {
    const int rank = problem_.rank_of(stage);
    const bool forward = pass == Pass::F;
    int& done = forward ? forwards_[stage] : inputs_[stage];
    if (done == microbatches_) return false;
    const double ready = arrival(pass, stage);
    if (ready < 0 || (forward && !problem_.fits(rank, memory_[rank] + problem_.taken(stage)))) return false;
    const double begin = std::max(now_[rank], ready);
    auto& tokens = built_.tokens[rank];
    if (!tokens.empty()) built_.idle[rank] += begin - now_[rank];
    tokens.push_back({static_cast<std::int16_t>(stage), pass});
    const int m = done++;
    now_[rank] = begin + problem_.time(pass, stage, m);
    if (forward) {
      memory_[rank] += problem_.taken(stage);
      if (stage + 1 < problem_.num_stages()) {
        forward_arrival_[at(stage + 1, m)] = links_.arrival(stage, true, now_[rank]);
      } else {
        input_arrival_[at(stage, m)] = now_[rank];
      }
    } else {
      memory_[rank] -= problem_.freed_by_input(stage);
      pending_[rank].push_back(stage);
      if (stage > 0) input_arrival_[at(stage - 1, m)] = links_.arrival(stage, false, now_[rank]);
    }
    return true;
  }

  double time_of_weight(int stage) const { return problem_.time(Pass::W, stage, weights_[stage]); }

  void run_weight(int rank) {
    const int stage = pending_[rank].front();
    pending_[rank].pop_front();
    built_.tokens[rank].push_back({static_cast<std::int16_t>(stage), Pass::W});
    now_[rank] += time_of_weight(stage);
    ++weights_[stage];
    memory_[rank] -= problem_.freed_by_weight(stage);
  }

  const Problem& problem_;
  const Fills fills_;
  const std::vector<double>& allowed_;
  const double most_allowed_;
  const int ranks_, microbatches_;
  Links links_;
  std::vector<double> forward_arrival_, input_arrival_;  // by stage and microbatch
  std::vector<int> forwards_, inputs_, weights_;         // run, by stage
  std::vector<double> now_, memory_;                     // by rank
  std::vector<std::deque<int>> pending_;                 // by rank, the stages whose `W` is still to run
  Built built_;
};

bool is_v(const Problem& problem) {
  if (problem.num_stages() != 2 * problem.num_ranks()) return false;
  for (int rank = 0; rank < problem.num_ranks(); ++rank) {
    if (problem.rank_of(rank) != rank || problem.rank_of(problem.num_stages() - 1 - rank) != rank) return false;
  }
  return true;
}

}  // namespace

std::vector<Tokens> orders_by_rounds(const Problem& problem) {
  std::vector<Tokens> orders;
  if (!is_v(problem)) return orders;
  for (const Fills fills : {Fills{true, true}, Fills{true, false}, Fills{false, true}, Fills{false, false}}) {
    std::vector<double> allowed;
    for (double least = 0; auto built = Rounds(problem, fills, allowed).build();) {
      if (!allowed.empty() && !(built->most_idle() < least)) break;  // also if it is not a number
      least = built->most_idle();
      allowed = built->idle;
      orders.push_back(std::move(built->tokens));
    }
  }
  return orders;
}

}  // namespace pe
