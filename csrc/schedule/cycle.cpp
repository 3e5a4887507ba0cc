// Explains a deadlock: finds one cycle of tasks that wait for one another.
#include <algorithm>

#include "schedule/list_scheduler.hpp"

namespace pe {
namespace {

// As in "rank 1, cell 2 '1F1'"; an overlapped pair is one cell.
std::string where(const Plan& plan, TaskId task) {
  const int rank = plan.rank_of(task);
  int cell = 0;
  for (TaskId t = plan.first_of_rank(rank); t < task; ++t) cell += plan.action(t).joins_next ? 0 : 1;
  return "rank " + std::to_string(rank) + ", cell " + std::to_string(cell) + " '" + to_text(plan.action(task)) +
         "'";
}

}  // namespace

TaskId ListScheduler::frees_slot_for(TaskId task) const {
  std::vector<bool> in_flight(plan_.num_microbatches(), false);
  const int rank = plan_.rank_of(task);
  const auto of_same_slots = [&](TaskId t) { return slots_of(t) == slots_of(task); };
  for (TaskId t = plan_.first_of_rank(rank); t < plan_.end_of_rank(rank); ++t) {
    if (plan_.takes_slot(t) && of_same_slots(t)) in_flight[plan_.action(t).microbatch] = finished(t);
  }
  for (TaskId t = plan_.first_of_rank(rank); t < plan_.end_of_rank(rank); ++t) {
    const bool frees = plan_.frees_slot(t) && of_same_slots(t) && !finished(t);
    if (frees && in_flight[plan_.action(t).microbatch]) return t;
  }
  return kNoTask;
}

std::string ListScheduler::cycle() const {
  // What each unfinished task waits for: the head of its queue; or, if it is the head, a dependency.
  std::vector<TaskId> blocker(plan_.size(), kNoTask);
  std::vector<bool> is_head(plan_.size(), false);
  for (TaskId t = 0; t < plan_.size(); ++t) {
    if (finished(t)) continue;
    for (const TaskId after : plan_.successors(t)) blocker[after] = t;
  }
  TaskId task = kNoTask;
  for (int worker = 0; worker < plan_.num_workers(); ++worker) {
    int queue = plan_.first_queue_of(worker);
    for (const Queue& q : plan_.queues_of(worker)) {
      const TaskId at = head_[queue++];
      if (at == q.end) continue;
      const TaskId head = plan_.queued(at);
      is_head[head] = true;
      for (TaskId behind = at + 1; behind < q.end; ++behind) blocker[plan_.queued(behind)] = head;
      if (blocker[head] == kNoTask) blocker[head] = frees_slot_for(head);
      task = std::min(task, head);
    }
  }
  std::vector<bool> seen(plan_.size(), false);
  for (; task != kNoTask && !seen[task]; task = blocker[task]) seen[task] = true;
  std::string text;
  constexpr int kMostLines = 64;
  int lines = 0;
  for (TaskId t = task; t != kNoTask; t = blocker[t]) {
    if (++lines > kMostLines) return text + "  and so on, back to " + to_text(plan_.action(task)) + "\n";
    const char* why = !is_head[t]        ? " stands behind "
                      : missing_[t] == 0 ? " needs the slot that is freed by "
                                         : " waits for ";
    text += "  " + where(plan_, t) + why + where(plan_, blocker[t]) + "\n";
    if (blocker[t] == task) break;
  }
  return text;
}

}  // namespace pe
