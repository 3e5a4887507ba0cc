// A plan laid out on device streams: the order in which the host enqueues its tasks, the stream each one runs
// on, and the ops on other streams it waits for.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "plan/plan.hpp"

namespace pe {

// When each task of a plan begins and ends in the simulation.
struct TaskTimes {
  std::vector<double> begin;
  std::vector<double> end;
};

struct StreamInfo {
  int device = 0;
  bool copies = false;  // carries copies between devices or processes; otherwise it is a lane
};

inline constexpr std::uint32_t kNoOp = ~std::uint32_t{0};

// What the host enqueues at once on a stream: a task, or the copy of a task's results to another device.
struct StreamOp {
  Action action;  // for a copy: SEND_F or SEND_B of the task's stage and microbatch
  TaskId task = kNoTask;
  int stream = 0;
  std::uint32_t waits_begin = 0;  // range of StreamPlan::waits
  std::uint32_t waits_end = 0;
  bool awaited = false;  // by another stream
  bool is_copy = false;
};

// Autograd runs the kernels of a backward on the stream of their forward, so streams belong to microbatches: a
// rank has several lanes, and a microbatch at a stage stays on one lane from its `F` to its last task there.
// Tasks that run at the same time in the simulation are on different lanes, with no chain of waits between
// them. Apart from that a rank's forwards run one after another, and so do its backwards. Without `overlap` all
// tasks of a rank run one after another on one lane.
//
// What skips carry to another device has no op of its own: the task that takes it copies it on its lane, once
// its sender has ended.
//
// Where each rank is a process, each process lays out only its own tasks. The sender of a message between
// processes enqueues the send, and the receiver the receive, at the same position in the global order of tasks.
// So no two processes wait for one another, even if the host or a stream waits for everything enqueued before.
class StreamPlan {
 public:
  // `rank`: the rank of this process; kEveryRank if this process runs all ranks. Throws PlanError unless there
  // is one device for each rank.
  StreamPlan(std::shared_ptr<const Plan> plan, const TaskTimes& times, std::vector<int> device_of_rank,
             int rank = kEveryRank);

  const Plan& plan() const { return *plan_; }
  const std::shared_ptr<const Plan>& shared_plan() const { return plan_; }
  const std::vector<int>& device_of_rank() const { return device_of_rank_; }
  const std::vector<StreamInfo>& streams() const { return streams_; }

  // In the order in which the host enqueues them.
  const std::vector<StreamOp>& ops() const { return ops_; }
  // The ops, by number, whose events an op waits for; all are on other streams.
  std::span<const std::uint32_t> waits(const StreamOp& op) const {
    return {waits_.data() + op.waits_begin, waits_.data() + op.waits_end};
  }

  // The number of a task's op; kNoOp for a task of another process.
  std::uint32_t op_of(TaskId task) const { return op_of_[task]; }
  int stream_of(TaskId task) const { return ops_[op_of_[task]].stream; }
  // The number of the op that copies the task's results to another device, or receives them from another
  // process; the task's own op if nothing is copied.
  std::uint32_t sent_by(TaskId task) const { return sent_by_[task]; }

  // The number of the first op on `stream` that runs after op `before` has ended on the device; ops().size() if
  // there is none before the end of the training step.
  std::uint32_t first_after(std::uint32_t before, int stream) const;

 private:
  std::vector<TaskId> in_order(const TaskTimes& times) const;
  void give_lanes(const std::vector<TaskId>& order, const TaskTimes& times);
  void enqueue(const std::vector<TaskId>& order);
  void connect();
  int copy_stream(int boundary, Stream direction, int device);

  bool is_here(TaskId task) const { return rank_ == kEveryRank || plan_->rank_of(task) == rank_; }
  // Whether a copy stream carries the results of `task` to `after`, which is on another rank. The task at the
  // end of a skip fetches its results itself.
  bool is_copied(TaskId task, TaskId after) const;
  void bound_memory(TaskId task, int boundary, Kind send);

  // A wait that bounds buffer memory: once `waits_for` has ended, the buffers of earlier messages are free.
  struct MemoryWait {
    std::uint32_t op;
    std::uint32_t waits_for;
  };
  // The messages across one boundary in one direction, to or from another process.
  struct Channel {
    std::vector<std::uint32_t> sends;  // ops
    std::uint32_t freed = kNoOp;       // the last op that had freed a slot before the latest receive
  };

  std::shared_ptr<const Plan> plan_;
  std::vector<int> device_of_rank_;
  int rank_;
  std::vector<StreamInfo> streams_;
  std::vector<int> lane_of_task_;
  std::vector<int> copy_streams_;     // by boundary and direction; -1: none so far
  std::vector<Channel> channels_;     // by boundary and direction
  std::vector<std::uint32_t> freed_;  // by stage, the last op so far that freed a slot
  std::vector<MemoryWait> memory_waits_;
  std::vector<StreamOp> ops_;
  std::vector<std::uint32_t> waits_;
  std::vector<std::uint32_t> op_of_;
  std::vector<std::uint32_t> sent_by_;
  std::vector<std::vector<std::uint32_t>> on_stream_;  // by stream, its ops
  // By op and stream: how many of the stream's ops have ended when the op begins.
  std::vector<std::uint32_t> ended_;
  std::vector<std::uint32_t> number_on_stream_;  // of an op among the ops of its stream
};

}  // namespace pe
