#include "plan/plan.hpp"

#include <algorithm>
#include <array>
#include <string>
#include <utility>

namespace pe {
namespace {

// Finds the task of (stage, kind, microbatch); whole-stage actions are found at microbatch 0.
class TaskIndex {
 public:
  TaskIndex(const std::vector<Action>& actions, const Shape& shape, const Packs& packs)
      : shape_(shape) {
    first_row_.fill(-1);
    int rows = 0;
    for (const Action& a : actions) {
      int& row = first_row_[static_cast<int>(a.kind)];
      if (row < 0) row = std::exchange(rows, rows + shape.num_stages);
    }
    tasks_.assign(static_cast<std::size_t>(rows) * shape.num_microbatches, kNoTask);
    for (TaskId t = 0; t < actions.size(); ++t) tasks_[slot(actions[t])] = t;
    if (packs.any()) find_last_of_groups(packs);
  }

  TaskId find(int stage, Kind kind, int microbatch) const {
    if (stage < 0 || stage >= shape_.num_stages) return kNoTask;
    if (first_row_[static_cast<int>(kind)] < 0) return kNoTask;
    return tasks_[slot({stage, microbatch, kind})];
  }

  // The task whose end lets the result of (stage, kind, microbatch) go to a neighbouring stage.
  TaskId find_sender(int stage, Kind kind, int microbatch) const {
    const TaskId task = find(stage, kind, microbatch);
    return task == kNoTask || senders_.empty() ? task : senders_[slot({stage, microbatch, kind})];
  }

 private:
  // A group's results leave with the one its stage runs last; of one stage, later tasks have higher numbers.
  void find_last_of_groups(const Packs& packs) {
    senders_ = tasks_;
    for (const Kind kind : {Kind::F, Kind::B, Kind::I}) {
      if (first_row_[static_cast<int>(kind)] < 0) continue;
      for (int stage = 0; stage < shape_.num_stages; ++stage) {
        const int next = kind == Kind::F ? stage + 1 : stage - 1;
        if (next < 0 || next == shape_.num_stages) continue;
        if (shape_.rank_of_stage[stage] == shape_.rank_of_stage[next]) continue;
        const int k = packs.of(kind, std::min(stage, next));
        for (int first = 0; first < shape_.num_microbatches; first += k) {
          const int end = std::min(first + k, shape_.num_microbatches);
          const TaskId last = find_last(stage, kind, first, end);
          if (last != kNoTask) std::fill_n(senders_.begin() + slot({stage, first, kind}), end - first, last);
        }
      }
    }
  }

