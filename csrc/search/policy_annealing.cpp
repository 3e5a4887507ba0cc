#include "search/policy_annealing.hpp"

#include <algorithm>
#include <cmath>
#include <utility>

namespace pe {
namespace {

constexpr double kWarmest = 0.02;  // of the most that can be gained
constexpr double kShareOfMean = 2e-3;
constexpr int kMostChanges = 3;  // per round

int clamp_limit(const Problem& problem, int limit) { return std::clamp(limit, 1, problem.microbatches()); }

// Values on a grid, so that the search can return to an earlier one.
double random_slack(Random& random) { return random.below(11) / 10.0; }
double random_hold(Random& random) { return random.below(7) / 5.0; }

RankPolicy::Preference random_preference(const Problem& problem, Random& random) {
  const bool chooses_stages = problem.num_stages() > problem.num_ranks();
  RankPolicy::Preference preference;
  preference.forward_first = random.one_in(2);
  if (chooses_stages) {
    preference.early_stages_forward = random.one_in(2);
    preference.early_stages_backward = random.one_in(2);
  }
  return preference;
}

std::pair<int, int> random_range(int n, Random& random) {
  const int a = random.below(n);
  const int b = random.one_in(2) ? a : random.below(n);
  return std::minmax(a, b);
}

void change_limits(const Problem& problem, Policy& policy, Random& random) {
  const auto [first, last] = random_range(problem.num_stages(), random);
  const int by = first == last ? random.below(5) - 2 : random.one_in(2) ? 1 : -1;
  const int phases = random.below(3);  // the first, the second, both
  for (int s = first; s <= last; ++s) {
    for (int phase = 0; phase < kNumPhases; ++phase) {
      if (phases == kNumPhases || phases == phase) {
        policy.limits[s][phase] = clamp_limit(problem, policy.limits[s][phase] + by);
      }
    }
  }
}

template <class Change>
void change_ranks(const Problem& problem, Policy& policy, Random& random, Change&& change) {
  const auto [first, last] = random_range(problem.num_ranks(), random);
  for (int rank = first; rank <= last; ++rank) change(policy.ranks[rank]);
}

void change(const Problem& problem, Policy& policy, Random& random) {
  const int what = random.below(17);
  if (what < 5) return change_limits(problem, policy, random);
  if (what < 9) {
    const double slack = random_slack(random);
    const bool input = random.one_in(2);
    return change_ranks(problem, policy, random,
                        [&](RankPolicy& rank) { (input ? rank.input_slack : rank.forward_slack) = slack; });
  }
  const int phase = random.below(kNumPhases);
  if (what < 12) {
    const auto preference = random_preference(problem, random);
    return change_ranks(problem, policy, random,
                        [&](RankPolicy& rank) { rank.preference[phase] = preference; });
  }
  if (what < 14) {
    const bool alternates = random.one_in(2);
    return change_ranks(problem, policy, random, [&](RankPolicy& rank) { rank.alternates = alternates; });
  }
  if (what < 16) {
    const double hold = random_hold(random);
    return change_ranks(problem, policy, random, [&](RankPolicy& rank) { rank.hold[phase] = hold; });
  }
  const bool early = random.one_in(2);
  change_ranks(problem, policy, random, [&](RankPolicy& rank) { rank.early_stages_weights = early; });
}

}  // namespace

Policy random_policy(const Problem& problem, Random& random) {
  // In-flight limits grow with the distance from the last stage, as in 1F1B, but times a factor; they are lower
  // once the first `I` has run.
  const double factor = 0.25 * std::exp(3.0 * random.share());
  const double later = random.one_in(2) ? 1.0 : 0.4 + 0.6 * random.share();
  Policy policy;
  for (int s = 0; s < problem.num_stages(); ++s) {
    const int distance = problem.num_stages() - s;
    const auto limit = [&](double times) {
      return clamp_limit(problem, static_cast<int>(std::ceil(times * distance)));
    };
    policy.limits.push_back({limit(factor), limit(factor * later)});
  }
  RankPolicy rank;
  rank.input_slack = random_slack(random);
  rank.forward_slack = random_slack(random);
  rank.hold = {random_hold(random), random_hold(random)};
  rank.preference.fill(random_preference(problem, random));
  rank.early_stages_weights = random.one_in(2);
  rank.alternates = random.one_in(2);
  policy.ranks.assign(problem.num_ranks(), rank);
  return policy;
}

std::optional<RatedPolicy> rate(const Problem& problem, Policy policy) {
  const auto score = Greedy(problem).run(policy);
  if (!score) return std::nullopt;
  return RatedPolicy{std::move(policy), *score};
}

RatedPolicy anneal(const Problem& problem, RatedPolicy start, long rounds, Random random,
                   const std::function<bool(const Score&)>& ends) {
  Greedy greedy(problem);
  const Cooling cooling(kWarmest * (start.score.time - problem.lower_bound()), rounds);
  RatedPolicy best = start, now = std::move(start), next;
  for (long round = 0; round < rounds && !ends(best.score); ++round) {
    next.policy = now.policy;
    for (int n = random.below(kMostChanges); n >= 0; --n) change(problem, next.policy, random);
    const auto score = greedy.run(next.policy);
    if (!score) continue;
    next.score = *score;
    if (!cooling.takes(now.score.cost(kShareOfMean), score->cost(kShareOfMean), round, random)) continue;
    std::swap(now, next);
    if (now.score.cost(kShareOfMean) < best.score.cost(kShareOfMean)) best = now;
  }
  return best;
}

}  // namespace pe
