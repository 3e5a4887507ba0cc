// Makes plans at random, right and wrong, and executes the right ones. Under a sanitizer a wrong index, an
// overflow or a race ends the program.
//
//   random_plans COUNT SECONDS SEED    until one of the first two is reached
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <thread>

#include "check.hpp"
#include "runtime/host_executor.hpp"
#include "runtime/stream_plan.hpp"
#include "schedule/schedule.hpp"
#include "search/microbatch_order.hpp"
#include "search/zero_bubble_search.hpp"
#include "simulate/lower_bound.hpp"
#include "simulate/make_plan.hpp"
#include "simulate/simulator.hpp"
#include "sizes.hpp"

using namespace pe;

namespace {

class Chance {
 public:
  explicit Chance(std::uint64_t seed) : random_(seed) {}

  int below(int n) { return std::uniform_int_distribution(0, n - 1)(random_); }
  bool one_in(int n) { return below(n) == 0; }
  double real() { return one_in(8) ? 0.0 : std::uniform_real_distribution(0.1, 3.0)(random_); }
  // Mostly a number that fits; sometimes one that cannot.
  int odd(int fits) { return one_in(30) ? below(9) - 3 : fits; }

  std::vector<double> reals(int count) {
    std::vector<double> values;
    values.reserve(static_cast<std::size_t>(std::max(count, 0)));
    for (int i = 0; i < count; ++i) values.push_back(real());
    return values;
  }
  std::vector<int> numbers(int count, int most) {
    std::vector<int> values;
    for (int i = 0; i < std::max(0, odd(count)); ++i) values.push_back(odd(1 + below(most)));
    return values;
  }

