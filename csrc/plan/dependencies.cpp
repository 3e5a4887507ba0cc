#include "plan/dependencies.hpp"

#include <algorithm>
#include <array>
#include <string>
#include <utility>

#include "plan/interrupt.hpp"

namespace pe {
namespace {

// One direction of a skip: its tensors, or their gradients.
struct SkipDirection {
  int from;
  int to;
  Kind kind;                    // F; or B for gradients, which `B` or `I` computes
  std::vector<TaskId> senders;  // by microbatch, the task whose end sends it; or kNoTask
};

// Finds the task of (stage, kind, microbatch); whole-stage actions are found at microbatch 0.
class TaskIndex {
 public:
  TaskIndex(const std::vector<Action>& actions, const Shape& shape, const Packs& packs) : shape_(shape) {
    first_row_.fill(-1);
    int rows = 0;
    for (const Action& a : actions) {
      int& row = first_row_[static_cast<int>(a.kind)];
      if (row < 0) row = std::exchange(rows, rows + shape.num_stages);
    }
    tasks_.assign(static_cast<std::size_t>(rows) * shape.num_microbatches, kNoTask);
    for (TaskId t = 0; t < actions.size(); ++t) tasks_[slot(actions[t])] = t;
    if (packs.any()) find_last_of_groups(packs);
    for (const Skip& skip : packs.skips) {
      add_skip_direction(skip.source, skip.target, Kind::F, skip.forward);
      add_skip_direction(skip.target, skip.source, Kind::B, skip.backward);
    }
  }

  TaskId find(int stage, Kind kind, int microbatch) const {
    if (stage < 0 || stage >= shape_.num_stages) return kNoTask;
    if (first_row_[static_cast<int>(kind)] < 0) return kNoTask;
    return tasks_[slot({stage, microbatch, kind})];
  }

  // The task whose end sends the result of (stage, kind, microbatch) to the neighbouring stage.
  TaskId find_sender(int stage, Kind kind, int microbatch) const {
    const TaskId task = find(stage, kind, microbatch);
    return task == kNoTask || senders_.empty() ? task : senders_[slot({stage, microbatch, kind})];
  }

  const std::vector<SkipDirection>& skip_directions() const { return skip_directions_; }

 private:
  // A pack is sent when the last of its microbatches ends. Tasks of a stage are numbered in the order they run.
  void find_last_of_groups(const Packs& packs) {
    senders_ = tasks_;
    for (const Kind kind : {Kind::F, Kind::B, Kind::I}) {
      if (first_row_[static_cast<int>(kind)] < 0) continue;
      for (int stage = 0; stage < shape_.num_stages; ++stage) {
        const int next = kind == Kind::F ? stage + 1 : stage - 1;
        if (next < 0 || next == shape_.num_stages) continue;
        for_each_group(stage, next, packs.of(kind, std::min(stage, next)), [&](int first, int end) {
          const TaskId last = find_last(stage, kind, first, end);
          if (last != kNoTask) std::fill_n(&senders_[slot({stage, first, kind})], end - first, last);
        });
      }
    }
  }

  void add_skip_direction(int from, int to, Kind kind, int k) {
    SkipDirection& direction = skip_directions_.emplace_back(SkipDirection{from, to, kind, {}});
    for_each_group(from, to, k, [&](int first, int end) {
      direction.senders.insert(direction.senders.end(), end - first, find_last(from, kind, first, end));
    });
  }

  // Calls emit(first, end) for the microbatches of each message from `stage` to `next`. If both stages are on
  // one rank, every microbatch is handed over alone.
  template <class Emit>
  void for_each_group(int stage, int next, int k, Emit&& emit) const {
    for (int first = 0, end; first < shape_.num_microbatches; first = end) {
      const bool travels = shape_.rank_of(stage, first) != shape_.rank_of(next, first);
      end = std::min(first + (travels ? k : 1), shape_.num_microbatches);
      if (!shape_.on_copy(first)) end = std::min(end, shape_.first_of_copy);
      emit(first, end);
    }
  }

  // The last task that computes these microbatches' results; kNoTask if one of them has no such task.
  TaskId find_last(int stage, Kind kind, int first, int end) const {
    const Kind other = kind == Kind::F ? Kind::F : kind == Kind::B ? Kind::I : Kind::B;
    TaskId last = 0;
    for (int m = first; m < end; ++m) {
      const TaskId task = find(stage, kind, m);
      const TaskId sends = task == kNoTask ? find(stage, other, m) : task;
      if (sends == kNoTask) return kNoTask;
      last = std::max(last, sends);
    }
    return last;
  }

  std::size_t slot(const Action& a) const {
    const std::size_t row = first_row_[static_cast<int>(a.kind)] + a.stage;
    return row * shape_.num_microbatches + std::max(a.microbatch, 0);
  }

