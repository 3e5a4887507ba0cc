// An explicit order: for each rank, its actions from first to last. Read from and written to text,
// and checked for what can be seen without running it.
#pragma once

#include <limits>
#include <string>
#include <string_view>
#include <vector>

#include "plan/action.hpp"

namespace pe {

using Order = std::vector<std::vector<Action>>;  // by rank
using Cells = std::vector<std::vector<std::string>>;

// Throws PlanError naming rank and cell of what cannot be read.
Order parse_order(const Cells& cells);
Cells to_cells(const Order& order);

// One line a rank, cells separated by commas; empty cells are idle time and are dropped.
Order order_from_csv(std::string_view text);
std::string to_csv(const Order& order);

// The shape an order implies.
struct Shape {
  int num_stages = 0;
  int num_microbatches = 0;
  bool has_backward = false;
  std::vector<int> rank_of_stage;
  // Where there is a second copy of the parameters: its ranks, by stage, and the first microbatch it runs.
  std::vector<int> rank_of_copy{};
  int first_of_copy = std::numeric_limits<int>::max();

  bool on_copy(int microbatch) const { return microbatch >= first_of_copy; }
  int rank_of(int stage, int microbatch) const {
    return on_copy(microbatch) ? rank_of_copy[stage] : rank_of_stage[stage];
  }
  int num_copies() const { return rank_of_copy.empty() ? 1 : 2; }
};

// Every stage on one rank, or all on two that share the microbatches alike; every (stage, microbatch) with one
// F and, if there is any backward at all, one B or one I and one W; nothing twice; on its own rank no action
// before one it needs; every send with its receive. Throws PlanError naming rank and cell, with a table that
// marks it.
Shape validate(const Order& order);

// Throws PlanError: says of one of a rank's actions why it cannot be, with a table that marks its cell.
[[noreturn]] void refuse_action(const Order& order, int rank, int position, const std::string& why);

// A grid of cells, one column a rank; the marked cell (if any) carries "<-- ERROR HERE".
std::string to_table(const Order& order, int marked_rank = -1, int marked_cell = -1);

}  // namespace pe
