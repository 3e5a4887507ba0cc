#include "runtime/stream_plan.hpp"

#include <algorithm>
#include <bitset>
#include <map>
#include <numeric>
#include <random>
#include <set>
#include <string>

#include "check.hpp"
#include "simulate/make_plan.hpp"
#include "sizes.hpp"
#include "times.hpp"

using namespace pe;

namespace {

using Random = std::mt19937;
using Ops = std::bitset<1024>;        // more than any plan here has
using AtStage = std::pair<int, int>;  // stage and microbatch

AtStage at_stage(const Action& action) { return {action.stage, action.microbatch}; }

// A plan, its simulated times, and its layout on streams.
struct Case {
  Case(const Plan& made, const Costs& costs, std::vector<int> device_of_rank)
      : Case(std::make_shared<const Plan>(made), times_of(made, costs), std::move(device_of_rank)) {}

  Case(std::shared_ptr<const Plan> of_plan, TaskTimes simulated, std::vector<int> device_of_rank,
       int rank = kEveryRank)
      : plan(std::move(of_plan)),
        times(std::move(simulated)),
        laid(plan, times, std::move(device_of_rank), rank) {
    before.resize(laid.ops().size());
    std::vector<std::vector<std::uint32_t>> on_stream(laid.streams().size());
    for (std::uint32_t i = 0; i < before.size(); ++i) {
      const StreamOp& op = laid.ops()[i];
      auto& own = on_stream[op.stream];
      if (!own.empty()) follow(before[i], own.back());
      for (const std::uint32_t other : laid.waits(op)) follow(before[i], other);
      own.push_back(i);
    }
  }

  void follow(Ops& ops, std::uint32_t other) const { ops |= Ops(before[other]).set(other); }

  int device_of(TaskId task) const { return laid.device_of_rank()[plan->rank_of(task)]; }

  // In the simulation.
  bool run_together(TaskId a, TaskId b) const {
    return times.begin[a] < times.end[b] && times.begin[b] < times.end[a];
  }

  bool any_run_together(const AtStage& a, const AtStage& b) const {
    for (TaskId t = 0; t < plan->size(); ++t) {
      for (TaskId u = 0; u < plan->size(); ++u) {
        if (at_stage(plan->action(t)) != a || at_stage(plan->action(u)) != b) continue;
        if (run_together(t, u)) return true;
      }
    }
    return false;
  }

