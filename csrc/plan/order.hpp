// An explicit order: for each rank, its actions from first to last. It is read from text, written as text, and
// checked as far as possible without running it.
#pragma once

#include <limits>
#include <string>
#include <string_view>
#include <vector>

#include "plan/action.hpp"

namespace pe {

using Order = std::vector<std::vector<Action>>;  // by rank
using Cells = std::vector<std::vector<std::string>>;

// Throws PlanError; the message names the rank and the cell that cannot be read.
Order parse_order(const Cells& cells);
Cells to_cells(const Order& order);

// One line per rank, cells separated by commas. Empty cells are idle time and are dropped.
Order order_from_csv(std::string_view text);
std::string to_csv(const Order& order);

// The sizes and the placement that an order implies.
struct Shape {
  int num_stages = 0;
  int num_microbatches = 0;
  bool has_backward = false;
  std::vector<int> rank_of_stage;
  // With a second copy of the parameters: its rank by stage, and the first microbatch that it runs.
  std::vector<int> rank_of_copy{};
  int first_of_copy = std::numeric_limits<int>::max();

  bool on_copy(int microbatch) const { return microbatch >= first_of_copy; }
  int rank_of(int stage, int microbatch) const {
    return on_copy(microbatch) ? rank_of_copy[stage] : rank_of_stage[stage];
  }
  int num_copies() const { return rank_of_copy.empty() ? 1 : 2; }
};

// Checks that
// - every stage is on one rank, or every stage on two ranks that share the microbatches in the same way;
// - every (stage, microbatch) has one `F` and, if there is any backward, one `B` or one `I` and one `W`;
// - no action is listed twice, and none before one on the same rank that it needs;
// - every send has its receive.
// Throws PlanError; the message names the rank and the cell, and a table marks the cell.
Shape validate(const Order& order);

// Throws PlanError: names one action of a rank, says why it is refused, and marks its cell in a table.
[[noreturn]] void refuse_action(const Order& order, int rank, int position, const std::string& why);

// The cells as a table, one column per rank. "<-- ERROR HERE" stands behind the marked cell, if any.
std::string to_table(const Order& order, int marked_rank = -1, int marked_cell = -1);

}  // namespace pe
