#include "plan/plan.hpp"

#include <algorithm>
#include <atomic>
#include <functional>
#include <mutex>
#include <string>
#include <utility>

#include "plan/interrupt.hpp"
#include "plan/size.hpp"

namespace pe {

InFlight peak_in_flight(const Order& order, const Shape& shape) {
  InFlight peak{std::vector<int>(shape.num_stages, 0), {}};
  std::vector<int> now(shape.num_stages, 0);
  for (const auto& actions : order) {
    int now_of_rank = 0;
    int& peak_of_rank = peak.of_rank.emplace_back(0);
    for (auto cell = actions.begin(); cell != actions.end();) {
      check_interrupt(cell - actions.begin());
      auto end = cell;
      while (end++->joins_next) {
      }
      // Joined actions free their slots when all of them have ended.
      for (auto a = cell; a != end; ++a) {
        if (a->kind != Kind::F) continue;
        peak.of_stage[a->stage] = std::max(peak.of_stage[a->stage], ++now[a->stage]);
        peak_of_rank = std::max(peak_of_rank, ++now_of_rank);
      }
      for (; cell != end; ++cell) {
        if (!frees_slot(cell->kind, shape)) continue;
        --now[cell->stage];
        --now_of_rank;
      }
    }
  }
  return peak;
}

struct Plan::LazyDependencies {
  std::once_flag once;
  std::unique_ptr<const Dependencies> dependencies;
  std::atomic<const Dependencies*> made{nullptr};
};

Plan::Plan(const Order& order, const Shape& shape, PlanOptions options, std::vector<int> limits,
           const std::vector<Kind>& preference)
    : shape_(shape),
      options_(std::move(options)),
      limits_(std::move(limits)),
      lazy_(std::make_shared<LazyDependencies>()) {
  planned_peaks_ = peak_in_flight(order, shape);
  const std::vector<int>& peaks = planned_peaks_.of_stage;
  if (limits_.empty()) limits_ = peaks;
  const bool has_slots = std::equal(peaks.begin(), peaks.end(), limits_.begin(), std::less_equal{});
  number_tasks(order);
  const Packs& packs = options_.packs;
  computes_alone_ =
      !packs.any() && packs.skips.empty() &&
      std::all_of(actions_.begin(), actions_.end(), [](const Action& a) { return is_compute(a.kind); });
  in_order_ = computes_alone_ && has_slots && !options_.overlap && !options_.reactive;
  if (!computes_alone_) dependencies();  // throws if a task has too many
  fill_queues(preference);
  if (options_.memory.limited()) peak_memory(*this, options_.memory);
}

void Plan::number_tasks(const Order& order) {
  std::size_t total = 0;
  for (const auto& actions : order) total += actions.size();
  if (total > kMostTasks) {
    throw PlanError("the step has " + std::to_string(total) + " tasks, and a plan holds at most " +
                    std::to_string(kMostTasks) + "; give fewer microbatches or stages");
  }
  actions_.reserve(total);
  rank_begin_.reserve(order.size() + 1);
  rank_begin_.push_back(0);
  for (const auto& actions : order) {
    actions_.insert(actions_.end(), actions.begin(), actions.end());
    rank_begin_.push_back(size());
  }
  has_pairs_ = std::any_of(actions_.begin(), actions_.end(), [](const Action& a) { return a.joins_next; });
}

const Dependencies& Plan::dependencies() const {
  std::call_once(lazy_->once, [&] {
    lazy_->dependencies =
        std::make_unique<const Dependencies>(actions_, shape_, options_.packs, options_.looks_ahead);
    lazy_->made = lazy_->dependencies.get();
  });
  return *lazy_->dependencies;
}

int Plan::num_sent(TaskId task) const {
  if (computes_alone_) {
    const Action& a = actions_[task];
    const int next = stage_after(a);
    return next != kNoStage && shape_.rank_of(next, a.microbatch) != rank_of(task) ? 1 : 0;
  }
  const auto after = successors(task);
  return static_cast<int>(
      std::count_if(after.begin(), after.end(), [&](TaskId t) { return rank_of(t) != rank_of(task); }));
}

int Plan::num_messages(TaskId task) const {
  const int skips = computes_alone_ ? 0 : dependencies().skips_sent(task).messages;
  return skips + sends_to_neighbor(task);
}

bool Plan::sends_to_neighbor(TaskId task) const {
  const int skips = computes_alone_ ? 0 : dependencies().skips_sent(task).results;
  return num_sent(task) > skips;
}

int Plan::num_messages() const {
  int messages = 0;
  for (TaskId t = 0; t < size(); ++t) messages += num_messages(t);
  return messages;
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
  // If a stage has `B` for some microbatches and `I` and `W` for others, they share a queue: gradients are sent
  // and accumulated in the order of the microbatches.
  std::vector<bool> lists_b(num_stages(), false);
  for (const Action& a : actions_) {
    if (a.kind == Kind::B) lists_b[a.stage] = true;
  }
  // Tasks with the same key share a queue.
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
    check_interrupt();
    for (TaskId t = first_of_rank(rank); t < end_of_rank(rank); ++t) {
      if (worker_of(t) == worker) mine.push_back(t);
    }
    std::stable_sort(mine.begin(), mine.end(),
                     [&](TaskId a, TaskId b) { return key_of(actions_[a]) < key_of(actions_[b]); });
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
  const Dependencies* dependencies = lazy_->made;
  return sizeof(Plan) + of(actions_) + of(rank_begin_) + of(queued_) + of(queues_) + of(queues_begin_) +
         of(limits_) + of(shape_.rank_of_stage) + of(shape_.rank_of_copy) +
         (dependencies ? dependencies->nbytes() : 0);
}

Order Plan::order() const {
  Order order;
  for (int rank = 0; rank < num_ranks(); ++rank) {
    order.emplace_back(actions_.begin() + first_of_rank(rank), actions_.begin() + end_of_rank(rank));
  }
  return order;
}

std::vector<TaskId> Plan::dependencies_of(TaskId task) const {
  std::vector<TaskId> found;
  for (TaskId t = 0; t < size(); ++t) {
    const auto after = successors(t);
    if (std::find(after.begin(), after.end(), task) != after.end()) found.push_back(t);
  }
  return found;
}

}  // namespace pe
