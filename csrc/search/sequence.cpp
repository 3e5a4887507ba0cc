#include "search/sequence.hpp"

#include <algorithm>

#include "plan/interrupt.hpp"

namespace pe {
namespace {

constexpr double kUnknown = -1.0;

}  // namespace

Filler::Filler(const Problem& problem)
    : problem_(problem),
      links_(problem),
      waits_(problem.num_ranks()),
      begin_(problem.num_ranks()),
      end_(problem.num_ranks()) {}

std::optional<Score> Filler::run(const Sequence& sequence, Tokens* tokens) {
  const int stages = problem_.num_stages();
  links_.reset();
  forward_arrival_.assign(at(stages, 0), kUnknown);
  input_arrival_.assign(at(stages, 0), kUnknown);
  std::fill_n(forward_arrival_.begin(), problem_.microbatches(), 0.0);
  forwards_.assign(stages, 0);
  inputs_.assign(stages, 0);
  pending_.assign(stages, 0);
  ranks_.assign(problem_.num_ranks(), Rank{0, 0, -1, 0, 0, true});
  if (tokens) tokens->assign(problem_.num_ranks(), {});
  ready_.clear();
  for (int rank = problem_.num_ranks() - 1; rank >= 0; --rank) {
    waits_[rank].resize(sequence.tokens[rank].size());
    ready_.push_back(rank);
  }
  while (!ready_.empty()) {
    const int rank = ready_.back();
    ready_.pop_back();
    ranks_[rank].is_listed = false;
    if (!advance(sequence, rank, tokens)) return std::nullopt;
  }
  for (int rank = 0; rank < problem_.num_ranks(); ++rank) {
    Rank& state = ranks_[rank];
    if (state.next < sequence.tokens[rank].size()) return std::nullopt;
    while (state.num_pending > 0) run_weight(rank, next_weight(rank), tokens);
    begin_[rank] = state.begin;
    end_[rank] = state.now;
  }
  return problem_.score(begin_, end_);
}

// Runs the rank until the arrival of its next input is unknown. False if the sequence is not possible.
bool Filler::advance(const Sequence& sequence, int rank, Tokens* tokens) {
  Rank& state = ranks_[rank];
  const std::vector<Token>& mine = sequence.tokens[rank];
  for (; state.next < mine.size(); ++state.next) {
    check_interrupt(state.next);
    const auto [stage, pass] = mine[state.next];
    if (pass == Pass::W) {
      if (pending_[stage] == 0) return false;
      waits_[rank][state.next] = 0;
      run_weight(rank, stage, tokens);
      continue;
    }
    const bool forward = pass == Pass::F;
    const int m = forward ? forwards_[stage] : inputs_[stage];
    if (!forward && m >= forwards_[stage]) return false;
    const double arrival = (forward ? forward_arrival_ : input_arrival_)[at(stage, m)];
    if (arrival < 0) return true;
    while (!sequence.has_weights && state.num_pending > 0) {
      const int next = next_weight(rank);
      const double room = arrival - state.now;
      const bool is_late = (1 - sequence.slack[rank]) * time_of_weight(next) > room;
      if (is_late && !lacks_memory(rank, mine[state.next])) break;
      run_weight(rank, next, tokens);
    }
    if (lacks_memory(rank, mine[state.next])) return false;
    const double begin = std::max(state.now, arrival);
    waits_[rank][state.next] = begin - state.now;
    if (state.begin < 0) state.begin = begin;
    state.now = begin + problem_.time(pass, stage, m);
    if (tokens) (*tokens)[rank].push_back({stage, pass});
    if (forward) {
      ++forwards_[stage];
      state.memory += problem_.taken(stage);
      if (stage + 1 < problem_.num_stages()) {
        hand_over(stage, stage + 1, forward_arrival_, m, state.now);
      } else {
        input_arrival_[at(stage, m)] = state.now;
      }
    } else {
      ++inputs_[stage];
      ++pending_[stage];
      ++state.num_pending;
      state.memory -= problem_.freed_by_input(stage);
      if (stage > 0) hand_over(stage, stage - 1, input_arrival_, m, state.now);
    }
  }
  return true;
}

bool Filler::lacks_memory(int rank, const Token& token) const {
  return token.pass == Pass::F && !problem_.fits(rank, ranks_[rank].memory + problem_.taken(token.stage));
}

// Of the first `W` that is pending: all `I` before the pending ones have had theirs.
double Filler::time_of_weight(int stage) const {
  return problem_.time(Pass::W, stage, inputs_[stage] - pending_[stage]);
}

// The rank's latest stage with a `W` to run: backwards reach later stages first.
int Filler::next_weight(int rank) const {
  const auto& stages = problem_.stages_of(rank);
  return *std::find_if(stages.rbegin(), stages.rend(), [&](int s) { return pending_[s] > 0; });
}

void Filler::run_weight(int rank, int stage, Tokens* tokens) {
  Rank& state = ranks_[rank];
  state.now += time_of_weight(stage);
  --pending_[stage];
  --state.num_pending;
  state.memory -= problem_.freed_by_weight(stage);
  if (tokens) (*tokens)[rank].push_back({static_cast<std::int16_t>(stage), Pass::W});
}

void Filler::hand_over(int from, int to, std::vector<double>& arrivals, int m, double time) {
  arrivals[at(to, m)] = links_.arrival(from, to > from, time);
  const int rank = problem_.rank_of(to);
  if (rank == problem_.rank_of(from) || ranks_[rank].is_listed) return;
  ranks_[rank].is_listed = true;
  ready_.push_back(rank);
}

int Filler::slowest_rank() const {
  int slowest = 0;
  for (int rank = 1; rank < problem_.num_ranks(); ++rank) {
    const double most = problem_.share(begin_[slowest], end_[slowest]);
    if (problem_.share(begin_[rank], end_[rank]) > most) slowest = rank;
  }
  return slowest;
}

}  // namespace pe