  std::shared_ptr<const Plan> plan;
  TaskTimes times;
  StreamPlan laid;
  std::vector<Ops> before;  // by op: the ops that must have ended when it begins, by streams and waits
};

Costs random_costs(int stages, Random& random) {
  std::uniform_real_distribution<double> cost(0.1, 3.0);
  Costs costs = Costs::uniform(stages);
  const bool some_are_free = random() % 4 == 0;
  for (auto* of : {&costs.forward, &costs.backward, &costs.input_grad, &costs.weight_grad}) {
    for (double& value : *of) value = some_are_free && random() % 3 == 0 ? 0.0 : cost(random);
  }
  for (double& value : costs.latency) value = random() % 2 == 0 ? 0.0 : cost(random);
  if (random() % 2 == 0) costs.contention = 1.0 + cost(random);
  return costs;
}

// All ranks on device 0, each on its own, or any.
std::vector<int> random_devices(int ranks, Random& random) {
  std::vector<int> devices(ranks, 0);
  const int choice = random() % 3;
  if (choice == 1) std::iota(devices.begin(), devices.end(), 0);
  if (choice == 2) std::generate(devices.begin(), devices.end(), [&] { return random() % 3; });
  return devices;
}

// The same order, with every message between ranks listed, each stage's gradients reduced at the end, and, if
// `split`, each `B` replaced by `I` and `W`.
Order spelt_out(const Plan& plan, bool split) {
  const auto leaves = [&](int stage, int to) {
    return to >= 0 && to < plan.num_stages() && plan.rank_of_stage(stage) != plan.rank_of_stage(to);
  };
  Order order;
  for (const auto& actions : plan.order()) {
    auto& spelt = order.emplace_back();
    std::set<int> stages;
    for (const Action& a : actions) {
      stages.insert(a.stage);
      if (a.kind == Kind::W) {
        spelt.push_back(a);
        continue;
      }
      const bool forward = a.kind == Kind::F;
      const int from = forward ? a.stage - 1 : a.stage + 1, to = forward ? a.stage + 1 : a.stage - 1;
      if (leaves(a.stage, from)) {
        spelt.push_back({a.stage, a.microbatch, forward ? Kind::RecvF : Kind::RecvB});
      }
      spelt.push_back({a.stage, a.microbatch, a.kind == Kind::B && split ? Kind::I : a.kind});
      if (leaves(a.stage, to)) {
        spelt.push_back({a.stage, a.microbatch, forward ? Kind::SendF : Kind::SendB});
      }
      if (a.kind == Kind::B && split) spelt.push_back({a.stage, a.microbatch, Kind::W});
    }
    for (const int stage : stages) spelt.push_back({stage, kNoMicrobatch, Kind::ReduceGrad});
  }
  return order;
}

Case random_case(const Schedule& schedule, bool overlap, Random& random) {
  const auto [stages, ranks] = size_of(schedule, 1 + random() % 4, 1 + random() % 3);
  const int microbatches = 1 + random() % 9;
  PlanOptions options{.overlap = overlap, .reactive = random() % 2 == 0};
  const int kind_of_case = random() % 4;
  if (kind_of_case == 0 && stages > 1) {
    for (auto* packs : {&options.packs.forward, &options.packs.backward}) {
      const int k = std::min(random() % 2 == 0 ? 2 : 4, microbatches);
      for (int boundary = 0; boundary < stages - 1; ++boundary) packs->push_back(k);
    }
  }
  Plan plan = make_plan(schedule, stages, ranks, microbatches, options);
  if (kind_of_case == 1) plan = make_plan(spelt_out(plan, random() % 2 == 0), options);
  if (kind_of_case == 2) {
    plan = make_forward_plan(plan.shape().rank_of_stage, ranks, microbatches, overlap);
  }
  return {plan, random_costs(stages, random), random_devices(ranks, random)};
}

const std::vector<Case>& cases() {
  static const std::vector<Case> all = [] {
    std::vector<Case> made;
    Random random(11);
    for (const Schedule& schedule : schedules()) {
      if (schedule.layout == Layout::Bidirectional) continue;  // planned and simulated, but not run
      for (const bool overlap : {false, true}) {
        for (int round = 0; round < 60; ++round) made.push_back(random_case(schedule, overlap, random));
      }
    }
    // With integer times many tasks begin exactly when others end, and messages take no time.
    for (const double backward : {1.0, 2.0, 3.0}) {
      const Plan plan = make_plan(find_schedule("gpipe"), 2, 2, 6, {});
      Costs costs = Costs::uniform(2);
      costs.backward = {backward, backward};
      made.emplace_back(make_plan(spelt_out(plan, false), {.overlap = true}), costs, std::vector{0, 0});
    }
    return made;
  }();
  return all;
}

}  // namespace

