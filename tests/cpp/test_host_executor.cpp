#include <atomic>
#include <barrier>
#include <mutex>
#include <random>
#include <stdexcept>
#include <thread>
#include <utility>

#include "check.hpp"
#include "runtime/host_executor.hpp"
#include "simulate/make_plan.hpp"
#include "simulate/simulator.hpp"
#include "sizes.hpp"

using namespace pe;
using namespace std::chrono_literals;

namespace {

std::shared_ptr<const Plan> shared_plan(Plan plan) { return std::make_shared<const Plan>(std::move(plan)); }

std::shared_ptr<Program> program_of(const std::shared_ptr<const Plan>& plan, const Body& body) {
  auto program = std::make_shared<Program>(plan);
  for (int stage = 0; stage < plan->num_stages(); ++stage) {
    for (const Kind kind : {Kind::F, Kind::B, Kind::I, Kind::W}) program->set_body(stage, kind, body);
  }
  return program;
}

struct Pool : HostExecutor {
  explicit Pool(int workers) : HostExecutor(workers, std::vector<std::string>(workers, "test"), {}) {}
};

RunOptions with_timeout(double seconds) {
  RunOptions options;
  options.timeout = std::chrono::duration<double>(seconds);
  return options;
}

}  // namespace

TEST(a_static_plan_runs_in_its_order_on_every_rank) {
  for (const char* name : {"gpipe", "1f1b", "interleaved-1f1b", "zb-h1", "zbv"}) {
    const Size size = size_of(find_schedule(name), 3, 2);
    const auto plan = shared_plan(make_plan(find_schedule(name), size.stages, size.ranks, 7, {}));
    std::mutex mutex;
    Order ran(3);
    Pool pool(plan->num_workers());
    const auto program = program_of(plan, [&](const Action& action) {
      std::lock_guard lock(mutex);
      ran[plan->rank_of_stage(action.stage)].push_back(action);
    });
    for (int step = 0; step < 20; ++step) {
      for (auto& actions : ran) actions.clear();
      CHECK(pool.run(program, {}).outcome == Outcome::Done);
      CHECK(ran == plan->order());
    }
  }
}

// In every mode, with tasks of random length: each task runs once, after its dependencies, within the limits.
TEST(random_steps_keep_the_rules) {
  std::mt19937 random(3);
  for (int round = 0; round < 60; ++round) {
    const Schedule& schedule = schedules()[random() % schedules().size()];
    const auto [stages, ranks] = size_of(schedule, 1 + static_cast<int>(random() % 4), 2);
    const PlanOptions options{random() % 2 == 0, random() % 2 == 0};
    const auto plan =
        shared_plan(make_plan(schedule, stages, ranks, 1 + static_cast<int>(random() % 9), options));
    std::atomic<int> count{0};
    std::atomic<unsigned> noise{static_cast<unsigned>(random())};
    Pool pool(plan->num_workers());
    const auto program = program_of(plan, [&](const Action&) {
      ++count;
      const unsigned length = (noise = noise * 1664525u + 1013904223u) >> 26;
      if (length < 8) std::this_thread::sleep_for(std::chrono::microseconds(length * 10));
    });
    const StepResult result = pool.run(program, {});
    CHECK(result.outcome == Outcome::Done);
    CHECK_EQ(count.load(), static_cast<int>(plan->size()));
    for (TaskId t = 0; t < plan->size(); ++t) {
      CHECK(result.task_begin[t] != 0 && result.task_begin[t] <= result.task_end[t]);
      for (const TaskId after : plan->successors(t)) {
        CHECK(result.task_end[t] <= result.task_begin[after]);
      }
    }
    for (int stage = 0; stage < stages; ++stage) {
      CHECK(result.peak_by_stage[stage] <= plan->limit(stage));
    }
  }
}

TEST(a_reactive_step_keeps_its_limit_of_memory) {
  const Schedule& schedule = find_schedule("interleaved-1f1b");
  PlanOptions options{.reactive = true};
  Costs costs = Costs::uniform(6);
  costs.forward.assign(6, 0.2);
  const std::vector<double> planned = simulate(make_plan(schedule, 6, 3, 8, {}), costs).peak_memory;
  // With such short `F`, ranks without a limit take more.
  CHECK(simulate(make_plan(schedule, 6, 3, 8, options), costs).peak_memory > planned);
  options.memory = {std::vector<double>(6, 1.0), {}, planned};
  const auto plan = shared_plan(make_plan(schedule, 6, 3, 8, options));
  std::mutex mutex;
  std::vector<double> held(3, 0.0);
  const auto program = program_of(plan, [&](const Action& action) {
    const int rank = plan->rank_of_stage(action.stage);
    const bool forward = action.kind == Kind::F;
    if (forward) {
      std::lock_guard lock(mutex);
      CHECK(++held[rank] <= planned[rank]);
    }
    std::this_thread::sleep_for(forward ? 20us : 200us);
    if (!forward) {
      std::lock_guard lock(mutex);
      --held[rank];
    }
  });
  Pool pool(plan->num_workers());
  CHECK(pool.run(program, with_timeout(10)).outcome == Outcome::Done);
}

