#include <cmath>
#include <random>

#include "check.hpp"
#include "simulate/make_plan.hpp"
#include "simulate/simulator.hpp"
#include "sizes.hpp"

using namespace pe;

TEST(the_bubble_of_1f1b_has_its_closed_form) {
  for (int p = 1; p <= 8; ++p) {
    for (int m = p; m <= 24; m += 5) {
      const Plan plan = make_plan(find_schedule("1f1b"), p, p, m, {});
      const Simulation s = simulate(plan, Costs::uniform(p));
      CHECK_EQ(s.makespan, 3.0 * (m + p - 1));
    }
  }
}

TEST(latency_delays_what_crosses_ranks) {
  const Plan plan = make_plan(find_schedule("gpipe"), 2, 2, 1, {});
  Costs costs = Costs::uniform(2);
  costs.latency = {0.25};
  CHECK_EQ(simulate(plan, costs).makespan, 2 * (1.0 + 2.0) + 2 * 0.25);
}

TEST(a_skip_is_charged_as_a_message_behind_that_to_the_next_stage) {
  PlanOptions options;
  options.packs.skips = {{0, 2}};
  const Plan plan = make_plan(find_schedule("gpipe"), 3, 3, 1, options);
  Costs costs = Costs::uniform(3);
  costs.overhead = {0.5, 0.125};
  costs.transfer = {4.0, 0.25};
  const Simulation s = simulate(plan, costs);
  const auto end = end_times(plan, costs, s);
  const TaskId f0 = plan.first_of_rank(0), f1 = plan.first_of_rank(1), f2 = plan.first_of_rank(2);
  CHECK_EQ(end[f0], 1.0 + 2 * 0.5);
  CHECK_EQ(s.begin[f1], end[f0] + 4.0);
  CHECK_EQ(s.begin[f2], end[f0] + 2 * 4.0);  // the message of stage 1 arrives earlier
  CHECK_EQ(end[f2 + 1], end[f2] + 2.0 + 2 * 0.125);
  CHECK_EQ(s.begin[f1 + 1], end[f2 + 1] + 0.25);
}

TEST(contention_stretches_tasks_only_while_both_streams_are_busy) {
  // One rank: F0, then B0 beside F1, then B1.
  const Order order = parse_order({{"0F0", "0F1", "0B0", "0B1"}});
  Costs costs = Costs::uniform(1);
  const Plan plan = make_plan(order, {.overlap = true});
  CHECK_EQ(simulate(plan, costs).makespan, 1.0 + 2.0 + 2.0);
  costs.contention = 2.0;
  // F1 runs from 1 to 3 at half pace; B0 has half of its 2 left then, so ends at 4; B1 at 6.
  const Simulation s = simulate(plan, costs);
  const auto end = end_times(plan, costs, s);
  CHECK_EQ(end[1], 3.0);
  CHECK_EQ(end[2], 4.0);
  CHECK_EQ(s.makespan, 6.0);
  CHECK_EQ(s.bubble(), 0.0);
}

TEST(an_overlapped_pair_runs_as_one_task_where_a_rank_runs_one_at_a_time) {
  const Order order = parse_order({{"0F0", "(0F1;0B0)OVERLAP_F_B", "0B1"}, {"1F0", "1B0", "1F1", "1B1"}});
  Costs costs = Costs::uniform(2);
  costs.pair = 0.5;
  const Plan plan = make_plan(order, {});
  const Simulation s = simulate(plan, costs);
  const auto end = end_times(plan, costs, s);
  // Both wait for 1B0, which ends at 4; half of 1 + 2; then 1F1 may begin.
  CHECK_EQ(s.begin[1], 4.0);
  CHECK_EQ(s.begin[2], 4.0);
  CHECK_EQ(end[1], 5.5);
  CHECK_EQ(end[2], 5.5);
  CHECK_EQ(s.begin[6], 5.5);
  CHECK_EQ(s.busy[0], 1.0 + 1.5 + 2.0);
  CHECK_EQ(s.peak_in_flight_of_stage[0], 2);
  // In other modes its parts are ordinary tasks.
  CHECK_EQ(simulate(make_plan(order, {.reactive = true}), costs).begin[1], 1.0);
  CHECK_EQ(simulate(make_plan(order, {.overlap = true}), costs).begin[1], 1.0);
}