TEST(each_task_is_enqueued_once_and_so_is_each_copy_to_another_device) {
  for (const Case& c : cases()) {
    std::vector<int> tasks(c.plan->size(), 0), copies(c.plan->size(), 0);
    for (const StreamOp& op : c.laid.ops()) {
      const bool own = op.action == c.plan->action(op.task);
      ++(own ? tasks : copies)[op.task];
      if (own) continue;
      const Action& sent = c.plan->action(op.task);
      const Kind send = stream_of(sent.kind) == Stream::Forward ? Kind::SendF : Kind::SendB;
      CHECK((op.action == Action{sent.stage, sent.microbatch, send}));
      CHECK(op.is_copy);
    }
    for (TaskId t = 0; t < c.plan->size(); ++t) {
      std::set<int> elsewhere;
      for (const TaskId after : c.plan->successors(t)) elsewhere.insert(c.device_of(after));
      elsewhere.erase(c.device_of(t));
      const Kind kind = c.plan->action(t).kind;
      const bool is_send = kind == Kind::SendF || kind == Kind::SendB;
      CHECK_EQ(tasks[t], 1);
      CHECK_EQ(copies[t], !elsewhere.empty() && !is_send ? 1 : 0);
      const StreamOp& own = c.laid.ops()[c.laid.op_of(t)];
      const StreamOp& copy = c.laid.ops()[c.laid.sent_by(t)];
      CHECK(own.action == c.plan->action(t) && copy.task == t);
      CHECK_EQ(own.is_copy, is_send && !elsewhere.empty());
      CHECK_EQ(copy.is_copy, !elsewhere.empty());
      CHECK(elsewhere.empty() || elsewhere == std::set<int>{c.laid.streams()[copy.stream].device});
      CHECK(own.is_copy || c.laid.streams()[own.stream].device == c.device_of(t));
    }
    for (const StreamOp& op : c.laid.ops()) {
      CHECK_EQ(op.is_copy, c.laid.streams()[op.stream].copies);
    }
  }
}

TEST(what_a_task_needs_has_ended_when_it_begins) {
  for (const Case& c : cases()) {
    for (TaskId t = 0; t < c.plan->size(); ++t) {
      const std::uint32_t own = c.laid.op_of(t), sent = c.laid.sent_by(t);
      CHECK(sent == own || c.before[sent][own]);
      for (const TaskId after : c.plan->successors(t)) {
        const bool elsewhere = c.device_of(after) != c.device_of(t);
        CHECK(c.before[c.laid.op_of(after)][elsewhere ? sent : own]);
      }
    }
  }
}

TEST(a_worker_runs_one_task_after_another_in_the_simulated_order) {
  for (const Case& c : cases()) {
    std::vector<std::int64_t> last(c.plan->num_workers(), -1);
    std::map<std::pair<int, Kind>, TaskId> latest;  // by stage and kind
    for (std::uint32_t i = 0; i < c.before.size(); ++i) {
      const StreamOp& op = c.laid.ops()[i];
      if (op.is_copy) continue;
      std::int64_t& previous = last[c.plan->worker_of(op.task)];
      if (previous >= 0) {
        CHECK(c.before[i][previous]);
        CHECK(c.times.begin[c.laid.ops()[previous].task] <= c.times.begin[op.task]);
      }
      previous = i;
      const auto [of_kind, first] = latest.try_emplace({op.action.stage, op.action.kind}, op.task);
      CHECK(first || of_kind->second < op.task);  // the microbatches keep their declared order
      of_kind->second = op.task;
    }
  }
}

TEST(what_the_simulation_runs_at_the_same_time_may_run_at_the_same_time) {
  int together = 0;
  for (const Case& c : cases()) {
    for (TaskId t = 0; t < c.plan->size(); ++t) {
      for (TaskId u = 0; u < t; ++u) {
        if (c.plan->rank_of(t) != c.plan->rank_of(u) || !c.run_together(t, u)) continue;
        // Pairs are joined in the simulation only; on one stream their parts run one after the other.
        if (c.plan->joins_pairs() && c.plan->end_of_cell(u) > t) continue;
        ++together;
        const std::uint32_t a = c.laid.op_of(t), b = c.laid.op_of(u);
        CHECK(c.laid.stream_of(t) != c.laid.stream_of(u));
        CHECK(!c.before[a][b] && !c.before[b][a]);
      }
    }
  }
  CHECK(together > 500);
}

TEST(a_microbatch_keeps_its_lane_at_a_stage) {
  for (const Case& c : cases()) {
    std::map<AtStage, int> lane;
    for (const StreamOp& op : c.laid.ops()) {
      if (op.is_copy || op.action.microbatch == kNoMicrobatch) continue;
      const auto known = lane.try_emplace(at_stage(op.action), op.stream).first;
      CHECK_EQ(known->second, op.stream);
    }
  }
}

