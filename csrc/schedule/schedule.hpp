// A schedule is a placement and a policy, with a name. Nothing outside this folder knows a name.
#pragma once

#include <functional>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "plan/plan.hpp"
#include "schedule/placement.hpp"

namespace pe {

// What a rank prefers among its ready tasks, and how many microbatches a stage may have in flight.
struct Rule {
  std::vector<Kind> preference;  // first before later: F, and B or else I and W
  std::function<int(const Placement&, int stage, int microbatches)> limit;  // slots
};

// All actions of one rank, from first to last.
using OrderOfRank = std::function<std::vector<Action>(const Placement&, int rank, int microbatches)>;

// All actions of all ranks, where those of one follow from the others'.
using OrderOfRanks = std::function<Order(const Placement&, int microbatches)>;

struct Schedule {
  std::string name;
  Layout layout = Layout::Linear;
  std::variant<Rule, OrderOfRank, OrderOfRanks> policy;
};

// One file each.
Schedule gpipe();
Schedule one_forward_one_backward();
Schedule interleaved_one_forward_one_backward();
Schedule looped_bfs();
Schedule zb_h1();
Schedule zb_h2();
Schedule zbv();
Schedule v_half();
Schedule v_min();
Schedule dualpipev();
Schedule dualpipe();

const std::vector<Schedule>& schedules();
// Throws PlanError listing the names there are.
const Schedule& find_schedule(std::string_view name);

}  // namespace pe