// Stage 1 could run `1B0` while its next planned task, `1F1`, waits for stage 0's long `0F1`.
TEST(a_reactive_rank_waits_if_its_planned_task_is_expected_before_another_would_end) {
  const auto plan = shared_plan(
      make_plan(parse_order({{"0F0", "0F1", "0B0", "0B1"}, {"1F0", "1F1", "1B0", "1B1"}}), {.reactive = true}));
  CHECK(plan->options().looks_ahead);
  std::mutex mutex;
  std::string ran;
  std::chrono::milliseconds backward{};
  const auto program = program_of(plan, [&](const Action& action) {
    if (action.stage == 1) {
      std::lock_guard lock(mutex);
      ran += to_text(action) + ' ';
    }
    std::this_thread::sleep_for(action.kind == Kind::B ? backward : action.stage == 0 ? 100ms : 1ms);
  });
  const auto ran_in = [&](Pool& pool, bool look_ahead = true) {
    ran.clear();
    RunOptions options = with_timeout(10);
    options.look_ahead = look_ahead;
    CHECK(pool.run(program, options).outcome == Outcome::Done);
    return ran;
  };
  const std::string planned = "1F0 1F1 1B0 1B1 ", reacting = "1F0 1B0 1F1 1B1 ";
  Pool pool(2);
  backward = 1ms;
  CHECK_EQ(ran_in(pool), reacting);
  backward = 400ms;
  CHECK_EQ(ran_in(pool), reacting);  // it is taken to be as short as before
  CHECK_EQ(ran_in(pool), planned);
  CHECK_EQ(ran_in(pool, false), reacting);
}

TEST(a_process_that_looks_ahead_knows_of_the_others_what_it_has_got) {
  const auto plan = shared_plan(
      make_plan(parse_order({{"0F0", "0F1", "0B0", "0B1"}, {"1F0", "1F1", "1B0", "1B1"}}), {.reactive = true}));
  std::mutex mutex;
  std::string ran;
  std::chrono::milliseconds forward{}, backward{};
  const auto program = program_of(plan, [&](const Action& action) {
    {
      std::lock_guard lock(mutex);
      ran += to_text(action) + ' ';
    }
    std::this_thread::sleep_for(action.kind == Kind::B ? backward : forward);
  });
  HostExecutor executor(1, {"test"}, {}, 1);
  const auto step = [&] {
    ran.clear();
    std::thread other([&] {
      executor.deliver(0, 1, {0});
      std::this_thread::sleep_for(200ms);
      executor.deliver(1, 1, {1});
    });
    CHECK(executor.run(program, with_timeout(10)).outcome == Outcome::Done);
    other.join();
    return ran;
  };
  const std::string planned = "1F0 1F1 1B0 1B1 ", reacting = "1F0 1B0 1F1 1B1 ";
  forward = 100ms;
  backward = 50ms;
  CHECK_EQ(step(), reacting);  // nothing is known of times yet
  CHECK_EQ(step(), planned);   // `1F0` took as long as `0F1` is expected to take: that is due
  forward = 1ms;
  backward = 100ms;
  CHECK_EQ(step(), reacting);  // `0F1` is expected to take 100 ms, and `1B0` half of that
  CHECK_EQ(step(), planned);
  backward = 2ms;
  CHECK_EQ(step(), planned);
  CHECK_EQ(step(), reacting);  // `0F1` is overdue by 24 times the 2 ms of `1B0`
}

TEST(forward_and_backward_of_a_rank_meet_when_they_may_overlap) {
  const auto order = parse_order({{"0F0", "0F1", "0B0", "0B1"}});
  for (const bool overlap : {false, true}) {
    const auto plan = shared_plan(make_plan(order, {.overlap = overlap}));
    std::atomic<int> inside{0};
    std::atomic<bool> met{false};
    const auto program = program_of(plan, [&](const Action& action) {
      if (action != Action{0, 1, Kind::F} && action != Action{0, 0, Kind::B}) return;
      ++inside;
      for (int i = 0; i < 200 && !met; ++i) {
        if (inside == 2) met = true;
        std::this_thread::sleep_for(1ms);
      }
      --inside;
    });
    Pool pool(plan->num_workers());
    CHECK(pool.run(program, {}).outcome == Outcome::Done);
    CHECK_EQ(met.load(), overlap);
  }
}

