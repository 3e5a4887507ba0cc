// A schedule is a placement and a policy, with a name. No code outside this folder depends on a schedule's
// name.
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
  std::vector<Kind> preference;  // most preferred first: `F`, and `B` or both `I` and `W`
  std::function<int(const Placement&, int stage, int microbatches)> limit;  // slots
};

// The actions of one rank, from first to last.
using OrderOfRank = std::function<std::vector<Action>(const Placement&, int rank, int microbatches)>;

// The actions of all ranks, for schedules that cannot list one rank alone.
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
// Throws PlanError with the known names.
const Schedule& find_schedule(std::string_view name);

}  // namespace pe
