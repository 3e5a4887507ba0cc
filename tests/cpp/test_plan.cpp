#include <algorithm>
#include <set>

#include "check.hpp"
#include "plan/plan.hpp"
#include "schedule/schedule.hpp"
#include "simulate/make_plan.hpp"
#include "simulate/simulator.hpp"

using namespace pe;

namespace {

TaskId task_of(const Plan& plan, const std::string& text) {
  for (TaskId t = 0; t < plan.size(); ++t) {
    if (to_text(plan.action(t)) == text) return t;
  }
  return kNoTask;
}

std::set<std::string> dependencies(const Plan& plan, const std::string& text) {
  std::set<std::string> found;
  for (const TaskId t : plan.dependencies_of(task_of(plan, text))) {
    found.insert(to_text(plan.action(t)));
  }
  return found;
}

}  // namespace

TEST(a_task_depends_on_what_it_computes_from) {
  const Plan plan = make_plan(find_schedule("1f1b"), 3, 3, 4, {});
  CHECK(dependencies(plan, "0F2").empty());
  CHECK((dependencies(plan, "1F2") == std::set<std::string>{"0F2"}));
  CHECK((dependencies(plan, "2B1") == std::set<std::string>{"2F1"}));
  CHECK((dependencies(plan, "0B1") == std::set<std::string>{"0F1", "1B1"}));
  CHECK_EQ(plan.num_messages(), 2 * 2 * 4);
}

TEST(messages_stand_between_where_they_are_listed) {
  const Plan plan =
      make_plan(order_from_csv("0F0,0SEND_F0,0RECV_B0,0B0,0REDUCE_GRAD\n1RECV_F0,1F0,1I0,1SEND_B0,1W0\n"), {});
  CHECK((dependencies(plan, "1F0") == std::set<std::string>{"1RECV_F0"}));
  CHECK((dependencies(plan, "1RECV_F0") == std::set<std::string>{"0SEND_F0"}));
  CHECK((dependencies(plan, "0B0") == std::set<std::string>{"0F0", "0RECV_B0"}));
  CHECK((dependencies(plan, "1SEND_B0") == std::set<std::string>{"1I0"}));
  CHECK((dependencies(plan, "1W0") == std::set<std::string>{"1I0"}));
  CHECK((dependencies(plan, "0REDUCE_GRAD") == std::set<std::string>{"0B0"}));
  CHECK_EQ(plan.num_messages(), 2);
}

TEST(limits_of_an_order_are_what_it_has_in_flight) {
  const Plan plan = make_plan(find_schedule("gpipe"), 2, 2, 5, {});
  CHECK((plan.limits() == std::vector<int>{5, 5}));
  const Plan rule = make_plan(find_schedule("1f1b"), 4, 4, 3, {});
  CHECK((rule.limits() == std::vector<int>{3, 3, 2, 1}));
}

TEST(every_task_stands_in_one_queue_of_its_worker) {
  for (const bool overlap : {false, true}) {
    for (const bool reactive : {false, true}) {
      const Plan plan = make_plan(find_schedule("interleaved-1f1b"), 6, 3, 6, {overlap, reactive});
      std::vector<int> seen(plan.size(), 0);
      for (int worker = 0; worker < plan.num_workers(); ++worker) {
        for (const Queue& queue : plan.queues_of(worker)) {
          for (TaskId at = queue.begin; at < queue.end; ++at) {
            ++seen[plan.queued(at)];
            CHECK_EQ(plan.worker_of(plan.queued(at)), worker);
          }
        }
      }
      CHECK(std::all_of(seen.begin(), seen.end(), [](int n) { return n == 1; }));
    }
  }
}

TEST(schedules_refuse_what_they_cannot_place) {
  CHECK_THROWS(make_plan(find_schedule("1f1b"), 4, 2, 8, {}), PlanError, "exactly one stage");
  CHECK_THROWS(make_plan(find_schedule("interleaved-1f1b"), 5, 2, 8, {}), PlanError,
               "the same number of stages");
  CHECK_THROWS(find_schedule("2f2b"), PlanError, "gpipe, 1f1b, interleaved-1f1b");
}

