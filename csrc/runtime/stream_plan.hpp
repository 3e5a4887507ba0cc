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
  bool copies = false;  // from another device to this one; otherwise a lane
};

// One thing the host enqueues: a task, or the copy that takes a task's results to another device.
struct Enqueued {
  Action action;         // of a copy: SEND_F or SEND_B of the task's stage and microbatch
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
class StreamPlan {
 public:
  // Throws PlanError if there are not as many devices as ranks.
  StreamPlan(std::shared_ptr<const Plan> plan, const TaskTimes& times,
             std::vector<int> device_of_rank);

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

  std::uint32_t step_of(TaskId task) const { return step_of_[task]; }
  int stream_of(TaskId task) const { return steps_[step_of_[task]].stream; }
  // The step, by number, that carries the task's results to another device; the task's own if none does.
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

  std::shared_ptr<const Plan> plan_;
  std::vector<int> device_of_rank_;
  std::vector<StreamInfo> streams_;
  std::vector<int> lane_of_task_;
  std::vector<int> copy_streams_;  // by boundary and way; -1: none so far
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