  // Of the tasks that send gradients, or activations, of these microbatches; none if one does not.
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
};

// Calls emit(task) for each task that must be done before `a` may start.
template <class Emit>
void for_each_dependency(const Action& a, const TaskIndex& index, const Shape& shape, Emit&& emit) {
  const auto add_task = [&](TaskId task) {
    if (task != kNoTask) emit(task);
    return task != kNoTask;
  };
  const auto add = [&](int stage, Kind kind) {
    return add_task(index.find(stage, kind, a.microbatch));
  };
  const auto add_sender = [&](int stage, Kind kind) {
    return add_task(index.find_sender(stage, kind, a.microbatch));
  };
  switch (a.kind) {
    case Kind::F:
      if (!add(a.stage, Kind::RecvF)) add_sender(a.stage - 1, Kind::F);
      break;
    case Kind::B:
    case Kind::I:
      add(a.stage, Kind::F);
      if (!add(a.stage, Kind::RecvB) && !add_sender(a.stage + 1, Kind::B)) {
        add_sender(a.stage + 1, Kind::I);
      }
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

}  // namespace

std::vector<int> peak_in_flight(const Order& order, const Shape& shape) {
  std::vector<int> now(shape.num_stages, 0);
  std::vector<int> peak(shape.num_stages, 0);
  for (const auto& actions : order) {
    for (const Action& a : actions) {
      if (a.kind == Kind::F) peak[a.stage] = std::max(peak[a.stage], ++now[a.stage]);
      if (a.kind == Kind::B || a.kind == Kind::W || (a.kind == Kind::F && !shape.has_backward)) {
        --now[a.stage];
      }
    }
  }
  return peak;
}

Plan::Plan(const Order& order, const Shape& shape, PlanOptions options, std::vector<int> limits,
           const std::vector<Kind>& preference)
    : shape_(shape), options_(options), limits_(std::move(limits)) {
  if (limits_.empty()) limits_ = peak_in_flight(order, shape);
  number_tasks(order);
  link_tasks();
  fill_queues(preference);
}

void Plan::number_tasks(const Order& order) {
  std::size_t total = 0;
  for (const auto& actions : order) total += actions.size();
  if (total >= kNoTask) throw PlanError("a plan holds at most 2^32 - 2 tasks");
  actions_.reserve(total);
  rank_begin_.reserve(order.size() + 1);
  rank_begin_.push_back(0);
  for (const auto& actions : order) {
    actions_.insert(actions_.end(), actions.begin(), actions.end());
    rank_begin_.push_back(size());
  }
}

void Plan::link_tasks() {
  const TaskIndex index(actions_, shape_, options_.packs);
  num_dependencies_.assign(size(), 0);
  successors_begin_.assign(size() + 1, 0);
  for (TaskId t = 0; t < size(); ++t) {
    int count = 0;
    for_each_dependency(actions_[t], index, shape_, [&](TaskId before) {
      ++count;
      ++successors_begin_[before + 1];
    });
    if (count > kMaxDependencies) {
      throw PlanError(to_text(actions_[t]) + " waits for more than " +
                      std::to_string(kMaxDependencies) + " tasks");
    }
    num_dependencies_[t] = static_cast<std::uint16_t>(count);
  }
  for (TaskId t = 0; t < size(); ++t) successors_begin_[t + 1] += successors_begin_[t];
  successors_.resize(successors_begin_.back());
  std::vector<TaskId> next(successors_begin_.begin(), successors_begin_.end() - 1);
  for (TaskId t = 0; t < size(); ++t) {
    for_each_dependency(actions_[t], index, shape_,
                        [&](TaskId before) { successors_[next[before]++] = t; });
  }
  for (TaskId t = 0; t < size(); ++t) num_messages_ += num_sent(t) > 0;
}

int Plan::num_sent(TaskId task) const {
  const auto after = successors(task);
  return static_cast<int>(std::count_if(after.begin(), after.end(), [&](TaskId t) {
    return rank_of(t) != rank_of(task);
  }));
}

void Plan::fill_queues(const std::vector<Kind>& preference) {
  if (!options_.reactive && !options_.overlap) {
    for (int rank = 0; rank < num_ranks(); ++rank) {
      queues_begin_.push_back(rank);
      queues_.push_back({first_of_rank(rank), end_of_rank(rank), 0});
    }
    queues_begin_.push_back(num_ranks());
    return;
  }
  // Where a stage lists B for some microbatches, and I and W for others, all of them keep their order:
  // gradients leave, and are added, in it.
  std::vector<bool> lists_b(num_stages(), false);
  for (const Action& a : actions_) {
    if (a.kind == Kind::B) lists_b[a.stage] = true;
  }
  // What tells a worker's queues apart.
  const auto key_of = [&](const Action& a) {
    if (!options_.reactive) return 0;
    const bool is_part = a.kind == Kind::I || a.kind == Kind::W;
    const Kind kind = is_part && lists_b[a.stage] ? Kind::B : a.kind;
    return a.stage * kNumKinds + static_cast<int>(kind);
  };
  queued_.reserve(size());
  for (int worker = 0; worker < num_workers(); ++worker) {
    queues_begin_.push_back(num_queues());
    const int rank = rank_of_worker(worker);
    std::vector<TaskId> mine;
    for (TaskId t = first_of_rank(rank); t < end_of_rank(rank); ++t) {
      if (worker_of(t) == worker) mine.push_back(t);
    }
    std::stable_sort(mine.begin(), mine.end(), [&](TaskId a, TaskId b) {
      return key_of(actions_[a]) < key_of(actions_[b]);
    });
    int last_key = -1;
    for (const TaskId t : mine) {
      const int key = key_of(actions_[t]);
      if (key != last_key) {
        const TaskId at = static_cast<TaskId>(queued_.size());
        const auto rank_of_kind =
            std::find(preference.begin(), preference.end(), actions_[t].kind) - preference.begin();
        queues_.push_back({at, at, options_.reactive ? static_cast<int>(rank_of_kind) : 0});
        last_key = key;
      }
      queued_.push_back(t);
      queues_.back().end = static_cast<TaskId>(queued_.size());
    }
  }
  queues_begin_.push_back(num_queues());
}

std::size_t Plan::nbytes() const {
  const auto of = [](const auto& values) { return values.size() * sizeof(values[0]); };
  return sizeof(Plan) + of(actions_) + of(rank_begin_) + of(successors_begin_) + of(successors_) +
         of(num_dependencies_) + of(queued_) + of(queues_) + of(queues_begin_) + of(limits_) +
         of(shape_.rank_of_stage);
}

Order Plan::order() const {
  Order order;
  for (int rank = 0; rank < num_ranks(); ++rank) {
    order.emplace_back(actions_.begin() + first_of_rank(rank),
                       actions_.begin() + end_of_rank(rank));
  }
  return order;
}

std::vector<TaskId> Plan::dependencies(TaskId task) const {
  std::vector<TaskId> found;
  for (TaskId t = 0; t < size(); ++t) {
    const auto after = successors(t);
    if (std::find(after.begin(), after.end(), task) != after.end()) found.push_back(t);
  }
  return found;
}

}  // namespace pe