TEST(a_group_of_results_waits_for_its_last) {
  PlanOptions options;
  options.packs.backward = {2};
  const Plan plan = make_plan(find_schedule("gpipe"), 2, 2, 5, options);
  CHECK((dependencies(plan, "0B0") == std::set<std::string>{"0F0", "1B1"}));
  CHECK((dependencies(plan, "0B1") == std::set<std::string>{"0F1", "1B1"}));
  CHECK((dependencies(plan, "0B4") == std::set<std::string>{"0F4", "1B4"}));
  CHECK((dependencies(plan, "1F3") == std::set<std::string>{"0F3"}));
  CHECK_EQ(plan.num_messages(), 5 + 3);
}

TEST(a_stage_that_mixes_whole_backwards_and_split_ones_keeps_their_order) {
  const Order order = parse_order({{"0F0", "0F1", "0B0", "0B1"}, {"1F0", "1B0", "1F1", "1I1", "1W1"}});
  PlanOptions options{.reactive = true};
  CHECK_EQ(make_plan(order, options).queues_of(1).size(), 2u);
  options.packs.backward = {2};
  const Plan plan = make_plan(order, options);
  CHECK((dependencies(plan, "0B0") == std::set<std::string>{"0F0", "1I1"}));
  CHECK((dependencies(plan, "0B1") == std::set<std::string>{"0F1", "1I1"}));
  CHECK_EQ(plan.num_messages(), 2 + 1);
}

TEST(packing_raises_the_limits_by_what_it_needs) {
  PlanOptions options;
  options.packs.backward = {2, 2, 2};
  const Plan plan = make_plan(find_schedule("1f1b"), 4, 4, 64, options);
  // A round trip takes two units longer at each of the three boundaries; nothing else waits.
  CHECK_EQ(simulate(plan, Costs::uniform(4)).makespan, 3.0 * (64 + 3) + 3 * 2.0);
  CHECK((plan.limits() == std::vector<int>{8, 6, 4, 1}));
  CHECK_THROWS(make_plan(find_schedule("1f1b"), 4, 4, 64, options, {{1, 1, 1, 1}}), PlanError,
               "allow 2 in flight");
  CHECK_EQ(make_plan(find_schedule("1f1b"), 4, 4, 64, options, {{2, 2, 2, 2}}).limit(0), 2);
}

TEST(a_pack_raises_the_limits_of_the_stages_it_delays_alone) {
  PlanOptions options;
  options.packs.backward = {8, 1, 1};
  const Plan plan = make_plan(find_schedule("1f1b"), 4, 4, 64, options);
  CHECK((plan.limits() == std::vector<int>{16, 3, 2, 1}));
  options.packs.backward = {1, 1, 1};
  options.packs.forward = {1, 2, 1};
  const Plan forward = make_plan(find_schedule("1f1b"), 4, 4, 64, options);
  CHECK_EQ(forward.limit(2), 2);
  // Between stages on one rank nothing is packed.
  options.packs.forward = {2, 2, 2};
  CHECK((make_plan(find_schedule("interleaved-1f1b"), 4, 1, 8, options).limits() ==
         make_plan(find_schedule("interleaved-1f1b"), 4, 1, 8, {}).limits()));
}

TEST(a_stage_has_the_room_it_is_given) {
  const Slots room{.room = {16, 1, 8, 1}};
  const Plan plan = make_plan(find_schedule("1f1b"), 4, 4, 64, {.reactive = true}, room);
  CHECK((plan.limits() == std::vector<int>{16, 3, 8, 1}));
  const Slots bound{.most = {6, 6, 6, 6}, .room = {16, 1, 8, 1}};
  CHECK((make_plan(find_schedule("1f1b"), 4, 4, 64, {.reactive = true}, bound).limits() ==
         std::vector<int>{6, 3, 6, 1}));
  Costs costs = Costs::uniform(4);
  costs.latency = {2, 2, 2};
  const Plan without = make_plan(find_schedule("1f1b"), 4, 4, 64, {.reactive = true});
  const Plan with = make_plan(find_schedule("1f1b"), 4, 4, 64, {.reactive = true}, {{}, {16, 12, 8, 1}});
  CHECK(simulate(with, costs).makespan < 0.7 * simulate(without, costs).makespan);
}

