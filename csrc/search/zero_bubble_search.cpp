#include "search/zero_bubble_search.hpp"

#include <algorithm>
#include <functional>
#include <mutex>
#include <thread>

#include "plan/interrupt.hpp"
#include "search/policy_annealing.hpp"
#include "search/rounds.hpp"
#include "search/sequence_annealing.hpp"

namespace pe {
namespace {

constexpr int kPolicies = 4;    // to vary
constexpr int kShortStep = 4;   // microbatches per rank, of the step on which policies are varied first
constexpr int kTasted = 8;      // sequences to vary briefly
constexpr int kSequences = 2;   // sequences to vary for long
constexpr long kFewest = 64;    // trials per part of the search
constexpr double kCheaper = 8;  // how much cheaper a trial of a sequence is than one of a policy

constexpr double kRounding = 1e-9;  // of sums of times
constexpr Score kNothing{1e300, 0};

// Shares of the work.
constexpr double kDrawing = 0.15;
constexpr double kShortAnnealing = 0.35;  // of policies, on a short step
constexpr double kPolicyAnnealing = 0.15;
constexpr double kTastingSequences = 0.1;
constexpr double kSequenceAnnealing = 0.25;

// Runs body(i) for i = 0 ... n - 1. Throws Interrupted if one of them did.
void for_each(int n, const Effort& effort, const std::function<void(int)>& body) {
  std::atomic<int> next{0};
  std::atomic<bool> interrupted{false};
  const auto work = [&] {
    const Interruptible until([&] { return effort.gives_up(); });
    try {
      for (int i; (i = next++) < n;) body(i);
    } catch (const Interrupted&) {
      interrupted = true;
    }
  };
  {
    std::vector<std::jthread> helpers;
    for (int t = 1; t < std::min(effort.threads, n); ++t) helpers.emplace_back(work);
    work();
  }
  if (interrupted) throw Interrupted();  // NOLINT(bugprone-std-exception-baseclass)
}

class Search {
 public:
  Search(const Problem& problem, const Effort& effort) : problem_(problem), effort_(effort) {}

  Found run(const std::vector<Order>& templates) {
    // A policy that is good for a short step is nearly as good for a long one.
    const int few = std::min(problem_.microbatches(), kShortStep * problem_.num_ranks());
    const Problem small = problem_.with_first(few);
    std::vector<RatedPolicy> policies = draw(small);
    vary(small, policies, trials(small, kShortAnnealing, 1.0), 0);
    if (few < problem_.microbatches()) {
      std::vector<RatedPolicy> longer;
      for (RatedPolicy& policy : policies) {
        if (auto rated = rate(problem_, std::move(policy.policy))) longer.push_back(std::move(*rated));
      }
      policies = std::move(longer);
    }
    // Uses the work that is left if the short step stopped early.
    const double used = static_cast<double>(trials_) * small.num_tasks() / static_cast<double>(effort_.work);
    vary(problem_, policies, trials(problem_, kDrawing + kShortAnnealing + kPolicyAnnealing - used, 1.0), 100);
    std::vector<Tokens> beginnings(policies.size());
    for (std::size_t i = 0; i < policies.size(); ++i) {
      Greedy(problem_).run(policies[i].policy, beginnings[i]);
      // With the order fixed, a rank no longer waits for better tasks.
      if (const auto score = Filler(problem_).run({beginnings[i], true, {}})) offer(*score, beginnings[i]);
    }
    for (const Order& order : templates) beginnings.push_back(problem_.to_tokens(order));
    for (Tokens& tokens : orders_by_rounds(problem_)) beginnings.push_back(std::move(tokens));
    vary(beginnings);
    if (found_.tokens.empty()) {
      throw PlanError("no order was found that ends within memory_limit; raise it, or search longer");
    }
    found_.trials = trials_;
    return std::move(found_);
  }

 private:
  long trials(const Problem& problem, double share, double cheaper) const {
    const double tasks = problem.num_tasks();
    return std::max(kFewest, static_cast<long>(share * cheaper * static_cast<double>(effort_.work) / tasks));
  }

  Random random(int part) const {
    return Random(effort_.seed * 1000003u + static_cast<std::uint64_t>(part) + 1);
  }