TEST(the_first_exception_stops_the_step_and_the_next_step_runs) {
  const auto plan = shared_plan(make_plan(find_schedule("1f1b"), 3, 3, 6, {}));
  Pool pool(3);
  for (TaskId bad = 0; bad < plan->size(); ++bad) {
    std::atomic<int> after{0};
    std::atomic<bool> thrown{false};
    const Action action = plan->action(bad);
    const auto program = program_of(plan, [&](const Action& a) {
      if (thrown) ++after;
      if (a == action) {
        thrown = true;
        throw std::runtime_error("no");
      }
    });
    const StepResult result = pool.run(program, {});
    CHECK(result.outcome == Outcome::Failed);
    CHECK_EQ(result.failed_task, bad);
    CHECK_THROWS(std::rethrow_exception(result.error), std::runtime_error, "no");
    const int settled = after;
    std::this_thread::sleep_for(1ms);
    CHECK_EQ(after.load(), settled);
    CHECK(pool.run(program_of(plan, {}), {}).outcome == Outcome::Done);
  }
}

TEST(a_failure_that_comes_before_a_step_stops_it) {
  const auto plan = shared_plan(make_plan(find_schedule("1f1b"), 2, 2, 2, {}));
  Pool pool(2);
  std::atomic<int> count{0};
  const auto program = program_of(plan, [&](const Action&) { ++count; });
  CHECK(!pool.fail(std::make_exception_ptr(std::runtime_error("the first"))));
  CHECK(!pool.fail(std::make_exception_ptr(std::runtime_error("the second"))));
  const StepResult result = pool.run(program, {});
  CHECK(result.outcome == Outcome::Failed);
  CHECK_EQ(count.load(), 0);
  CHECK_THROWS(std::rethrow_exception(result.error), std::runtime_error, "the first");
  CHECK(pool.run(program, {}).outcome == Outcome::Done);
}

TEST(an_interrupt_stops_the_step_once_running_tasks_return) {
  const auto plan = shared_plan(make_plan(find_schedule("1f1b"), 2, 2, 50, {}));
  Pool pool(2);
  std::atomic<int> count{0};
  const auto program = program_of(plan, [&](const Action&) {
    ++count;
    std::this_thread::sleep_for(5ms);
  });
  RunOptions options;
  options.poll = [pressed = false]() mutable { return !std::exchange(pressed, true); };
  CHECK(pool.run(program, options).outcome == Outcome::Interrupted);
  CHECK(count < 60);
  CHECK(!pool.dead());
  CHECK(pool.run(program_of(plan, {}), {}).outcome == Outcome::Done);
}

TEST(a_body_that_does_not_return_is_abandoned) {
  static std::atomic<bool> let_go{false};
  {
    const auto plan = shared_plan(make_plan(find_schedule("1f1b"), 2, 2, 2, {}));
    Pool pool(2);
    const auto program = program_of(plan, [](const Action& a) {
      while (a == Action{1, 0, Kind::F} && !let_go) std::this_thread::sleep_for(1ms);
    });
    const StepResult result = pool.run(program, with_timeout(0.1));
    CHECK(result.outcome == Outcome::TimedOut);
    CHECK(result.waiting.find("rank 1: 1F0 is running and has not returned") != std::string::npos);
    CHECK(result.waiting.find("rank 0: 0B0 waits for 1B0 on rank 1") != std::string::npos);
    CHECK(pool.dead());
    CHECK_THROWS(pool.run(program, {}), std::logic_error, "dead");
  }
  let_go = true;  // the pool is gone; its thread must end by itself
  std::this_thread::sleep_for(50ms);
}

TEST(closing_abandons_a_body_that_does_not_return_within_a_limit) {
  static std::atomic<bool> inside{false}, let_go{false};
  const auto plan = shared_plan(make_plan(find_schedule("1f1b"), 2, 2, 2, {}));
  Pool pool(2);
  const auto program = program_of(plan, [](const Action& a) {
    if (a == Action{1, 0, Kind::F}) inside = true;
    while (a == Action{1, 0, Kind::F} && !let_go) std::this_thread::sleep_for(1ms);
  });
  StepResult result;
  std::thread busy([&] { result = pool.run(program, {}); });
  while (!inside) std::this_thread::sleep_for(1ms);
  pool.close(std::chrono::milliseconds(20));
  busy.join();
  CHECK(result.outcome == Outcome::Closed);
  CHECK(result.waiting.find("rank 1: 1F0 is running and has not returned") != std::string::npos);
  CHECK(pool.dead());
  let_go = true;  // the program must outlive its body
  std::this_thread::sleep_for(50ms);
}

