// Which tasks of a plan each task waits for, and which wait for it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "plan/order.hpp"
#include "plan/packs.hpp"

namespace pe {

using TaskId = std::uint32_t;
inline constexpr TaskId kNoTask = ~TaskId{0};
inline constexpr int kMaxDependencies = 65534;  // of one task

// What a task sends to other ranks over skips when it ends.
struct SkipsSent {
  int messages = 0;
  int results = 0;  // in all these messages
};

class Dependencies {
 public:
  // `both_ways`: predecessors() may be asked for. Throws PlanError if a task waits for more than
  // kMaxDependencies tasks.
  Dependencies(const std::vector<Action>& actions, const Shape& shape, const Packs& packs, bool both_ways);

  std::uint16_t num_dependencies(TaskId task) const { return num_dependencies_[task]; }
  std::span<const TaskId> successors(TaskId task) const {
    return {successors_.data() + successors_begin_[task], successors_.data() + successors_begin_[task + 1]};
  }
  std::span<const TaskId> predecessors(TaskId task) const {
    return {predecessors_.data() + predecessors_begin_[task],
            predecessors_.data() + predecessors_begin_[task + 1]};
  }
  SkipsSent skips_sent(TaskId task) const { return skips_sent_.empty() ? SkipsSent{} : skips_sent_[task]; }
  std::size_t nbytes() const;

 private:
  std::vector<TaskId> successors_begin_;
  std::vector<TaskId> successors_;
  std::vector<TaskId> predecessors_begin_;  // empty unless both ways are kept
  std::vector<TaskId> predecessors_;
  std::vector<std::uint16_t> num_dependencies_;
  std::vector<SkipsSent> skips_sent_;  // by task; empty without skips
};

}  // namespace pe
