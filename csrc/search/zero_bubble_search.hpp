// Searches for the order of `F`, `I` and `W` that ends soonest within the memory limits.
//
// It draws policies (greedy.hpp) at random and varies the best ones; then it varies, token by token, the
// sequences (sequence.hpp) of these policies and of the published schedules. Both use simulated annealing on
// several threads. The result depends on the seed and the amount of work, not on the number of threads. The
// search stops early at an order that reaches the lower bound (simulate/lower_bound.hpp).
#pragma once

#include <atomic>
#include <cstdint>
#include <vector>

#include "search/problem.hpp"

namespace pe {

struct Effort {
  long work = 60'000'000;  // about how many tasks to place, over all threads
  std::uint64_t seed = 0;
  int threads = 2;
  const std::atomic<bool>* stop = nullptr;     // set by the caller: stop with the best order so far
  const std::atomic<bool>* give_up = nullptr;  // set by the caller: stop at once, with Interrupted

  bool gives_up() const { return give_up && give_up->load(std::memory_order_relaxed); }
};

struct Found {
  Tokens tokens;
  Score score;
  long trials = 0;
};

// `templates`: further orders to start from. Throws PlanError if no order that was tried ends within the memory
// limits.
Found search_zero_bubble(const Problem& problem, const std::vector<Order>& templates, const Effort& effort);

}  // namespace pe