TEST(the_order_of_ranks_that_react_has_no_pairs) {
  const Order order = parse_order({{"0F0", "(0F1;0B0)OVERLAP_F_B", "0B1"}, {"1F0", "1B0", "1F1", "1B1"}});
  for (const bool reactive : {false, true}) {
    const Plan plan = make_plan(order, {.reactive = reactive});
    const Order began = order_of(plan, simulate(plan, Costs::uniform(2)));
    CHECK_EQ(to_cells(began)[0].size(), reactive ? 4u : 3u);
  }
}

TEST(a_part_of_a_pair_that_needs_the_other_runs_behind_it) {
  const Order order = parse_order({{"(0F0;0B0)OVERLAP_F_B", "(0F1;0B1)OVERLAP_F_B"}});
  CHECK_EQ(simulate(make_plan(order, {}), Costs::uniform(1)).makespan, 6.0);
}

TEST(memory_is_taken_by_f_and_freed_in_parts) {
  Costs costs = Costs::uniform(1);
  costs.taken = {3.0};
  costs.freed_by_input_grad = {2.0};
  const auto peak = [&](const char* cells) {
    return simulate(make_plan(order_from_csv(cells), {}), costs).peak_memory[0];
  };
  CHECK_EQ(peak("0F0,0B0,0F1,0B1"), 3.0);
  CHECK_EQ(peak("0F0,0F1,0B0,0B1"), 6.0);
  CHECK_EQ(peak("0F0,0I0,0F1,0I1,0W0,0W1"), 4.0);
  CHECK_EQ(peak("0F0,(0F1;0B0)OVERLAP_F_B,0B1"), 6.0);
  CHECK_EQ(peak("0F0,0F1"), 3.0);
}

TEST(an_order_that_exceeds_a_limit_of_memory_is_refused_with_its_cell) {
  const Order order = order_from_csv("0F0,0F1,0B0,0B1\n1F0,(1F1;1B0)OVERLAP_F_B,1B1");
  Costs costs = Costs::uniform(2);
  costs.memory_limit = {2.0, 1.5};
  const char* why = "rank 1, cell 1 '1F1': the rank would hold 2 of memory, its limit is 1.5";
  CHECK_THROWS(simulate(make_plan(order, {}), costs), PlanError, why);
  CHECK_THROWS(make_plan(order, {.reactive = true, .memory = costs.memory(2)}), PlanError, why);
  CHECK_THROWS(make_plan(order, {.memory = costs.memory(2)}), PlanError, "<-- ERROR HERE (rank 1)");
  costs.memory_limit = {1.0};
  CHECK_THROWS(make_plan(order, {.memory = costs.memory(2)}), PlanError, "memory_limit has 1 entries");
}

TEST(noise_has_mean_1_and_its_coefficient_of_variation) {
  const Noise noise{0.3, 5};
  const int count = 200000;
  double sum = 0;
  double squares = 0;
  for (int i = 0; i < count; ++i) {
    const double factor = noise.factor({i % 7, i / 7, i % 2 == 0 ? Kind::F : Kind::B});
    CHECK(factor > 0);
    sum += factor;
    squares += factor * factor;
  }
  const double mean = sum / count;
  CHECK(std::abs(mean - 1.0) < 0.005);
  CHECK(std::abs(std::sqrt(squares / count - mean * mean) - 0.3) < 0.01);
  CHECK_EQ(noise.factor({1, 2, Kind::F}), noise.factor({1, 2, Kind::F}));
  const Noise other{0.3, 6};
  CHECK(noise.factor({1, 2, Kind::F}) != other.factor({1, 2, Kind::F}));
}

TEST(costs_that_do_not_fit_are_refused) {
  const Plan plan = make_plan(find_schedule("gpipe"), 2, 2, 1, {});
  Costs costs = Costs::uniform(3);
  CHECK_THROWS(simulate(plan, costs), PlanError, "forward has 3 entries");
  costs = Costs::uniform(2);
  costs.backward[1] = NAN;
  CHECK_THROWS(simulate(plan, costs), PlanError, "finite and not negative");
  costs = Costs::uniform(2);
  costs.contention = 0.5;
  CHECK_THROWS(simulate(plan, costs), PlanError, "at least 1");
}