 private:
  std::mt19937_64 random_;
};

PlanOptions options_of(Chance& chance, int stages, int microbatches) {
  PlanOptions options{.overlap = chance.one_in(2), .reactive = chance.one_in(2)};
  if (chance.one_in(4)) options.packs.forward = chance.numbers(stages - 1, microbatches);
  if (chance.one_in(4)) options.packs.backward = chance.numbers(stages - 1, microbatches);
  for (int skips = chance.one_in(4) ? chance.below(3) : 0; skips > 0; --skips) {
    const int source = chance.below(stages);
    options.packs.skips.push_back({chance.odd(source), chance.odd(source + 1 + chance.below(3)),
                                   1 + chance.below(2), 1 + chance.below(2)});
  }
  if (chance.one_in(6)) {
    options.memory = {std::vector<double>(stages, 1.0), {}, std::vector<double>(stages, 1.0 + chance.below(6))};
  }
  return options;
}

Slots slots_of(Chance& chance, int stages) {
  Slots slots;
  if (chance.one_in(5)) slots.most = chance.numbers(stages, 4);
  if (chance.one_in(5)) slots.room = chance.numbers(stages, 4);
  return slots;
}

// Changes places, kinds and numbers of some actions; adds and removes some.
void harm(Chance& chance, Order& order) {
  for (int times = chance.below(4); times > 0; --times) {
    std::vector<Action>& actions = order[chance.below(static_cast<int>(order.size()))];
    if (actions.empty()) continue;
    const auto at = actions.begin() + chance.below(static_cast<int>(actions.size()));
    switch (chance.below(5)) {
      case 0:
        std::iter_swap(at, actions.begin() + chance.below(static_cast<int>(actions.size())));
        break;
      case 1:
        if (!at->joins_next) actions.erase(at);
        break;
      case 2:
        if (!concerns_whole_stage(at->kind)) at->microbatch = chance.below(6);  // no text has one
        break;
      case 3:
        at->stage = chance.below(6);
        break;
      default:
        actions.insert(actions.begin(), {chance.below(4), kNoMicrobatch, Kind::Unshard});
    }
  }
  for (std::vector<Action>& actions : order) {
    if (!actions.empty()) actions.back().joins_next = false;
  }
}

Plan random_plan(Chance& chance) {
  const Schedule& schedule = schedules()[chance.below(static_cast<int>(schedules().size()))];
  const Size size = size_of(schedule, 1 + chance.below(4), 1 + chance.below(2));
  const int microbatches = 1 + chance.below(6);
  const PlanOptions options = options_of(chance, size.stages, microbatches);
  const Slots slots = slots_of(chance, size.stages);
  if (chance.one_in(3)) {
    Order order = make_plan(schedule, size.stages, size.ranks, microbatches, {}).order();
    harm(chance, order);
    return make_plan(order, options, slots);
  }
  if (chance.one_in(10)) {
    return make_forward_plan(chance.numbers(4, 3), chance.odd(4), chance.odd(microbatches), options.overlap,
                             options.packs.skips, options.reactive);
  }
  return make_plan(schedule, chance.odd(size.stages), chance.odd(size.ranks), chance.odd(microbatches), options,
                   slots);
}

Costs random_costs(Chance& chance, const Plan& plan) {
  const int stages = plan.num_stages();
  Costs costs = Costs::uniform(stages);
  costs.forward = chance.reals(stages);
  costs.input_grad = chance.reals(stages);
  costs.latency = chance.reals(stages - 1);
  if (chance.one_in(2)) costs.overhead = chance.reals(stages - 1);
  if (chance.one_in(2)) costs.transfer = chance.reals(stages - 1);
  if (chance.one_in(3)) costs.contention = 1.0 + chance.real();
  if (chance.one_in(4)) costs.noise = {chance.real(), 7};
  if (chance.one_in(3)) {
    const int rows = chance.one_in(2) ? 1 : stages;
    const int kinds = chance.one_in(2) ? 1 : MicrobatchFactors::kKinds;
    costs.microbatch = {chance.reals(rows * plan.num_microbatches() * kinds),
                        {rows, plan.num_microbatches(), kinds}};
  }
  return costs;
}

// A plan whose ranks look ahead ends whatever they know of one another.
Simulation simulate_ending(const Plan& plan, const Costs& costs, bool apart) {
  try {
    return simulate(plan, costs, false, apart);
  } catch (const PlanError& error) {
    const bool ends = std::string(error.what()).find("never ends") == std::string::npos;
    CHECK(ends || !plan.options().looks_ahead);
    throw;
  }
}

void simulate_both(const Plan& plan, const Costs& costs) {
  const Simulation times = simulate_ending(plan, costs, false);
  simulate_ending(plan, costs, true);
  if (plan.runs_in_order()) CHECK_EQ(times.makespan, simulate(plan, costs, true).makespan);
  CHECK_EQ(end_times(plan, costs, times).size(), plan.size());
  CHECK_EQ(order_of(plan, times).size(), static_cast<std::size_t>(plan.num_ranks()));
}

void lay_out(Chance& chance, const std::shared_ptr<const Plan>& plan, const Costs& costs) {
  const Simulation times = simulate(*plan, costs);
  std::vector<int> devices(plan->num_ranks());
  for (int& device : devices) device = chance.below(2);
  const int rank =
      chance.one_in(2) || !plan->options().packs.skips.empty() ? kEveryRank : chance.below(plan->num_ranks());
  const StreamPlan laid(plan, {times.begin, end_times(*plan, costs, times)}, devices, rank);
  for (std::uint32_t op = 0; op < laid.ops().size(); ++op) {
    for (int stream = 0; stream < static_cast<int>(laid.streams().size()); ++stream) {
      CHECK(laid.first_after(op, stream) > op);
    }
  }
}

// Executors by their number of workers, for all plans.
HostExecutor& executor_of(int workers) {
  static std::map<int, std::unique_ptr<HostExecutor>> made;
  auto& executor = made[workers];
  if (!executor) {
    executor = std::make_unique<HostExecutor>(workers, std::vector<std::string>(workers, "worker"),
                                              HostExecutor::ThreadHooks{});
  }
  return *executor;
}

// Runs a step; one body in some plans throws.
void execute(Chance& chance, const std::shared_ptr<const Plan>& plan) {
  const auto program = std::make_shared<Program>(plan);
  std::atomic<TaskId> ran{0};
  const TaskId fails = chance.one_in(4) ? chance.below(static_cast<int>(plan->size())) : kNoTask;
  for (int stage = 0; stage < plan->num_stages(); ++stage) {
    for (int kind = 0; kind < kNumKinds; ++kind) {
      program->set_body(stage, static_cast<Kind>(kind), [&ran, fails](const Action&) {
        if (ran % 7 == 3) std::this_thread::sleep_for(std::chrono::microseconds(50));
        if (ran++ == fails) throw std::runtime_error("planted");
      });
    }
  }
  // In a second step, ranks look ahead by the times of the first.
  for (int step = 0; step < 2; ++step) {
    ran = 0;
    RunOptions options;
    options.record = chance.one_in(2);
    options.timeout = std::chrono::seconds(60);
    const StepResult result = executor_of(plan->num_workers()).run(program, options);
    CHECK(result.outcome == (fails == kNoTask ? Outcome::Done : Outcome::Failed));
    if (fails == kNoTask) CHECK_EQ(ran.load(), plan->size());
  }
}

void search(Chance& chance, const Plan& plan, const Costs& costs) {
  if (!plan.shape().rank_of_copy.empty() || !plan.has_backward()) return;
  const Problem problem({plan.num_ranks(), plan.shape().rank_of_stage}, plan.num_microbatches(), costs,
                        chance.one_in(2) ? Objective::Span : Objective::Makespan);
  const Found found = search_zero_bubble(problem, {plan.order()}, {.work = 100, .seed = 3, .threads = 2});
  CHECK(found.score.time >= 0.999 * problem.lower_bound());
}

void order(const Plan& plan, const Costs& costs) {
  const MicrobatchOrder found = order_microbatches(plan, costs, 20, 3);
  CHECK(found.makespan <= found.given);
  Costs reordered = costs;
  reordered.microbatch = costs.microbatch.reordered(found.order);
  CHECK_EQ(simulate(plan, reordered).makespan, found.makespan);
}

}  // namespace

int main(int count, char** arguments) {
  const long most = count > 1 ? std::strtol(arguments[1], nullptr, 10) : 1000;
  const std::chrono::duration<double> time(count > 2 ? std::strtod(arguments[2], nullptr) : 10.0);
  const std::uint64_t seed = count > 3 ? std::strtoull(arguments[3], nullptr, 10) : 0;
  const auto begin = std::chrono::steady_clock::now();
  long made = 0, refused = 0, executed = 0;
  for (; made < most && std::chrono::steady_clock::now() - begin < time; ++made) {
    Chance chance(seed + static_cast<std::uint64_t>(made));
    const int before = check::failures();
    try {
      const auto plan = std::make_shared<const Plan>(random_plan(chance));
      const Costs costs = random_costs(chance, *plan);
      simulate_both(*plan, costs);
      if (chance.one_in(4)) lay_out(chance, plan, costs);
      if (chance.one_in(8)) {
        execute(chance, plan);
        ++executed;
      }
      if (chance.one_in(64)) search(chance, *plan, costs);
      if (chance.one_in(16)) order(*plan, costs);
    } catch (const PlanError&) {
      ++refused;
    }
    if (check::failures() != before) std::printf("  in the plan of seed %lu\n", seed + made);
  }
  std::printf("%ld plans, %ld refused, %ld executed, %d failed checks\n", made, refused, executed,
              check::failures());
  return check::failures() != 0;
}