TEST(a_stream_waits_for_nothing_that_has_ended_anyway) {
  for (const Case& c : cases()) {
    std::vector<bool> awaited(c.before.size(), false);
    std::vector<Ops> known(c.laid.streams().size());  // by stream: what has ended so far, and its own ops
    for (std::uint32_t i = 0; i < c.before.size(); ++i) {
      const StreamOp& op = c.laid.ops()[i];
      const auto waits = c.laid.waits(op);
      for (const std::uint32_t other : waits) {
        awaited[other] = true;
        CHECK(c.laid.ops()[other].stream != op.stream);
        Ops without = known[op.stream];
        for (const std::uint32_t another : waits) {
          if (another != other) c.follow(without, another);
        }
        CHECK(!without[other]);
      }
      known[op.stream] = Ops(c.before[i]).set(i);
    }
    for (std::uint32_t i = 0; i < c.before.size(); ++i) CHECK_EQ(c.laid.ops()[i].awaited, awaited[i]);
  }
}

TEST(first_after_is_the_first_op_of_a_stream_that_comes_after) {
  for (const Case& c : cases()) {
    const std::uint32_t end = static_cast<std::uint32_t>(c.before.size());
    for (int stream = 0; stream < static_cast<int>(c.laid.streams().size()); ++stream) {
      for (std::uint32_t i = 0; i < end; ++i) {
        const auto comes_after = [&](std::uint32_t op) {
          return c.laid.ops()[op].stream == stream && c.before[op][i];
        };
        std::uint32_t first = 0;
        while (first < end && !comes_after(first)) ++first;
        CHECK_EQ(c.laid.first_after(i, stream), first);
      }
    }
  }
}

TEST(a_rank_has_one_lane_or_with_overlap_as_few_as_do) {
  std::size_t most = 0;
  for (const Case& c : cases()) {
    std::map<AtStage, int> lane;
    std::vector<std::set<int>> lanes(c.plan->num_ranks());
    for (const StreamOp& op : c.laid.ops()) {
      if (op.is_copy) continue;
      const int rank = c.plan->rank_of(op.task);
      lane.try_emplace(at_stage(op.action), op.stream);
      if (lanes[rank].contains(op.stream)) continue;
      // From the fifth lane on, a new one is for a microbatch that runs beside one on each other lane.
      for (const int other : lanes[rank].size() < 4 ? std::set<int>{} : lanes[rank]) {
        CHECK(std::any_of(lane.begin(), lane.end(), [&](const auto& known) {
          return known.second == other && c.any_run_together(known.first, at_stage(op.action));
        }));
      }
      lanes[rank].insert(op.stream);
    }
    for (const auto& of_rank : lanes) {
      most = std::max(most, of_rank.size());
      CHECK(c.plan->options().overlap || of_rank.size() == 1);
    }
  }
  CHECK(most > 4);
}

TEST(processes_enqueue_what_they_run_send_and_receive_in_the_one_order_of_all_tasks) {
  for (const Case& c : cases()) {
    for (int rank = 0; rank < c.plan->num_ranks(); ++rank) {
      const Case own(c.plan, c.times, std::vector<int>(c.plan->num_ranks(), 0), rank);
      for (TaskId t = 0; t < c.plan->size(); ++t) {
        const bool is_here = c.plan->rank_of(t) == rank;
        CHECK_EQ(is_here, own.laid.op_of(t) != kNoOp);
        for (const TaskId after : c.plan->successors(t)) {
          const bool goes_here = c.plan->rank_of(after) == rank;
          if (!is_here && !goes_here) continue;
          const bool crosses = is_here != goes_here;
          const std::uint32_t made = crosses ? own.laid.sent_by(t) : own.laid.op_of(t);
          CHECK(!crosses || own.laid.ops()[made].is_copy);
          CHECK(!goes_here || own.before[own.laid.op_of(after)][made]);
        }
      }
      std::uint32_t last = 0;
      for (const StreamOp& op : own.laid.ops()) {
        CHECK(op.is_copy || c.plan->rank_of(op.task) == rank);
        CHECK_EQ(op.is_copy, own.laid.streams()[op.stream].copies);
        CHECK(last <= c.laid.op_of(op.task));
        last = c.laid.op_of(op.task);
      }
    }
  }
}

