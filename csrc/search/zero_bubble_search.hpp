// The search for an order of F, I and W that ends soonest within the memory there is.
//
// First policies (greedy.hpp) are drawn at random and the best of them varied; then the sequences that they
// and the published schedules give (sequence.hpp) are varied token by token. All by simulated annealing, on
// several threads, with the same result for the same seed and work, whatever the threads. An order that no
// other can beat (simulate/lower_bound.hpp) ends the search.
#pragma once

#include <atomic>
#include <cstdint>
#include <vector>

#include "search/problem.hpp"

namespace pe {

struct Effort {
  long work = 60'000'000;  // about so many tasks are placed, on all threads together
  std::uint64_t seed = 0;
  int threads = 2;
  const std::atomic<bool>* stop = nullptr;  // set from outside: end with the best so far
};

struct Found {
  Tokens tokens;
  Score score;
  long trials = 0;
};

// `templates` are orders to begin from as well. Throws PlanError if nothing that was tried ends within the
// memory.
Found search_zero_bubble(const Problem& problem, const std::vector<Order>& templates, const Effort& effort);

}  // namespace pe