// Whatever the costs: dependencies and latencies hold, a worker runs one task at a time, limits hold,
// and the microbatches of one stage and kind keep their order.
TEST(random_simulations_keep_the_rules) {
  std::mt19937 random(7);
  std::uniform_real_distribution<double> cost(0.0, 3.0);
  for (int round = 0; round < 200; ++round) {
    const Schedule& schedule = schedules()[random() % schedules().size()];
    const auto [stages, ranks] = size_of(schedule, 1 + static_cast<int>(random() % 4), 1 + random() % 3);
    const PlanOptions options{random() % 2 == 0, random() % 2 == 0};
    const Plan plan = make_plan(schedule, stages, ranks, 1 + static_cast<int>(random() % 9), options);
    Costs costs = Costs::uniform(stages);
    for (auto* values : {&costs.forward, &costs.backward, &costs.latency}) {
      for (double& value : *values) value = random() % 5 == 0 ? 0.0 : cost(random);
    }
    if (random() % 2 == 0) costs.contention = 1.0 + cost(random);
    const Simulation s = simulate(plan, costs);
    const auto end = end_times(plan, costs, s);
    for (TaskId t = 0; t < plan.size(); ++t) {
      for (const TaskId after : plan.successors(t)) {
        const bool crosses = plan.rank_of(t) != plan.rank_of(after);
        const int boundary = Costs::boundary_sent_over(plan.action(t));
        CHECK(s.begin[after] >= end[t] + (crosses ? costs.latency[boundary] : 0.0) - 1e-9);
      }
      for (TaskId u = 0; u < t; ++u) {
        if (plan.worker_of(t) != plan.worker_of(u)) continue;
        const bool joined = plan.joins_pairs() && plan.end_of_cell(u) > t;
        CHECK(joined || end[t] <= s.begin[u] + 1e-9 || end[u] <= s.begin[t] + 1e-9);
        const Action& a = plan.action(t);
        const Action& b = plan.action(u);
        if (a.stage == b.stage && a.kind == b.kind) CHECK(s.begin[u] <= s.begin[t]);
      }
    }
    for (int stage = 0; stage < stages; ++stage) {
      CHECK(s.peak_in_flight_of_stage[stage] <= plan.limit(stage));
    }
  }
}

// Of 20 random steps each; the order that may never end as planned is tried too.
TEST(looking_ahead_keeps_reaction_from_losing) {
  int eager_loses = 0;
  for (const char* name : {"1f1b", "zb-h1", "interleaved-1f1b", "v-min"}) {
    const Schedule& schedule = find_schedule(name);
    const auto [stages, ranks] = size_of(schedule, 4, 2);
    for (const int microbatches : {8, 16}) {
      const Plan planned = make_plan(schedule, stages, ranks, microbatches, {});
      const Plan ahead = make_plan(schedule, stages, ranks, microbatches, {.reactive = true});
      CHECK(ahead.options().looks_ahead);
      const Plan eager(planned.order(), planned.shape(), {.reactive = true}, planned.limits());
      for (const double cv : {0.1, 0.3, 1.0}) {
        Costs costs = Costs::uniform(stages);
        costs.noise.cv = cv;
        double sums[4] = {};
        for (costs.noise.seed = 0; costs.noise.seed < 20; ++costs.noise.seed) {
          sums[0] += simulate(planned, costs).makespan;
          sums[1] += simulate(ahead, costs).makespan;
          sums[2] += simulate(ahead, costs, false, true).makespan;
          sums[3] += simulate(eager, costs).makespan;
        }
        CHECK(sums[1] <= 1.005 * sums[0]);
        CHECK(sums[2] <= 1.007 * sums[0]);
        eager_loses += sums[3] > 1.01 * sums[0];
      }
    }
  }
  CHECK(eager_loses > 0);
}

TEST(an_order_that_ends_only_if_ranks_change_it_is_run_without_looking_ahead) {
  const Plan plan =
      make_plan(parse_order({{"0F0", "0B0", "0F1", "0B1"}, {"1F0", "1F1", "1B0", "1B1"}}), {.reactive = true});
  CHECK(!plan.options().looks_ahead);
  CHECK(simulate(plan, Costs::uniform(2)).makespan > 0);
}