TEST(a_pool_refuses_what_it_cannot_run) {
  const auto plan = shared_plan(make_plan(find_schedule("1f1b"), 2, 2, 2, {}));
  Pool pool(2);
  Pool other(3);
  CHECK_THROWS(other.run(program_of(plan, {}), {}), std::logic_error, "another number of workers");
  std::atomic<bool> inside{false};
  std::thread busy([&] {
    pool.run(program_of(plan,
                        [&](const Action&) {
                          inside = true;
                          std::this_thread::sleep_for(20ms);
                        }),
             {});
  });
  while (!inside) std::this_thread::yield();
  CHECK_THROWS(pool.run(program_of(plan, {}), {}), std::logic_error, "running a step already");
  busy.join();
  pool.close();
  CHECK_THROWS(pool.run(program_of(plan, {}), {}), std::logic_error, "closed");
}

TEST(closing_stops_a_running_step) {
  const auto plan = shared_plan(make_plan(find_schedule("1f1b"), 2, 2, 1000, {}));
  Pool pool(2);
  std::atomic<bool> inside{false};
  const auto program = program_of(plan, [&](const Action&) {
    inside = true;
    std::this_thread::sleep_for(1ms);
  });
  StepResult result;
  std::thread runner([&] { result = pool.run(program, {}); });
  while (!inside) std::this_thread::yield();
  pool.close();
  runner.join();
  CHECK(result.outcome == Outcome::Closed);
}

TEST(closing_from_inside_a_step_stops_it) {
  const auto plan = shared_plan(make_plan(find_schedule("1f1b"), 2, 2, 50, {}));
  for (const bool by_poll : {false, true}) {
    Pool pool(2);
    const auto program = program_of(plan, [&](const Action& a) {
      std::this_thread::sleep_for(2ms);
      if (!by_poll && a == Action{1, 3, Kind::B}) pool.close();
    });
    RunOptions options;
    options.poll = [&] {
      if (by_poll) pool.close();
      return false;
    };
    CHECK(pool.run(program, options).outcome == Outcome::Closed);
  }
}

TEST(a_body_may_be_missing) {
  const auto plan =
      shared_plan(make_plan(order_from_csv("0F0,0SEND_F0,0RECV_B0,0B0\n1RECV_F0,1F0,1B0,1SEND_B0\n"), {}));
  Pool pool(2);
  CHECK(pool.run(std::make_shared<Program>(plan), {}).outcome == Outcome::Done);
}

TEST(one_that_follows_runs_the_order_that_is_decided) {
  const auto plan = shared_plan(make_plan(find_schedule("gpipe"), 1, 1, 3, {.reactive = true}));
  const std::vector<TaskId> decided = {0, 3, 1, 2, 4, 5};  // 0F0 0B0 0F1 0F2 0B1 0B2
  HostExecutor executor(1, {"test"}, {}, 0, true);
  std::vector<TaskId> ran;
  std::atomic<std::size_t> count{0};
  const auto program = program_of(plan, [&](const Action& action) {
    for (TaskId task = 0; task < plan->size(); ++task) {
      if (plan->action(task).kind == action.kind && plan->action(task).microbatch == action.microbatch) {
        ran.push_back(task);
      }
    }
    ++count;
  });
  for (int step = 0; step < 20; ++step) {
    ran.clear();
    count = 0;
    const auto early = static_cast<std::size_t>(step % 7);  // what is decided before the step
    for (std::size_t i = 0; i < early; ++i) executor.decide(decided[i]);
    std::thread leader([&] {
      while (count < early) std::this_thread::sleep_for(10us);
      std::this_thread::sleep_for(100us);
      for (std::size_t i = early; i < decided.size(); ++i) executor.decide(decided[i]);
    });
    CHECK(executor.run(program, with_timeout(10)).outcome == Outcome::Done);
    leader.join();
    CHECK(ran == decided);
  }
}

TEST(one_that_follows_waits_for_decisions_and_refuses_those_of_other_plans) {
  const auto plan = shared_plan(make_plan(find_schedule("1f1b"), 2, 2, 2, {.reactive = true}));
  HostExecutor executor(1, {"test"}, {}, 1, true);
  executor.decide(5);
  const StepResult result = executor.run(program_of(plan, {}), with_timeout(0.1));
  CHECK(result.outcome == Outcome::TimedOut);
  CHECK(result.waiting.find("rank 1 follows another process, which has decided that 1B0 is next") !=
        std::string::npos);
  executor.decide(3);  // of rank 0
  CHECK_THROWS(executor.run(program_of(plan, {}), {}), std::out_of_range, "those of rank 1 are 4 to 7");
  CHECK(executor.run(program_of(plan, {}), with_timeout(0.1)).waiting.find("has decided no next task") !=
        std::string::npos);
  CHECK_THROWS(HostExecutor(2, {"a", "b"}, {}, 0, true), std::invalid_argument, "one worker");
  CHECK_THROWS(Pool(1).decide(0), std::invalid_argument, "follows no other process");
}