TEST(what_skips_carry_to_another_device_is_waited_for_but_copied_by_nobody_else) {
  Random random(5);
  for (const Schedule& schedule : schedules()) {
    if (schedule.layout == Layout::Bidirectional) continue;
    for (int round = 0; round < 40; ++round) {
      const auto [stages, ranks] = size_of(schedule, 2 + random() % 3, 1 + random() % 2);
      const int microbatches = 2 + random() % 7;
      PlanOptions options{.overlap = random() % 2 == 0, .reactive = true};
      if (random() % 2 == 0) options.packs.forward = options.packs.backward = std::vector<int>(stages - 1, 2);
      const Plan plain = make_plan(schedule, stages, ranks, microbatches, options);
      const auto k = [&] { return 1 + static_cast<int>(random() % 2); };
      options.packs.skips = {{0, stages - 1, k(), k()}, {stages - 2, stages - 1, k(), k()}};
      const Case c{make_plan(plain.order(), options), random_costs(stages, random),
                   random_devices(ranks, random)};
      std::map<std::string, TaskId> task;  // the two plans number their tasks differently
      for (TaskId t = 0; t < c.plan->size(); ++t) task[to_text(c.plan->action(t))] = t;
      for (TaskId number = 0; number < plain.size(); ++number) {
        const TaskId t = task[to_text(plain.action(number))];
        const std::uint32_t own = c.laid.op_of(t), sent = c.laid.sent_by(t);
        bool copied = false;
        for (const TaskId across : plain.successors(number)) {
          const TaskId after = task[to_text(plain.action(across))];
          copied |= c.device_of(after) != c.device_of(t);
          CHECK(c.before[c.laid.op_of(after)][c.device_of(after) == c.device_of(t) ? own : sent]);
        }
        CHECK_EQ(sent != own, copied);
        for (const TaskId after : c.plan->successors(t)) CHECK(c.before[c.laid.op_of(after)][own]);
      }
    }
  }
}

TEST(a_stage_keeps_the_order_of_its_microbatches_where_tasks_take_no_time) {
  const Order order = order_from_csv(
      "0F0,0SEND_F0,0F1,0SEND_F1,0RECV_B0,0RECV_B1,0B0,0B1\n"
      "1RECV_F0,1F0,1RECV_F1,1F1,1B0,1B1,1SEND_B1,1SEND_B0\n");
  const auto plan = std::make_shared<const Plan>(make_plan(order, {}));
  Costs costs = Costs::uniform(2);
  costs.backward = {0.0, 0.0};
  const StreamPlan laid(plan, times_of(*plan, costs), {0, 0});
  CHECK(laid.op_of(6) < laid.op_of(7));  // 0B0 and 0B1
}

TEST(a_stream_plan_refuses_what_is_of_another_plan) {
  const auto plan = std::make_shared<const Plan>(make_plan(find_schedule("gpipe"), 2, 2, 2, {}));
  const TaskTimes times = times_of(*plan, Costs::uniform(2));
  CHECK_THROWS(StreamPlan(plan, times, {0}), PlanError, "there are 1 devices for 2 ranks");
  CHECK_THROWS(StreamPlan(plan, {{0.0}, {1.0}}, {0, 0}), PlanError, "the times are of another plan");
  PlanOptions options;
  options.packs.skips = {{0, 1}};
  const auto skips = std::make_shared<const Plan>(make_plan(find_schedule("gpipe"), 2, 2, 2, options));
  CHECK_THROWS(StreamPlan(skips, times_of(*skips, Costs::uniform(2)), {0, 0}, 1), PlanError,
               "skips between the GPUs of several processes are not laid out");
}
