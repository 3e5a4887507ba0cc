// A plan laid out on device streams: in which order the host enqueues its tasks, on which stream each one
// runs, and for which others it waits there.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "plan/plan.hpp"

namespace pe {

// When each task of a plan begins and ends, as the simulator has it.
struct TaskTimes {
  std::vector<double> begin;
  std::vector<double> end;
};

struct StreamInfo {
  int device = 0;
  bool copies = false;  // from another device to this one, or to or from another process; otherwise a lane
};

inline constexpr std::uint32_t kNoStep = ~std::uint32_t{0};

// One thing the host enqueues: a task, or the copy that takes a task's results to another device.
struct Enqueued {
  Action action;  // of a copy: SEND_F or SEND_B of the task's stage and microbatch
  TaskId task = kNoTask;
  int stream = 0;
  std::uint32_t waits_begin = 0;  // range of StreamPlan::waits
  std::uint32_t waits_end = 0;
  bool awaited = false;  // by another stream
  bool is_copy = false;
};

// The kernels of a backward run on the stream that their forward ran on, so that streams are given to
// microbatches: a rank has several lanes, and each microbatch at a stage keeps one from its F to its last task.
// What the simulation runs at the same time lies on different lanes, with no path of waits between.
// Otherwise a rank's forwards run one after another, and its backwards; without `overlap` all its tasks, on
// one lane.
//
// Where each rank is a process, one of them lays out its own tasks alone. A copy to another process is enqueued
// here as it is sent, and there, at the same place in the order of all tasks, as it is received. So whatever
// waits for the end of what was enqueued before, host or stream, no two of them wait for one another.
class StreamPlan {
 public:
  // `rank`: the process's; kEveryRank: it has all. Throws PlanError if there are not as many devices as ranks.
  StreamPlan(std::shared_ptr<const Plan> plan, const TaskTimes& times, std::vector<int> device_of_rank,
             int rank = kEveryRank);

  const Plan& plan() const { return *plan_; }
  const std::shared_ptr<const Plan>& shared_plan() const { return plan_; }
  const std::vector<int>& device_of_rank() const { return device_of_rank_; }
  const std::vector<StreamInfo>& streams() const { return streams_; }

  // In the order in which the host enqueues them.
  const std::vector<Enqueued>& steps() const { return steps_; }
  // The steps, by number, whose events a step waits for; all on other streams.
  std::span<const std::uint32_t> waits(const Enqueued& step) const {
    return {waits_.data() + step.waits_begin, waits_.data() + step.waits_end};
  }

  // kNoStep for a task of another process.
  std::uint32_t step_of(TaskId task) const { return step_of_[task]; }
  int stream_of(TaskId task) const { return steps_[step_of_[task]].stream; }
  // The step, by number, that carries the task's results to another device, or here from another process; the
  // task's own if none does.
  std::uint32_t sent_by(TaskId task) const { return sent_by_[task]; }

  // The first step, by number, on `stream` that runs after step `before` has ended on the device;
  // steps().size() if only the end of all does.
  std::uint32_t first_after(std::uint32_t before, int stream) const;

 private:
  std::vector<TaskId> in_order(const TaskTimes& times) const;
  void give_lanes(const std::vector<TaskId>& order, const TaskTimes& times);
  void enqueue(const std::vector<TaskId>& order);
  void connect();
  int copy_stream(int boundary, Stream way, int device);

  bool is_here(TaskId task) const { return rank_ == kEveryRank || plan_->rank_of(task) == rank_; }
  // Whether the results of `task` reach `after`, on another rank, by a copy.
  bool is_copied(TaskId task, TaskId after) const;
  void bound_memory(TaskId task, int boundary, Kind send);

  // What a step waits for so that the memory of earlier messages can be used again.
  struct Room {
    std::uint32_t step;
    std::uint32_t waits_for;
  };
  // Of one way across one boundary, to or from another process.
  struct Way {
    std::vector<std::uint32_t> sends;  // steps
    std::uint32_t freed = kNoStep;     // what had freed memory when the last message was received
  };

  std::shared_ptr<const Plan> plan_;
  std::vector<int> device_of_rank_;
  int rank_;
  std::vector<StreamInfo> streams_;
  std::vector<int> lane_of_task_;
  std::vector<int> copy_streams_;     // by boundary and way; -1: none so far
  std::vector<Way> ways_;             // the same
  std::vector<std::uint32_t> freed_;  // by stage, the last step so far that freed a slot
  std::vector<Room> rooms_;
  std::vector<Enqueued> steps_;
  std::vector<std::uint32_t> waits_;
  std::vector<std::uint32_t> step_of_;
  std::vector<std::uint32_t> sent_by_;
  std::vector<std::vector<std::uint32_t>> on_stream_;  // by stream, its steps
  // By step and stream: how many of the stream's steps have ended when the step begins.
  std::vector<std::uint32_t> ended_;
  std::vector<std::uint32_t> place_;  // of a step among those of its stream
};

}  // namespace pe
