#include "search/greedy.hpp"

#include <algorithm>
#include <limits>
#include <utility>

#include "plan/interrupt.hpp"

namespace pe {
namespace {

constexpr double kNever = std::numeric_limits<double>::infinity();

}  // namespace

Greedy::Greedy(const Problem& problem)
    : problem_(problem), links_(problem), begin_(problem.num_ranks()), end_(problem.num_ranks()) {}

void Greedy::reset() {
  const int stages = problem_.num_stages();
  links_.reset();
  forward_arrival_.assign(at(stages, 0), kNever);
  input_arrival_.assign(at(stages, 0), kNever);
  std::fill_n(forward_arrival_.begin(), problem_.microbatches(), 0.0);
  forwards_.assign(stages, 0);
  inputs_.assign(stages, 0);
  weights_.assign(stages, 0);
  ranks_.assign(problem_.num_ranks(), Rank{0, -1, 0, 0, 0, std::nullopt, 0});
}

std::optional<Score> Greedy::run(const Policy& policy, Tokens* tokens) {
  reset();
  if (tokens) tokens->assign(problem_.num_ranks(), {});
  for (int rank = 0; rank < problem_.num_ranks(); ++rank) {
    events_.push({0.0, static_cast<std::uint32_t>(rank), 0});
  }
  int left = problem_.num_tasks();
  while (!events_.empty()) {
    check_interrupt(left);
    const Event event = events_.top();
    events_.pop();
    const int rank = static_cast<int>(event.worker);
    Rank& state = ranks_[rank];
    if (state.free_at > event.time) continue;
    state.memory -= std::exchange(state.freed_at_end, 0.0);
    const Choice choice = choose(policy, rank, event.time);
    if (choice.stage < 0) continue;
    if (tokens) (*tokens)[rank].push_back({static_cast<std::int16_t>(choice.stage), choice.pass});
    start(rank, choice, event.time);
    --left;
  }
  if (left > 0) return std::nullopt;
  for (int rank = 0; rank < problem_.num_ranks(); ++rank) {
    begin_[rank] = ranks_[rank].begin;
    end_[rank] = ranks_[rank].end;
  }
  return problem_.score(begin_, end_);
}

// The memory of one microbatch at each later stage of the rank that has none in flight. It is reserved, because
// the microbatches at the earlier stages end only after they have passed the later ones.
double Greedy::reserved_after(int stage) const {
  double reserved = 0;
  for (const int later : problem_.stages_of(problem_.rank_of(stage))) {
    const bool idle = forwards_[later] == inputs_[later] && forwards_[later] < problem_.microbatches();
    if (later > stage && idle) reserved += problem_.taken(later);
  }
  return reserved;
}

double Greedy::time_of_next(Pass pass, int stage) const {
  const std::vector<int>& begun = pass == Pass::F ? forwards_ : pass == Pass::I ? inputs_ : weights_;
  return problem_.time(pass, stage, begun[stage]);
}

Greedy::Choice Greedy::choose(const Policy& policy, int rank, double now) {
  const RankPolicy& rule = policy.ranks[rank];
  const Rank& state = ranks_[rank];
  const int phase = state.num_inputs > 0 ? 1 : 0;
  const RankPolicy::Preference& preference = rule.preference[phase];
  const std::vector<int>& stages = problem_.stages_of(rank);
  const int num_chunks = static_cast<int>(stages.size());
  const bool turns = phase == 1 && rule.alternates && state.last.has_value();

  const auto liking = [&](Pass pass, int stage) {
    const bool is_forward = pass == Pass::F;
    const int chunk = problem_.chunk_of(stage);
    const bool early = is_forward ? preference.early_stages_forward : preference.early_stages_backward;
    int value = early ? num_chunks - 1 - chunk : chunk;
    if (is_forward == preference.forward_first) value += num_chunks;
    if (turns && pass != *state.last) value += 2 * num_chunks;
    return value;
  };

  Choice best;
  double next_input = kNever, next_forward = kNever;
  bool lacks_memory = false;
  struct Coming {
    double arrival;
    int liking;
  };
  std::array<Coming, 16> coming;
  std::size_t num_coming = 0;
  const auto consider = [&](Pass pass, int stage, double arrival, double& next) {
    const int value = liking(pass, stage);
    if (arrival <= now) {
      if (value > best.liking) best = {stage, pass, value};
    } else {
      next = std::min(next, arrival);
      if (num_coming < coming.size()) coming[num_coming++] = {arrival, value};
    }
  };
  for (const int s : stages) {
    if (inputs_[s] < forwards_[s]) consider(Pass::I, s, input_arrival_[at(s, inputs_[s])], next_input);
    const int m = forwards_[s];
    if (m == problem_.microbatches() || m - inputs_[s] >= policy.limits[s][phase]) continue;
    const double arrival = forward_arrival_[at(s, m)];
    if (problem_.fits(rank, state.memory + problem_.taken(s) + reserved_after(s))) {
      consider(Pass::F, s, arrival, next_forward);
    } else if (arrival <= now) {
      lacks_memory = true;
    }
  }
  if (best.stage >= 0 && rule.hold[phase] > 0) {
    const double until = now + rule.hold[phase] * time_of_next(best.pass, best.stage);
    for (std::size_t i = 0; i < num_coming; ++i) {
      if (coming[i].liking > best.liking && coming[i].arrival < until) {
        best = {};
        break;
      }
    }
  }
  if (best.stage >= 0) return best;
  for (const int s : stages) {
    if (weights_[s] == inputs_[s]) continue;
    if (best.stage < 0 || !rule.early_stages_weights) best = {s, Pass::W, 0};
  }
  if (best.stage >= 0 && !lacks_memory) {
    const double time = time_of_next(Pass::W, best.stage);
    if (now + time > next_input + rule.input_slack * time) return {};
    if (now + time > next_forward + rule.forward_slack * time) return {};
  }
  return best;
}

void Greedy::start(int rank, const Choice& choice, double now) {
  Rank& state = ranks_[rank];
  const int s = choice.stage;
  const double end = now + time_of_next(choice.pass, s);
  if (state.begin < 0) state.begin = now;
  state.free_at = state.end = end;
  const auto send = [&](bool forward, int m) {
    const int to = forward ? s + 1 : s - 1;
    const double arrival = links_.arrival(s, forward, end);
    (forward ? forward_arrival_ : input_arrival_)[at(to, m)] = arrival;
    const int receiver = problem_.rank_of(to);
    // A rank that is busy then looks when its task ends.
    if (ranks_[receiver].free_at < arrival) events_.push({arrival, static_cast<std::uint32_t>(receiver), 0});
  };
  switch (choice.pass) {
    case Pass::F: {
      const int m = forwards_[s]++;
      state.memory += problem_.taken(s);
      state.last = Pass::F;
      if (s + 1 < problem_.num_stages()) {
        send(true, m);
      } else {
        input_arrival_[at(s, m)] = end;
      }
      break;
    }
    case Pass::I: {
      const int m = inputs_[s]++;
      state.freed_at_end = problem_.freed_by_input(s);
      state.last = Pass::I;
      ++state.num_inputs;
      if (s > 0) send(false, m);
      break;
    }
    case Pass::W:
      ++weights_[s];
      state.freed_at_end = problem_.freed_by_weight(s);
      break;
  }
  events_.push({end, static_cast<std::uint32_t>(rank), 0});
}

}  // namespace pe
