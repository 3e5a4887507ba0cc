#include "search/microbatch_order.hpp"

#include <algorithm>
#include <map>
#include <numeric>
#include <utility>

#include "plan/interrupt.hpp"
#include "search/annealing.hpp"
#include "simulate/simulator.hpp"

namespace pe {
namespace {

constexpr double kRounding = 1e-9;  // relative error of sums of times

// By microbatch, a number that is the same for microbatches with the same factors, and ascends with the time
// that they take together in `plan`.
std::vector<int> ranked(const Plan& plan, const Costs& costs) {
  std::vector<double> work(plan.num_microbatches(), 0.0);
  for (TaskId t = 0; t < plan.size(); ++t) {
    if (is_compute(plan.action(t).kind)) work[plan.action(t).microbatch] += costs.of(plan.action(t));
  }
  std::map<std::pair<double, std::vector<double>>, std::vector<int>> alike;
  for (int m = 0; m < plan.num_microbatches(); ++m) {
    check_interrupt(m);
    alike[{work[m], costs.microbatch.of_microbatch(m)}].push_back(m);
  }
  std::vector<int> rank_of(plan.num_microbatches());
  int rank = 0;
  for (const auto& [_, microbatches] : alike) {
    for (const int m : microbatches) rank_of[m] = rank;
    ++rank;
  }
  return rank_of;
}

// Whether there are no more than `most` different orders.
bool has_at_most(long most, const std::vector<int>& ranks) {
  const auto limit = static_cast<double>(most);
  std::map<int, int> counts;
  double orders = 1;  // of the ranks so far
  for (std::size_t i = 0; i < ranks.size() && orders <= limit; ++i) {
    orders *= static_cast<double>(i + 1) / ++counts[ranks[i]];
  }
  return orders <= limit;
}

// The sorted ranks, dealt to the two ends in turn: the largest come to lie in the middle.
std::vector<int> pyramid(const std::vector<int>& ascending) {
  std::vector<int> order(ascending.size());
  std::size_t front = 0, back = order.size();
  for (std::size_t i = 0; i < order.size(); ++i) {
    (i % 2 == 0 ? order[front++] : order[--back]) = ascending[i];
  }
  return order;
}

class Search {
 public:
  Search(const Plan& plan, const Costs& costs, int simulations, std::uint64_t seed)
      : plan_(plan),
        given_(costs.microbatch),
        costs_(costs),
        given_ranks_(ranked(plan, costs)),
        left_(simulations),
        random_(seed) {}

  MicrobatchOrder run() {
    const double given = simulate(plan_, costs_).makespan;
    best_ = given_ranks_;
    least_ = given;
    std::vector<int> ascending = given_ranks_;
    std::sort(ascending.begin(), ascending.end());
    if (ascending.front() != ascending.back()) {
      if (has_at_most(left_, given_ranks_)) {
        try_all(std::move(ascending));
      } else {
        try_sorted(ascending);
        vary();
      }
    }
    if (!(least_ < given * (1 - kRounding))) return {microbatches_of(given_ranks_), given, given};
    return {microbatches_of(best_), least_, given};
  }

 private:
  // The makespan with the microbatches of these ranks.
  double time(const std::vector<int>& ranks) {
    --left_;
    costs_.microbatch = given_.reordered(microbatches_of(ranks));
    const double makespan = simulate(plan_, costs_).makespan;
    if (makespan < least_) {
      least_ = makespan;
      best_ = ranks;
    }
    return makespan;
  }

  void try_all(std::vector<int> ranks) {
    do {
      time(ranks);
    } while (std::next_permutation(ranks.begin(), ranks.end()));
  }

  void try_sorted(const std::vector<int>& ascending) {
    const std::vector<int> descending(ascending.rbegin(), ascending.rend());
    // Small ones where the pipeline fills or drains, and only there: ranks wait for one another then.
    const int few = std::min(plan_.num_ranks() - 1, static_cast<int>(ascending.size()));
    std::vector<int> small_last = ascending;
    std::rotate(small_last.begin(), small_last.begin() + few, small_last.end());
    std::reverse(small_last.end() - few, small_last.end());
    const std::vector<int> small_first(small_last.rbegin(), small_last.rend());
    for (const auto& order :
         {pyramid(ascending), small_last, small_first, ascending, descending, pyramid(descending)}) {
      if (left_ > 0) time(order);
    }
  }

  void vary() {
    std::vector<int> now = best_;
    double makespan = least_;
    const int size = static_cast<int>(now.size());
    while (left_ > 0) {
      const int a = random_.below(size);
      const int b = random_.below(size);
      if (now[a] == now[b]) continue;
      std::vector<int> next = now;
      if (random_.one_in(2)) {
        std::swap(next[a], next[b]);
      } else if (a < b) {
        std::rotate(next.begin() + a, next.begin() + a + 1, next.begin() + b + 1);
      } else {
        std::rotate(next.begin() + b, next.begin() + a, next.begin() + a + 1);
      }
      const double changed = time(next);
      if (changed > makespan) continue;
      makespan = changed;
      now = std::move(next);
    }
  }

  std::vector<int> microbatches_of(const std::vector<int>& ranks) const {
    std::vector<std::vector<int>> of_rank(ranks.size());
    for (std::size_t m = 0; m < given_ranks_.size(); ++m) {
      of_rank[given_ranks_[m]].push_back(static_cast<int>(m));
    }
    std::vector<std::size_t> used(ranks.size(), 0);
    std::vector<int> order;
    order.reserve(ranks.size());
    for (const int rank : ranks) order.push_back(of_rank[rank][used[rank]++]);
    return order;
  }

  const Plan& plan_;
  const MicrobatchFactors given_;
  Costs costs_;
  const std::vector<int> given_ranks_;
  long left_;  // simulations
  Random random_;
  std::vector<int> best_;
  double least_ = 0;
};

}  // namespace

MicrobatchOrder order_microbatches(const Plan& plan, const Costs& costs, int simulations, std::uint64_t seed) {
  costs.validate(plan.num_stages(), plan.num_ranks(), plan.num_microbatches());
  if (!costs.microbatch.given()) {
    std::vector<int> order(plan.num_microbatches());
    std::iota(order.begin(), order.end(), 0);
    const double makespan = simulate(plan, costs).makespan;
    return {std::move(order), makespan, makespan};
  }
  return Search(plan, costs, simulations, seed).run();
}

}  // namespace pe
