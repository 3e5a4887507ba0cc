#include "simulate/simulator.hpp"

#include <algorithm>
#include <numeric>
#include <utility>

#include "plan/interrupt.hpp"
#include "schedule/in_order.hpp"
#include "simulate/event_clock.hpp"
#include "simulate/in_order_clock.hpp"

namespace pe {
namespace {

// The time in which at least one task of the rank runs.
double busy_time(const Plan& plan, const Costs& costs, const Simulation& simulation,
                 const std::vector<double>& ends, int rank) {
  const TaskId first = plan.first_of_rank(rank);
  const TaskId end = plan.end_of_rank(rank);
  double busy = 0;
  if (!plan.options().overlap) {
    for (TaskId t = first; t < end;) {
      busy += plan.joins_pairs() ? costs.duration_of_cell(plan, t) : costs.duration(plan, t);
      t = plan.joins_pairs() ? plan.end_of_cell(t) : t + 1;
    }
    return busy;
  }
  std::vector<TaskId> tasks(end - first);
  std::iota(tasks.begin(), tasks.end(), first);
  std::sort(tasks.begin(), tasks.end(),
            [&](TaskId a, TaskId b) { return simulation.begin[a] < simulation.begin[b]; });
  double covered = 0;
  for (const TaskId t : tasks) {
    busy += std::max(0.0, ends[t] - std::max(covered, simulation.begin[t]));
    covered = std::max(covered, ends[t]);
  }
  return busy;
}

void check_times(const Plan& plan, const Simulation& simulation) {
  if (simulation.begin.size() != plan.size()) throw PlanError("the times are of another plan");
}

// Fills first_start, finish and busy.
void note_ranks(const Plan& plan, const Costs& costs, Simulation& result) {
  const std::vector<double> ends = end_times(plan, costs, result);
  for (int rank = 0; rank < plan.num_ranks(); ++rank) {
    check_interrupt();
    double start = plan.first_of_rank(rank) < plan.end_of_rank(rank) ? result.makespan : 0.0;
    double finish = 0;
    for (TaskId t = plan.first_of_rank(rank); t < plan.end_of_rank(rank); ++t) {
      start = std::min(start, result.begin[t]);
      finish = std::max(finish, ends[t]);
    }
    result.first_start.push_back(start);
    result.finish.push_back(finish);
    result.busy.push_back(busy_time(plan, costs, result, ends, rank));
  }
}

}  // namespace

double Simulation::bubble() const {
  double sum = 0;
  for (std::size_t rank = 0; rank < busy.size(); ++rank) sum += bubble_of(static_cast<int>(rank));
  return busy.empty() ? 0.0 : sum / static_cast<double>(busy.size());
}

double Simulation::bubble_from_first_start() const {
  int longest = 0;
  const auto span = [&](int rank) { return finish[rank] - first_start[rank]; };
  for (int rank = 1; rank < static_cast<int>(finish.size()); ++rank) {
    if (span(rank) > span(longest)) longest = rank;
  }
  return span(longest) > 0 ? 1.0 - busy[longest] / span(longest) : 0.0;
}

double Simulation::bubble_latest() const {
  return bubble_of(static_cast<int>(std::max_element(finish.begin(), finish.end()) - finish.begin()));
}

Simulation simulate(const Plan& plan, const Costs& costs, bool by_events, bool apart) {
  costs.validate(plan.num_stages(), plan.num_ranks(), plan.num_microbatches());
  const Memory memory = costs.memory(plan.num_stages());
  const bool in_order = plan.runs_in_order() && !by_events;
  std::vector<double> planned;
  if (in_order || memory.limited()) planned = peak_memory(plan, memory);
  if (in_order) {
    Simulation result;
    if (simulate_in_order(plan, costs, result)) {
      result.peak_memory = std::move(planned);
      return result;
    }
  }
  Simulation result;
  simulate_events(plan, costs, result, apart);
  note_ranks(plan, costs, result);
  return result;
}

std::vector<double> end_times(const Plan& plan, const Costs& costs, const Simulation& simulation) {
  costs.validate(plan.num_stages(), plan.num_ranks(), plan.num_microbatches());
  check_times(plan, simulation);
  if (!simulation.stretched_end.empty()) return simulation.stretched_end;
  std::vector<double> ends = simulation.begin;
  if (plan.joins_pairs()) {
    for (TaskId t = 0; t < plan.size();) {
      const double end = ends[t] + costs.duration_of_cell(plan, t);
      for (const TaskId next = plan.end_of_cell(t); t < next; ++t) ends[t] = end;
    }
    return ends;
  }
  for (TaskId t = 0; t < plan.size(); ++t) ends[t] += costs.duration(plan, t);
  return ends;
}

Order order_of(const Plan& plan, const Simulation& simulation) {
  check_times(plan, simulation);
  Order order;
  for (int rank = 0; rank < plan.num_ranks(); ++rank) {
    check_interrupt();
    std::vector<TaskId> tasks(plan.end_of_rank(rank) - plan.first_of_rank(rank));
    std::iota(tasks.begin(), tasks.end(), plan.first_of_rank(rank));
    std::stable_sort(tasks.begin(), tasks.end(),
                     [&](TaskId a, TaskId b) { return simulation.begin[a] < simulation.begin[b]; });
    auto& actions = order.emplace_back();
    for (const TaskId t : tasks) {
      actions.push_back(plan.action(t));
      actions.back().joins_next &= plan.joins_pairs();
    }
  }
  return order;
}

}  // namespace pe