  const Shape& shape_;
  std::array<int, kNumKinds> first_row_;
  std::vector<TaskId> tasks_;
  std::vector<TaskId> senders_;  // empty where nothing is packed
  std::vector<SkipDirection> skip_directions_;
};

// Calls emit(task) for each task that must end before `a` may start.
template <class Emit>
void for_each_dependency(const Action& a, const TaskIndex& index, const Shape& shape, Emit&& emit) {
  const auto add_task = [&](TaskId task) {
    if (task != kNoTask) emit(task);
    return task != kNoTask;
  };
  const auto add = [&](int stage, Kind kind) { return add_task(index.find(stage, kind, a.microbatch)); };
  const auto add_sender = [&](int stage, Kind kind) {
    return add_task(index.find_sender(stage, kind, a.microbatch));
  };
  const auto add_skips = [&](Kind kind) {
    for (const SkipDirection& direction : index.skip_directions()) {
      if (direction.to == a.stage && direction.kind == kind) add_task(direction.senders[a.microbatch]);
    }
  };
  switch (a.kind) {
    case Kind::F:
      if (!add(a.stage, Kind::RecvF)) add_sender(a.stage - 1, Kind::F);
      add_skips(Kind::F);
      break;
    case Kind::B:
    case Kind::I:
      add(a.stage, Kind::F);
      if (!add(a.stage, Kind::RecvB) && !add_sender(a.stage + 1, Kind::B)) {
        add_sender(a.stage + 1, Kind::I);
      }
      add_skips(Kind::B);
      break;
    case Kind::W:
      add(a.stage, Kind::I);
      break;
    case Kind::SendF:
      add(a.stage, Kind::F);
      break;
    case Kind::RecvF:
      add(a.stage - 1, Kind::SendF);
      break;
    case Kind::SendB:
      if (!add(a.stage, Kind::B)) add(a.stage, Kind::I);
      break;
    case Kind::RecvB:
      add(a.stage + 1, Kind::SendB);
      break;
    case Kind::ReduceGrad:
      for (int m = 0; m < shape.num_microbatches; ++m) {
        for (const Kind kind : {Kind::B, Kind::W}) {
          const TaskId task = index.find(a.stage, kind, m);
          if (task != kNoTask) emit(task);
        }
      }
      break;
    case Kind::Unshard:
    case Kind::Reshard:
      break;
  }
}

std::vector<SkipsSent> find_skips_sent(const TaskIndex& index, const Shape& shape, TaskId num_tasks) {
  std::vector<SkipsSent> sent(index.skip_directions().empty() ? 0 : num_tasks);
  for (const SkipDirection& direction : index.skip_directions()) {
    TaskId last = kNoTask;
    for (int m = 0; m < shape.num_microbatches; ++m) {
      const TaskId sender = direction.senders[m];
      if (sender == kNoTask || shape.rank_of(direction.from, m) == shape.rank_of(direction.to, m)) continue;
      sent[sender].messages += sender != std::exchange(last, sender);
      ++sent[sender].results;
    }
  }
  return sent;
}

}  // namespace

Dependencies::Dependencies(const std::vector<Action>& actions, const Shape& shape, const Packs& packs,
                           bool both_ways)
    : successors_begin_(actions.size() + 1, 0), num_dependencies_(actions.size(), 0) {
  const TaskIndex index(actions, shape, packs);
  const TaskId size = static_cast<TaskId>(actions.size());
  for (TaskId t = 0; t < size; ++t) {
    check_interrupt(t);
    int count = 0;
    for_each_dependency(actions[t], index, shape, [&](TaskId before) {
      ++count;
      ++successors_begin_[before + 1];
    });
    if (count > kMaxDependencies) {
      throw PlanError(to_text(actions[t]) + " waits for more than " + std::to_string(kMaxDependencies) +
                      " tasks");
    }
    num_dependencies_[t] = static_cast<std::uint16_t>(count);
  }
  for (TaskId t = 0; t < size; ++t) successors_begin_[t + 1] += successors_begin_[t];
  successors_.resize(successors_begin_.back());
  std::vector<TaskId> next(successors_begin_.begin(), successors_begin_.end() - 1);
  if (both_ways) {
    predecessors_begin_.reserve(actions.size() + 1);
    predecessors_.reserve(successors_.size());
  }
  for (TaskId t = 0; t < size; ++t) {
    check_interrupt(t);
    if (both_ways) predecessors_begin_.push_back(static_cast<TaskId>(predecessors_.size()));
    for_each_dependency(actions[t], index, shape, [&](TaskId before) {
      successors_[next[before]++] = t;
      if (both_ways) predecessors_.push_back(before);
    });
  }
  if (both_ways) predecessors_begin_.push_back(static_cast<TaskId>(predecessors_.size()));
  skips_sent_ = find_skips_sent(index, shape, size);
}

std::size_t Dependencies::nbytes() const {
  return sizeof(TaskId) * (successors_begin_.size() + successors_.size() + predecessors_begin_.size() +
                           predecessors_.size()) +
         sizeof(std::uint16_t) * num_dependencies_.size() + sizeof(SkipsSent) * skips_sent_.size();
}

}  // namespace pe
