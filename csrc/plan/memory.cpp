#include "plan/memory.hpp"

#include <cmath>
#include <sstream>
#include <string>

#include "plan/plan.hpp"

namespace pe {
namespace {

[[noreturn]] void refuse_task(const Plan& plan, TaskId task, int rank, double held, double limit) {
  std::ostringstream why;
  why << "the rank would hold " << held << " of memory, its limit is " << limit
      << "; allow more, or give an order that holds less";
  refuse_action(plan.order(), rank, static_cast<int>(task - plan.first_of_rank(rank)), why.str());
}

}  // namespace

std::vector<double> peak_memory(const Plan& plan, const Memory& memory) {
  std::vector<double> peaks;
  for (int rank = 0; rank < plan.num_ranks(); ++rank) {
    double held = 0;
    double& peak = peaks.emplace_back(0);
    for (TaskId t = plan.first_of_rank(rank); t < plan.end_of_rank(rank);) {
      const TaskId end = plan.end_of_cell(t);
      double freed = 0;
      for (; t < end; ++t) {
        const Action& a = plan.action(t);
        held += memory.takes(a.kind, a.stage);
        freed += memory.frees(a.kind, a.stage, plan.has_backward());
        if (held <= peak) continue;
        peak = held;
        if (!memory.allows(rank, held)) refuse_task(plan, t, rank, held, memory.limit[rank]);
      }
      held -= freed;
    }
  }
  return peaks;
}

void Memory::validate(int num_stages, int num_ranks) const {
  check_charges("act_memory", taken, num_stages, "stages");
  if (!freed_by_input_grad.empty()) check_charges("mem_i", freed_by_input_grad, num_stages, "stages");
  if (!limit.empty()) check_charges("memory_limit", limit, num_ranks, "ranks");
}

void check_charges(const char* what, const std::vector<double>& values, int expected, const char* of_what) {
  if (static_cast<int>(values.size()) != expected) {
    throw PlanError(std::string(what) + " has " + std::to_string(values.size()) +
                    " entries; give one number, or one for each of the " + std::to_string(expected) + " " +
                    of_what);
  }
  for (const double value : values) {
    if (!std::isfinite(value) || value < 0) {
      throw PlanError(std::string(what) + " holds " + std::to_string(value) +
                      "; what is charged is finite and not negative");
    }
  }
}

}  // namespace pe
