// The immutable task graph of one training step. Everything that runs or simulates a step reads only the plan.
#pragma once

#include <cstddef>
#include <memory>
#include <span>
#include <vector>

#include "plan/action.hpp"
#include "plan/dependencies.hpp"
#include "plan/memory.hpp"
#include "plan/order.hpp"
#include "plan/packs.hpp"

namespace pe {

// A worker takes the tasks of a queue strictly from its head. A worker that runs in order has one queue. A
// reactive one has a queue for each stage and kind: only the microbatches of one stage and kind keep their
// planned order.
struct Queue {
  TaskId begin = 0;  // range of Plan::queued
  TaskId end = 0;
  int priority = 0;  // smaller goes first; at equal priority, the task planned earlier
};

struct PlanOptions {
  bool overlap = false;   // a rank's forward and backward stream may run at the same time
  bool reactive = false;  // a rank whose next planned task is not ready takes another that is
  Packs packs{};          // between stages on different ranks; within a rank each result is handed over alone
  Memory memory{};        // its limits hold whatever order ranks run in
  // A reactive rank waits for its next planned task if that is expected soon. Only for an order that ends as
  // planned.
  bool looks_ahead = false;
};

// The most microbatches in flight at once.
struct InFlight {
  std::vector<int> of_stage;  // if a stage has two copies: in either of them
  std::vector<int> of_rank;
};

inline constexpr int kNoStage = -1;
inline constexpr int kEveryRank = -1;

// Whether a microbatch leaves its slot of a stage when `kind` ends.
inline bool frees_slot(Kind kind, const Shape& shape) {
  return kind == Kind::B || kind == Kind::W || (kind == Kind::F && !shape.has_backward);
}

class Plan {
 public:
  // `limits`: slots by stage; empty: as many as `order` has in flight. `preference`: for a reactive plan, the
  // kinds in the order in which a rank prefers them; empty: the planned order decides. Throws PlanError, naming
  // the cell, if the order exceeds a limit of memory.
  Plan(const Order& order, const Shape& shape, PlanOptions options, std::vector<int> limits = {},
       const std::vector<Kind>& preference = {});

  TaskId size() const { return static_cast<TaskId>(actions_.size()); }
  int num_ranks() const { return static_cast<int>(rank_begin_.size()) - 1; }
  int num_stages() const { return shape_.num_stages; }
  int num_microbatches() const { return shape_.num_microbatches; }
  bool has_backward() const { return shape_.has_backward; }
  const Shape& shape() const { return shape_; }
  const PlanOptions& options() const { return options_; }

  // One worker per rank, or one per stream of a rank if streams may overlap.
  int workers_per_rank() const { return options_.overlap ? 2 : 1; }
  int num_workers() const { return num_ranks() * workers_per_rank(); }
  int rank_of_worker(int worker) const { return worker / workers_per_rank(); }
  int worker_of(TaskId task) const {
    const int rank = rank_of(task);
    return options_.overlap ? 2 * rank + static_cast<int>(stream_of(actions_[task].kind)) : rank;
  }

  const Action& action(TaskId task) const { return actions_[task]; }
  int rank_of_stage(int stage) const { return shape_.rank_of_stage[stage]; }
  int rank_of(TaskId task) const { return shape_.rank_of(actions_[task].stage, actions_[task].microbatch); }

  // Tasks are numbered rank by rank, in planned order.
  TaskId first_of_rank(int rank) const { return rank_begin_[rank]; }
  TaskId end_of_rank(int rank) const { return rank_begin_[rank + 1]; }
  Order order() const;

  // The end of the overlapped pair that begins with `task`; if it begins none, the task after it.
  TaskId end_of_cell(TaskId task) const {
    while (actions_[task].joins_next) ++task;
    return task + 1;
  }
  // Whether the simulator runs an overlapped pair as one task: only if ranks take their cells in order.
  // Otherwise, and in the executors, its parts are tasks like any other.
  bool joins_pairs() const { return has_pairs_ && !options_.overlap && !options_.reactive; }
  // The stage that receives the result of a compute action, or kNoStage.
  int stage_after(const Action& a) const {
    if (a.kind == Kind::W) return kNoStage;
    if (a.kind == Kind::F) return a.stage + 1 < num_stages() ? a.stage + 1 : kNoStage;
    return a.stage - 1;
  }
  // Whether all tasks compute, each result is sent alone, and a rank runs one task at a time as planned. Then
  // the dependencies of a task follow from its action, and a rank never has a choice.
  bool runs_in_order() const { return in_order_; }

  // Made on first use: plans that run in order may never need them.
  const Dependencies& dependencies() const;
  std::uint16_t num_dependencies(TaskId task) const { return dependencies().num_dependencies(task); }
  std::span<const TaskId> successors(TaskId task) const { return dependencies().successors(task); }
  std::vector<TaskId> dependencies_of(TaskId task) const;  // slow, for error messages

  std::span<const Queue> queues_of(int worker) const {
    return {queues_.data() + queues_begin_[worker], queues_.data() + queues_begin_[worker + 1]};
  }
  int first_queue_of(int worker) const { return queues_begin_[worker]; }
  int num_queues() const { return static_cast<int>(queues_.size()); }
  TaskId queued(TaskId position) const { return queued_.empty() ? position : queued_[position]; }

  // A microbatch occupies one slot of a stage from its `F` until its last task there.
  bool takes_slot(TaskId task) const { return actions_[task].kind == Kind::F; }
  bool frees_slot(TaskId task) const { return pe::frees_slot(actions_[task].kind, shape_); }
  // Slots of a stage; if it has two copies, of each of them.
  int limit(int stage) const { return limits_[stage]; }
  const std::vector<int>& limits() const { return limits_; }
  // The most in flight if every rank runs its cells as planned.
  const InFlight& planned_peaks() const { return planned_peaks_; }

  std::size_t nbytes() const;

  // Messages between ranks in one step. A pack is one message; each skip has messages of its own.
  int num_messages() const;  // looks at all tasks
  // Messages that are sent when `task` ends.
  int num_messages(TaskId task) const;
  // Results that are sent to other ranks when `task` ends: those of its whole pack if it is the last of it.
  int num_sent(TaskId task) const;
  // Whether some of them cross a boundary; the others are of skips.
  bool sends_to_neighbor(TaskId task) const;

 private:
  void number_tasks(const Order& order);
  void fill_queues(const std::vector<Kind>& preference);

  Shape shape_;
  PlanOptions options_;
  std::vector<Action> actions_;
  std::vector<TaskId> rank_begin_;
  std::vector<TaskId> queued_;  // empty if each worker has one queue, with its rank's tasks in order
  std::vector<Queue> queues_;
  std::vector<int> queues_begin_;
  std::vector<int> limits_;
  InFlight planned_peaks_;
  bool has_pairs_ = false;
  bool computes_alone_ = false;  // only `F`, `B`, `I` and `W`, no packs and no skips
  bool in_order_ = false;
  struct LazyDependencies;
  std::shared_ptr<LazyDependencies> lazy_;  // shared by copies of the plan
};

// The most in flight if every rank runs its list from first to last.
InFlight peak_in_flight(const Order& order, const Shape& shape);

}  // namespace pe