  // Called before each trial.
  bool is_over(const Score& score, const Problem& problem) {
    ++trials_;
    const bool is_stopped = effort_.stop && effort_.stop->load(std::memory_order_relaxed);
    return is_stopped || score.time <= (1 + kRounding) * problem.lower_bound();
  }
  bool is_over(const Score& score) { return is_over(score, problem_); }

  void offer(const Score& score, const Tokens& tokens) {
    if (!found_.tokens.empty() && score.cost(1e-6) >= found_.score.cost(1e-6)) return;
    found_.score = score;
    found_.tokens = tokens;
  }

  // Draws policies at random; returns the best ones, no two of them with equal times.
  std::vector<RatedPolicy> draw(const Problem& problem) {
    const int n = static_cast<int>(std::min(trials(problem, kDrawing, 1.0), 3000L));
    std::vector<std::optional<RatedPolicy>> drawn(n);
    constexpr int kSlice = 16;
    for_each((n + kSlice - 1) / kSlice, effort_, [&](int slice) {
      Greedy greedy(problem);
      Random numbers = random(1000 + slice);
      for (int i = slice * kSlice; i < std::min(n, (slice + 1) * kSlice); ++i) {
        Policy policy = random_policy(problem, numbers);
        if (slice > 0 && is_over(kNothing)) break;
        if (const auto score = greedy.run(policy)) drawn[i] = {std::move(policy), *score};
      }
    });
    std::vector<RatedPolicy> rated;
    for (auto& policy : drawn) {
      if (policy) rated.push_back(std::move(*policy));
    }
    std::stable_sort(rated.begin(), rated.end(),
                     [](const auto& a, const auto& b) { return a.score.time < b.score.time; });
    const auto same = [](const auto& a, const auto& b) { return a.score.time == b.score.time; };
    rated.erase(std::unique(rated.begin(), rated.end(), same), rated.end());
    rated.resize(std::min<std::size_t>(rated.size(), kPolicies));
    return rated;
  }

  void vary(const Problem& problem, std::vector<RatedPolicy>& policies, long together, int seed) {
    const long rounds = together / kPolicies;
    for_each(static_cast<int>(policies.size()), effort_, [&](int i) {
      policies[i] = anneal(problem, std::move(policies[i]), rounds, random(seed + i),
                           [&](const Score& score) { return is_over(score, problem); });
    });
  }

  void vary(const std::vector<Tokens>& beginnings) {
    std::vector<RatedSequence> sequences;
    const auto ends = [this](const Score& score) { return is_over(score); };
    const auto vary_each = [&](double share, int seed) {
      if (is_over(found_.tokens.empty() ? kNothing : found_.score)) return;
      const long rounds = trials(problem_, share, kCheaper) / static_cast<long>(sequences.size());
      for_each(static_cast<int>(sequences.size()), effort_, [&](int i) {
        sequences[i] = anneal(problem_, std::move(sequences[i]), rounds, random(seed + i), ends);
      });
    };
    for (const Tokens& beginning : beginnings) {
      if (auto sequence = sequence_of(problem_, beginning)) sequences.push_back(std::move(*sequence));
    }
    if (sequences.empty()) return;
    const auto best_first = [&](std::size_t kept) {
      std::stable_sort(sequences.begin(), sequences.end(),
                       [](const auto& a, const auto& b) { return a.score.time < b.score.time; });
      if (sequences.size() > kept)
        sequences.erase(sequences.begin() + static_cast<long>(kept), sequences.end());
    };
    best_first(kTasted);
    vary_each(kTastingSequences, 2000);
    best_first(kSequences);
    vary_each(kSequenceAnnealing, 3000);
    for (const RatedSequence& rated : sequences) {
      Tokens tokens;
      if (const auto score = Filler(problem_).run(rated.sequence, tokens)) offer(*score, tokens);
    }
  }

  const Problem& problem_;
  const Effort& effort_;
  Found found_;
  std::atomic<long> trials_{0};
};

}  // namespace

Found search_zero_bubble(const Problem& problem, const std::vector<Order>& templates, const Effort& effort) {
  const Interruptible until([&] { return effort.gives_up(); });
  return Search(problem, effort).run(templates);
}

}  // namespace pe
