#include "check.hpp"
#include "plan/order.hpp"
#include "schedule/list_scheduler.hpp"
#include "simulate/make_plan.hpp"

using namespace pe;

namespace {

Order order(const Cells& cells) { return parse_order(cells); }

}  // namespace

TEST(csv_travels_both_ways) {
  const std::string text = "0F0,0SEND_F0,0RECV_B0,0B0\n1RECV_F0,1F0,1B0,1SEND_B0\n";
  CHECK_EQ(to_csv(order_from_csv(text)), text);
  CHECK_EQ(to_csv(order_from_csv("0F0,,0B0\r\n,1F0,1B0")), "0F0,0B0\n1F0,1B0\n");
}

TEST(an_unreadable_cell_is_named) {
  CHECK_THROWS(order({{"0F0", "0B0"}, {"1F0", "1X0"}}), PlanError, "rank 1, cell 1: '1X0'");
}

TEST(the_offending_cell_is_named_and_marked) {
  CHECK_THROWS(validate(order({{"0F0", "0B0", "1F0"}, {"1F0", "1B0"}})), PlanError,
               "rank 1, cell 0 '1F0': stage 1 is already on rank 0");
  CHECK_THROWS(validate(order({{"0F0", "0F0", "0B0"}})), PlanError, "rank 0, cell 1 '0F0': already listed");
  CHECK_THROWS(validate(order({{"0B0", "0F0"}})), PlanError, "rank 0, cell 0 '0B0': needs 0F0");
  CHECK_THROWS(validate(order({{"0F0", "0B0", "0F1"}})), PlanError, "stage 0 has no B for microbatch 1");
  CHECK_THROWS(validate(order({{"0F0", "0B0", "0B1"}})), PlanError, "stage 0 has no F for microbatch 1");
  CHECK_THROWS(validate(order({{"0F0", "0B0"}, {"2F0", "2B0"}})), PlanError, "stage 1 appears nowhere");
  CHECK_THROWS(validate(order({{"0F0", "0I0"}})), PlanError, "has no W for microbatch 0");
  CHECK_THROWS(validate(order({{"0F0", "0I0", "0W0", "0B0"}})), PlanError, "use B, or I and W");
  CHECK_THROWS(validate(order({{"0F0", "0SEND_F0", "0B0"}, {"1F0", "1B0"}})), PlanError,
               "its partner 1RECV_F0 appears nowhere");
  CHECK_THROWS(validate(order({{"0RECV_F0", "0F0", "0B0"}})), PlanError, "no neighbour");
  CHECK_THROWS(validate(order({{}, {}})), PlanError, "holds no action");
  CHECK_THROWS(validate(order({{"0F0", "0F0", "0B0"}})), PlanError, "<-- ERROR HERE (rank 0)");
}

TEST(an_overlapped_pair_counts_as_one_cell) {
  CHECK_THROWS(validate(order({{"(0F0;0B0)OVERLAP_F_B", "0F0"}})), PlanError, "cell 1 '0F0'");
}

TEST(a_stage_lives_on_one_rank_or_all_on_two_that_share_the_microbatches) {
  const Order both = order({{"0F0", "1F1", "1B1", "0B0"}, {"0F1", "1F0", "1B0", "0B1"}});
  const Shape shape = validate(both);
  CHECK((shape.rank_of_stage == std::vector<int>{0, 1}));
  CHECK((shape.rank_of_copy == std::vector<int>{1, 0}));
  CHECK_EQ(shape.first_of_copy, 1);
  CHECK_EQ(make_plan(both, {}).rank_of(1), 0);
  CHECK_THROWS(validate(order({{"0F0", "1F1", "1B1", "0B0", "0F2"}, {"0F1", "1F0", "1B0", "0B1"}})), PlanError,
               "rank 0, cell 4 '0F2': it belongs on rank 1");
  // Only one stage is shared.
  CHECK_THROWS(validate(order({{"0F0", "0F1", "1F1", "1B1", "0B0", "0B1"}, {"1F0", "1B0"}})), PlanError,
               "stage 1 is already on rank 1");
}

TEST(a_deadlock_over_slots_names_what_would_free_one) {
  const Order one = order({{"0F0", "0F1", "0I0", "0W0", "0I1", "0W1"}});
  const Plan plan(one, validate(one), {}, {1});
  CHECK_THROWS(check_ends(plan), PlanError,
               "  rank 0, cell 1 '0F1' needs the slot that is freed by rank 0, cell 3 '0W0'\n"
               "  rank 0, cell 3 '0W0' stands behind rank 0, cell 1 '0F1'\n");
}

TEST(a_deadlock_is_found_and_explained) {
  // Rank 0 waits for the backward of microbatch 0 before it runs the forward that rank 1 waits for.
  const Order bad = order({{"0F0", "0B0", "0F1", "0B1"}, {"1F0", "1F1", "1B0", "1B1"}});
  CHECK_THROWS(make_plan(bad, {}), PlanError, "rank 0: 0B0 waits for 1B0 on rank 1");
  CHECK_THROWS(make_plan(bad, {}), PlanError, "rank 1: 1F1 waits for 0F1 on rank 0");
  CHECK_THROWS(make_plan(bad, {}), PlanError,
               "  rank 0, cell 1 '0B0' waits for rank 1, cell 2 '1B0'\n"
               "  rank 1, cell 2 '1B0' stands behind rank 1, cell 1 '1F1'\n"
               "  rank 1, cell 1 '1F1' waits for rank 0, cell 2 '0F1'\n"
               "  rank 0, cell 2 '0F1' stands behind rank 0, cell 1 '0B0'\n");
  // It ends if a rank may run other tasks first.
  CHECK_EQ(make_plan(bad, {.overlap = true}).size(), 8u);
  CHECK_EQ(make_plan(bad, {.reactive = true}).size(), 8u);
}