TEST(a_given_order_is_kept_or_refused) {
  const Order order = order_from_csv("0F0,0F1,0F2,0B0,0B1,0B2\n1F0,1B0,1F1,1B1,1F2,1B2\n");
  CHECK((make_plan(order, {}, {{3, 1}}).order() == order));
  CHECK_THROWS(make_plan(order, {}, {{2, 1}}), PlanError,
               "holds 3 microbatches at stage 0, in_flight allows 2");
  PlanOptions options;
  options.packs.backward = {2};
  CHECK((make_plan(order, options).order() == order));
  options.packs.forward = {3};
  CHECK((make_plan(order, options).order() == order));
  const Order early = order_from_csv("0F0,0B0,0F1,0B1\n1F0,1B0,1F1,1B1\n");
  options.packs.forward = {1};
  CHECK_THROWS(make_plan(early, options), PlanError, "pack fewer, give another order, or let ranks change it");
  options.reactive = true;
  CHECK_EQ(make_plan(early, options).limit(0), 2);
}

TEST(a_skip_has_its_own_message_and_its_own_k) {
  PlanOptions options;
  options.packs.skips = {{0, 3, 2, 3}, {1, 2}};
  const Plan plan = make_plan(find_schedule("gpipe"), 4, 4, 5, options);
  CHECK((dependencies(plan, "3F0") == std::set<std::string>{"2F0", "0F1"}));
  CHECK((dependencies(plan, "3F4") == std::set<std::string>{"2F4", "0F4"}));
  CHECK((dependencies(plan, "0B0") == std::set<std::string>{"0F0", "1B0", "3B2"}));
  CHECK((dependencies(plan, "2F3") == std::set<std::string>{"1F3"}));
  CHECK_EQ(plan.num_messages(task_of(plan, "0F0")), 1);
  CHECK_EQ(plan.num_messages(task_of(plan, "0F1")), 2);
  CHECK_EQ(plan.num_sent(task_of(plan, "0F1")), 1 + 2);
  CHECK_EQ(plan.num_messages(task_of(plan, "1F3")), 2);
  CHECK_EQ(plan.num_messages(), 2 * 3 * 5 + (3 + 2) + (5 + 5));
}

TEST(a_skip_is_handed_over_alone_on_one_rank) {
  PlanOptions options;
  options.packs.skips = {{0, 2, 4, 4}};  // looped: stages 0 and 2 on rank 0
  const Plan plan = make_plan(find_schedule("interleaved-1f1b"), 4, 2, 4, options);
  CHECK((dependencies(plan, "2F0") == std::set<std::string>{"1F0", "0F0"}));
  CHECK_EQ(plan.num_messages(), 2 * 3 * 4);
}

TEST(a_skip_comes_of_whole_backwards_and_split_ones) {
  PlanOptions options{.reactive = true};
  options.packs.skips = {{0, 1, 1, 2}};
  const Order order = parse_order({{"0F0", "0F1", "0B0", "0B1"}, {"1F0", "1B0", "1F1", "1I1", "1W1"}});
  const Plan plan = make_plan(order, options);
  CHECK((dependencies(plan, "0B0") == std::set<std::string>{"0F0", "1B0", "1I1"}));
  CHECK_EQ(plan.num_messages(), 2 * (1 + 1) + 2 * 1 + 1);
}

TEST(a_skip_that_packs_raises_limits_or_is_refused) {
  PlanOptions options;
  options.packs.skips = {{0, 2, 1, 1}};
  CHECK((make_plan(find_schedule("1f1b"), 4, 4, 8, options).limits() == std::vector<int>{4, 3, 2, 1}));
  options.packs.skips = {{0, 2, 8, 1}};
  CHECK_EQ(make_plan(find_schedule("1f1b"), 4, 4, 8, options).limit(0), 8);
  CHECK_THROWS(make_plan(find_schedule("1f1b"), 4, 4, 8, options, {{7, 7, 7, 7}}), PlanError,
               "allow 8 in flight");
  const Order order = order_from_csv("0F0,0B0,0F1,0B1\n1F0,1B0,1F1,1B1\n");
  options.packs.skips = {{0, 1, 2, 1}};
  CHECK_THROWS(make_plan(order, options), PlanError, "pack fewer");
  options.packs.skips = {{1, 1}};
  CHECK_THROWS(make_plan(order, options), PlanError, "a skip goes from stage 1 to stage 1");
  options.packs.skips = {{0, 2}};
  CHECK_THROWS(make_plan(order, options), PlanError, "one of the stages 0 to 1");
  options.packs.skips = {{0, 1, 3}};
  CHECK_THROWS(make_plan(order, options), PlanError, "from 1 to all 2");
}
