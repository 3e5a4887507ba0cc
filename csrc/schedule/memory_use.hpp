// Accounts for the memory that each rank's microbatches occupy while a plan runs.
#pragma once

#include <algorithm>
#include <utility>
#include <vector>

#include "plan/plan.hpp"

namespace pe {

class MemoryUse {
 public:
  MemoryUse(const Plan& plan, Memory memory)
      : plan_(plan), memory_(std::move(memory)), held_(plan.num_ranks(), 0.0), peak_(plan.num_ranks(), 0.0) {}

  bool limited() const { return memory_.limited(); }
  bool fits(TaskId task) const {
    const Action& a = plan_.action(task);
    const int rank = plan_.rank_of(task);
    return memory_.allows(rank, held_[rank] + memory_.takes(a.kind, a.stage));
  }
  void begin(TaskId task) {
    const Action& a = plan_.action(task);
    const int rank = plan_.rank_of(task);
    held_[rank] += memory_.takes(a.kind, a.stage);
    peak_[rank] = std::max(peak_[rank], held_[rank]);
  }
  void end(TaskId task) {
    const Action& a = plan_.action(task);
    held_[plan_.rank_of(task)] -= memory_.frees(a.kind, a.stage, plan_.has_backward());
  }

  const std::vector<double>& peak() const { return peak_; }  // by rank

 private:
  const Plan& plan_;
  Memory memory_;
  std::vector<double> held_;
  std::vector<double> peak_;
};

}  // namespace pe
