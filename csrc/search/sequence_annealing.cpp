#include "search/sequence_annealing.hpp"

#include <algorithm>
#include <utility>

namespace pe {
namespace {

constexpr double kWarmest = 3e-6;  // of the time
constexpr double kShareOfMean = 0.3;
constexpr int kFarthest = 6;  // positions that a token moves

// Prefers positions where the pipeline fills and drains: most time can be gained there.
int random_position(int size, int ends_at, Random& random) {
  if (random.one_in(5)) return random.below(size);
  const int from_end = random.below(std::min(size, ends_at));
  return random.one_in(2) ? from_end : size - 1 - from_end;
}

// The first token from `position` on, wrapping around, that the rank waits for.
int waited_for(const std::vector<double>& waits, int position) {
  const int size = static_cast<int>(waits.size());
  for (int i = 0; i < size; ++i) {
    const int at = (position + i) % size;
    if (at > 0 && waits[at] > 0) return at;
  }
  return position;
}

struct Move {
  int from, to;
};

std::optional<Move> random_move(const std::vector<Token>& tokens, const std::vector<double>& waits, int ends_at,
                                Random& random) {
  const int size = static_cast<int>(tokens.size());
  Move move{};
  if (random.below(5) < 3) {  // a later token into the waiting time
    move.to = waited_for(waits, random_position(size, ends_at, random));
    move.from = move.to + 1 + random.below(kFarthest);
  } else {
    move.to = random_position(size, ends_at, random);
    move.from = move.to + 1 + random.below(kFarthest);
    if (random.one_in(2)) std::swap(move.from, move.to);
  }
  if (std::max(move.from, move.to) >= size) return std::nullopt;
  // Moving past an equal token changes nothing.
  const auto [low, high] = std::minmax(move.from, move.to);
  const auto begin = tokens.begin() + (move.from == low ? low + 1 : low);
  const auto end = tokens.begin() + (move.from == high ? high : high + 1);
  if (std::find(begin, end, tokens[move.from]) != end) return std::nullopt;
  return move;
}

void apply(std::vector<Token>& tokens, Move move) {
  const auto at = tokens.begin();
  if (move.from < move.to) {
    std::rotate(at + move.from, at + move.from + 1, at + move.to + 1);
  } else {
    std::rotate(at + move.to, at + move.from, at + move.from + 1);
  }
}

}  // namespace

std::optional<RatedSequence> sequence_of(const Problem& problem, const Tokens& tokens) {
  Filler filler(problem);
  std::optional<RatedSequence> best;
  const auto rate = [&](const Sequence& sequence) {
    const auto score = filler.run(sequence);
    if (score && (!best || score->time < best->score.time)) best = {sequence, *score};
  };
  rate({tokens, true, std::vector<double>(problem.num_ranks(), 0.0)});
  Sequence without;
  for (const auto& of_rank : tokens) {
    auto& kept = without.tokens.emplace_back();
    std::copy_if(of_rank.begin(), of_rank.end(), std::back_inserter(kept),
                 [](const Token& token) { return token.pass != Pass::W; });
  }
  for (const double slack : {0.0, 0.25, 0.5, 0.75, 1.0}) {
    without.slack.assign(problem.num_ranks(), slack);
    rate(without);
  }
  return best;
}

RatedSequence anneal(const Problem& problem, RatedSequence start, long rounds, Random random,
                     const std::function<bool(const Score&)>& ends) {
  Filler filler(problem);
  filler.run(start.sequence);
  auto waits = filler.waits();
  int slowest = filler.slowest_rank();
  const int ends_at = (start.sequence.has_weights ? 9 : 6) * problem.num_ranks();
  const Cooling cooling(kWarmest * start.score.time, rounds);
  RatedSequence best = start, now = std::move(start);
  const auto try_it = [&](long round) {
    const auto score = filler.run(now.sequence);
    if (!score || !cooling.takes(now.score.cost(kShareOfMean), score->cost(kShareOfMean), round, random)) {
      return false;
    }
    now.score = *score;
    waits = filler.waits();
    slowest = filler.slowest_rank();
    if (now.score.time < best.score.time) best = now;
    return true;
  };
  for (long round = 0; round < rounds && !ends(best.score); ++round) {
    const int rank = random.one_in(3) ? slowest : random.below(problem.num_ranks());
    if (!now.sequence.has_weights && random.one_in(20)) {
      const double slack = std::exchange(now.sequence.slack[rank], random.below(11) / 10.0);
      if (!try_it(round)) now.sequence.slack[rank] = slack;
      continue;
    }
    std::vector<Token>& tokens = now.sequence.tokens[rank];
    const auto move = random_move(tokens, waits[rank], ends_at, random);
    if (!move) continue;
    apply(tokens, *move);
    if (!try_it(round)) apply(tokens, {move->to, move->from});
  }
  return best;
}

}  // namespace pe
