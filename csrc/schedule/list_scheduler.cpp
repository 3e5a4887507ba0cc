#include "schedule/list_scheduler.hpp"

#include <algorithm>
#include <utility>

#include "plan/interrupt.hpp"
#include "schedule/in_order.hpp"

namespace pe {

ListScheduler::ListScheduler(const Plan& plan, int rank)
    : plan_(plan),
      rank_(rank),
      dependencies_(plan.dependencies()),
      missing_(plan.size()),
      head_(plan.num_queues()),
      in_flight_(std::size_t{1} * plan.num_stages() * plan.shape().num_copies(), 0),
      peak_of_stage_(plan.num_stages(), 0),
      in_flight_of_rank_(plan.num_ranks(), 0),
      peak_of_rank_(plan.num_ranks(), 0),
      unfinished_(rank == kEveryRank ? plan.size() : plan.end_of_rank(rank) - plan.first_of_rank(rank)) {
  if (plan.options().memory.limited()) memory_.emplace(plan, plan.options().memory);
  for (TaskId t = 0; t < plan.size(); ++t) missing_[t] = dependencies_.num_dependencies(t);
  for (int worker = 0; worker < plan.num_workers(); ++worker) {
    int queue = plan.first_queue_of(worker);
    for (const Queue& q : plan.queues_of(worker)) head_[queue++] = q.begin;
  }
}

ListScheduler::ListScheduler(const Plan& plan, Memory memory) : ListScheduler(plan) {
  memory_.emplace(plan, std::move(memory));
}

TaskId ListScheduler::take_joined(int worker) {
  const TaskId task = plan_.queued(head_[plan_.first_queue_of(worker)]++);
  if (plan_.takes_slot(task)) occupy_slot(task);
  if (memory_) memory_->begin(task);
  return task;
}

void ListScheduler::occupy_slot(TaskId task) {
  const int stage = plan_.action(task).stage;
  const int rank = plan_.rank_of(task);
  peak_of_stage_[stage] = std::max(peak_of_stage_[stage], ++in_flight_[slots_of(task)]);
  peak_of_rank_[rank] = std::max(peak_of_rank_[rank], ++in_flight_of_rank_[rank]);
}

std::size_t ListScheduler::nbytes() const {
  return missing_.size() * sizeof(missing_[0]) + head_.size() * sizeof(head_[0]) +
         2 * sizeof(int) * (peak_of_stage_.size() + peak_of_rank_.size());
}

std::string ListScheduler::waiting() const {
  constexpr int kMostLines = 64;  // each looks at all tasks
  int lines = 0;
  std::string text;
  for (int worker = first_worker(); worker < end_worker(); ++worker) {
    const TaskId first = planned_next(worker);
    if (first == kNoTask) continue;
    if (++lines > kMostLines) return text + "  and more ranks\n";
    text += "  rank " + std::to_string(plan_.rank_of_worker(worker)) + ": " + to_text(plan_.action(first)) +
            " waits for";
    const char* separator = " ";
    for (const TaskId before : plan_.dependencies_of(first)) {
      if (finished(before)) continue;
      text += separator + to_text(plan_.action(before)) + " on rank " + std::to_string(plan_.rank_of(before));
      separator = ", ";
    }
    if (missing_[first] == 0) {
      if (!has_slot(first)) {
        const int stage = plan_.action(first).stage;
        text += " a slot of stage " + std::to_string(stage) + " (" + std::to_string(plan_.limit(stage)) +
                " in flight at most)";
      } else if (memory_ && !memory_->fits(first)) {
        text += " memory of its rank";
      } else {
        text += " its rank's running task";
      }
    }
    text += '\n';
  }
  return text;
}

namespace {

template <class MayRun>
void run_without_time(ListScheduler& scheduler, const Plan& plan, MayRun&& may_run) {
  std::vector<int> awake;
  awake.reserve(plan.num_workers());
  for (int worker = 0; worker < plan.num_workers(); ++worker) awake.push_back(worker);
  const auto wake = [&](int worker) { awake.push_back(worker); };
  while (!awake.empty()) {
    const int worker = awake.back();
    awake.pop_back();
    check_interrupt();
    const auto ready = [&](TaskId task) { return may_run(worker, task); };
    for (TaskId task; (task = scheduler.take(worker, ready)) != kNoTask;) {
      scheduler.finish(task, wake);
      for (const TaskId after : plan.successors(task)) scheduler.arrive(after, wake);
    }
  }
}

bool runs_any(int, TaskId) { return true; }

}  // namespace

bool ends(const Plan& plan) {
  if (plan.runs_in_order() && run_in_order(plan, NoClock{})) return true;
  ListScheduler scheduler(plan);
  run_without_time(scheduler, plan, runs_any);
  return scheduler.done();
}

bool ends_as_planned(const Plan& plan) {
  ListScheduler scheduler(plan);
  run_without_time(scheduler, plan,
                   [&](int worker, TaskId task) { return task == scheduler.planned_next(worker); });
  return scheduler.done();
}

void check_ends(const Plan& plan) {
  if (plan.options().looks_ahead) return;
  if (plan.runs_in_order() && run_in_order(plan, NoClock{})) return;
  ListScheduler scheduler(plan);
  run_without_time(scheduler, plan, runs_any);
  if (!scheduler.done()) {
    throw PlanError("this schedule never ends: these tasks wait for one another\n" + scheduler.cycle() +
                    "by rank:\n" + scheduler.waiting());
  }
}

}  // namespace pe
