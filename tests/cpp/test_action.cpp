#include "check.hpp"
#include "plan/action.hpp"

using namespace pe;

TEST(text_of_every_kind_is_read_back) {
  for (int kind = 0; kind < kNumKinds; ++kind) {
    Action action{12, 345, static_cast<Kind>(kind)};
    if (concerns_whole_stage(action.kind)) action.microbatch = kNoMicrobatch;
    CHECK(parse_cell(to_text(action)) == std::vector<Action>{action});
  }
}

TEST(an_overlapped_pair_is_read_and_written) {
  const auto pair = parse_cell(" ( 2F0 ; 1B3 ) OVERLAP_F_B ");
  CHECK_EQ(pair.size(), 2u);
  CHECK(pair[0].joins_next && !pair[1].joins_next);
  CHECK_EQ(to_cells(pair).front(), "(2F0;1B3)OVERLAP_F_B");
}

TEST(an_empty_cell_is_idle_time) { CHECK(parse_cell("  ").empty()); }

TEST(what_is_no_action_is_refused) {
  for (const char* text : {"F0", "1Q0", "1F", "1F0x", "0UNSHARD3", "-1F0", "(1F0)OVERLAP_F_B", "1F0;1B0",
                           "99999999999F0", "(1F0;1B0)OVERLAP"}) {
    CHECK_THROWS(parse_cell(text), PlanError, "is not an action");
  }
}
