#include <atomic>

#include "check.hpp"
#include "search/zero_bubble_search.hpp"
#include "simulate/make_plan.hpp"
#include "simulate/simulator.hpp"

using namespace pe;

namespace {

Costs uneven(int stages, int ranks) {
  Costs costs = Costs::uniform(stages);
  for (int s = 0; s < stages; ++s) {
    costs.forward[s] = 1.0 + 0.1 * (s % 3);
    costs.weight_grad[s] = 0.5 + 0.2 * (s % 2);
    costs.backward[s] = costs.input_grad[s] + costs.weight_grad[s];
  }
  costs.latency.assign(stages - 1, 0.1);
  costs.overhead.assign(stages - 1, 0.02);
  costs.transfer.assign(stages - 1, 0.3);
  costs.freed_by_input_grad.assign(stages, 0.5);
  costs.memory_limit.assign(ranks, stages);
  return costs;
}

double span_of(const Simulation& s) {
  double span = 0;
  for (std::size_t r = 0; r < s.finish.size(); ++r) span = std::max(span, s.finish[r] - s.first_start[r]);
  return span;
}

}  // namespace

TEST(what_a_search_promises_the_simulator_confirms) {
  for (const Layout layout : {Layout::Linear, Layout::V, Layout::Looped}) {
    for (const Objective objective : {Objective::Span, Objective::Makespan}) {
      const int ranks = 3, stages = layout == Layout::Linear ? 3 : 6;
      Costs costs = uneven(stages, ranks);
      if (objective == Objective::Span) costs.microbatch = {{1, 3, 0.5, 1, 6, 1, 2}, {1, 7, 1}};
      const Problem problem(place(layout, stages, ranks), 7, costs, objective);
      const Found found = search_zero_bubble(problem, {}, {.work = 100'000});
      const Plan plan = make_plan(problem.to_order(found.tokens), {});
      const Simulation s = simulate(plan, costs);  // refuses what exceeds the memory
      const double time = objective == Objective::Span ? span_of(s) : s.makespan;
      CHECK(std::abs(time - found.score.time) < 1e-9);
      CHECK(time >= problem.lower_bound() - 1e-9);
      CHECK(problem.to_tokens(plan.order()) == found.tokens);
    }
  }
}

TEST(a_search_finds_the_same_on_any_number_of_threads) {
  const Problem problem(place(Layout::V, 8, 4), 9, uneven(8, 4), Objective::Span);
  const Found one = search_zero_bubble(problem, {}, {.work = 200'000, .seed = 7, .threads = 1});
  const Found three = search_zero_bubble(problem, {}, {.work = 200'000, .seed = 7, .threads = 3});
  CHECK(one.tokens == three.tokens);
}

TEST(a_search_that_is_stopped_has_an_order_all_the_same) {
  const Problem problem(place(Layout::Linear, 4, 4), 12, uneven(4, 4), Objective::Makespan);
  const std::atomic<bool> stop{true};
  const Found found = search_zero_bubble(problem, {}, {.work = 1'000'000'000, .stop = &stop});
  CHECK(simulate(make_plan(problem.to_order(found.tokens), {}), uneven(4, 4)).makespan > 0);
}

TEST(a_search_that_begins_with_a_shorter_step_takes_the_first_microbatches) {
  Costs costs = Costs::uniform(2);
  costs.microbatch = {{4, 3, 2, 1}, {1, 4, 1}};
  const Problem problem = Problem(place(Layout::Linear, 2, 2), 4, costs, Objective::Span).with_first(2);
  CHECK_EQ(problem.time(Pass::F, 1, 0), 4.0);
  CHECK_EQ(problem.time(Pass::W, 0, 1), 3.0);
}

TEST(memory_for_less_than_one_microbatch_is_refused) {
  Costs costs = Costs::uniform(4);
  costs.memory_limit.assign(2, 1.5);
  CHECK_THROWS(Problem(place(Layout::V, 4, 2), 3, costs, Objective::Span), PlanError, "rank 0 may hold 1.5");
}
