#include "protocol/groups.hpp"

#include <algorithm>
#include <cstdint>
#include <deque>
#include <string>
#include <unordered_set>
#include <utility>
#include <vector>

#include "schedule/decided_order.hpp"
#include "schedule/list_scheduler.hpp"

namespace pe {
namespace {

using Tasks = std::uint32_t;  // a set

constexpr Tasks only(TaskId task) { return Tasks{1} << task; }

struct Process {
  ListScheduler scheduler;
  DecidedOrder decided;
  std::deque<TaskId> pending;    // decided, and not begun
  std::size_t on_their_way = 0;  // the last so many of these
  TaskId running = kNoTask;
  Tasks begun = 0, ended = 0;
  Tasks arrived = 0;  // results of other ranks
};

class Groups {
 public:
  Groups(const Plan& plan, int members, Fault fault) : plan_(plan), members_(members), fault_(fault) {
    if (plan.size() > 32 || plan.options().overlap) throw world::Violation("the plan is too large");
  }

  world::Explored run() {
    State first;
    for (int rank = 0; rank < plan_.num_ranks(); ++rank) {
      for (int member = 0; member < members_; ++member) {
        first.push_back({ListScheduler(plan_, rank), {}, {}, 0, kNoTask, 0, 0, 0});
      }
    }
    known_.insert(key(first));
    try {
      go_on_from(first);
    } catch (const world::Violation& violation) {
      found_.violation = violation.what();
      found_.trace = way_;
    }
    found_.states = known_.size();
    return std::move(found_);
  }

 private:
  using State = std::vector<Process>;  // by rank, then member

  // Every turn adds to what has happened, so no state comes twice on a way: an end is reached from each, if
  // only ends have no turn.
  void go_on_from(const State& state) {
    found_.longest = std::max(found_.longest, way_.size());
    bool is_end = true;
    const auto turn = [&](std::string text, auto&& change) {
      State next = state;
      if (!change(next)) return;
      is_end = false;
      ++found_.transitions;
      if (!known_.insert(key(next)).second) return;
      way_.push_back(std::move(text));
      go_on_from(next);
      way_.pop_back();
    };
    for (int process = 0; process < static_cast<int>(state.size()); ++process) {
      const std::string name = name_of(process);
      const TaskId running = state[process].running;
      turn(name + " begins", [&](State& next) { return begin(next, process); });
      if (running != kNoTask) {
        turn(name + " ends " + to_text(plan_.action(running)), [&](State& next) { return end(next, process); });
      }
      turn(name + " is told", [&](State& next) { return tell(next[process]); });
      for (TaskId task = 0; task < plan_.size(); ++task) {
        turn(name + " receives " + to_text(plan_.action(task)),
             [&](State& next) { return receive(next, process, task); });
      }
    }
    if (!is_end) return;
    ++found_.ends;
    for (const Process& process : state) {
      if (!process.scheduler.done()) throw world::Violation("nobody can go on:\n" + describe(state));
    }
  }

  bool begin(State& state, int number) {
    Process& process = state[number];
    if (process.running != kNoTask) return false;
    const int worker = number / members_;
    const bool is_leader = number % members_ == 0;
    const bool decides = is_leader || fault_ == Fault::DecidesItself;
    process.running =
        decides ? process.scheduler.take(worker) : process.decided.take(process.scheduler, worker);
    if (process.running == kNoTask) return false;
    process.begun |= only(process.running);
    if (!is_leader && !decides) process.pending.pop_front();
    if (is_leader && fault_ != Fault::TellsLate) decide(state, number, process.running);
    return true;
  }

  void decide(State& state, int leader, TaskId task) {
    if (fault_ == Fault::DecidesItself) return;
    for (int member = 1; member < members_; ++member) {
      state[leader + member].pending.push_back(task);
      ++state[leader + member].on_their_way;
    }
  }

  static bool tell(Process& process) {
    if (process.on_their_way == 0) return false;
    process.decided.decide(*(process.pending.end() - static_cast<long>(process.on_their_way--)));
    return true;
  }

  bool end(State& state, int number) {
    Process& process = state[number];
    const TaskId task = std::exchange(process.running, kNoTask);
    const int first = number - number % members_;
    for (int member = 0; member < members_; ++member) {
      if ((state[first + member].begun & only(task)) == 0) return false;
    }
    process.ended |= only(task);
    process.scheduler.finish(task, [](int) {});
    for (const TaskId after : plan_.successors(task)) {
      if (plan_.rank_of(after) == number / members_) process.scheduler.arrive(after, [](int) {});
    }
    if (number == first && fault_ == Fault::TellsLate) decide(state, number, task);
    return true;
  }

  // The results of a task of another rank arrive, if those before it have.
  bool receive(State& state, int number, TaskId task) {
    Process& process = state[number];
    const int rank = number / members_, from = plan_.rank_of(task);
    const Process& sender = state[from * members_ + number % members_];
    if (from == rank || (process.arrived & only(task)) != 0 || (sender.ended & only(task)) == 0) return false;
    const Action& action = plan_.action(task);
    bool is_awaited = false;
    for (TaskId before = plan_.first_of_rank(from); before < task; ++before) {
      const Action& other = plan_.action(before);
      const bool same = other.stage == action.stage && other.kind == action.kind;
      if (same && (process.arrived & only(before)) == 0) return false;
    }
    for (const TaskId after : plan_.successors(task)) {
      if (plan_.rank_of(after) != rank) continue;
      is_awaited = true;
      process.scheduler.arrive(after, [](int) {});
    }
    process.arrived |= only(task);
    return is_awaited;
  }

  // All on which the turns to come depend.
  static std::string key(const State& state) {
    std::string key;
    const auto add = [&](Tasks tasks) { key.append(reinterpret_cast<const char*>(&tasks), sizeof tasks); };
    for (const Process& process : state) {
      add(process.begun);
      add(process.ended);
      add(process.arrived);
      key.push_back(static_cast<char>(process.pending.size()));
      key.push_back(static_cast<char>(process.on_their_way));
      for (const TaskId task : process.pending) key.push_back(static_cast<char>(task));
    }
    return key;
  }

  std::string name_of(int process) const {
    return "member " + std::to_string(process % members_) + " of rank " + std::to_string(process / members_);
  }

  std::string describe(const State& state) const {
    std::string text;
    for (int process = 0; process < static_cast<int>(state.size()); ++process) {
      const TaskId running = state[process].running;
      text += "  " + name_of(process) +
              (running == kNoTask ? " runs nothing" : " runs " + to_text(plan_.action(running))) + "\n";
    }
    return text;
  }

  const Plan& plan_;
  const int members_;
  const Fault fault_;
  std::unordered_set<std::string> known_;
  std::vector<std::string> way_;
  world::Explored found_;
};

}  // namespace

world::Explored explore_groups(const Plan& plan, int members, Fault fault) {
  return Groups(plan, members, fault).run();
}

}  // namespace pe
