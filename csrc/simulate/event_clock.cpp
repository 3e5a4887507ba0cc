#include "simulate/event_clock.hpp"

#include <algorithm>
#include <cstdlib>
#include <limits>
#include <string>

#include "plan/interrupt.hpp"
#include "schedule/list_scheduler.hpp"
#include "schedule/look_ahead.hpp"
#include "simulate/event_heap.hpp"

namespace pe {
namespace {

constexpr std::uint32_t kLookAgain = ~std::uint32_t{0};
constexpr double kNever = std::numeric_limits<double>::infinity();

class EventClock {
 public:
  EventClock(const Plan& plan, const Costs& costs, Simulation& result, bool apart)
      : plan_(plan),
        costs_(costs),
        result_(result),
        dependencies_(plan.dependencies()),
        scheduler_(plan, costs.memory(plan.num_stages())),
        workers_(plan.num_workers()),
        may_contend_(plan.options().overlap && costs.contention > 1.0),
        joins_pairs_(plan.joins_pairs()),
        looks_ahead_(plan.options().looks_ahead),
        apart_(apart) {
    for (int rank = 0; looks_ahead_ && rank < (apart ? plan.num_ranks() : 1); ++rank) {
      ahead_.emplace_back(plan, scheduler_, apart ? rank : kEveryRank, 0);
    }
    result_.begin.resize(plan.size());
    if (may_contend_) result_.stretched_end.resize(plan.size());
    if (!costs.transfer.empty()) link_free_.assign(costs.num_links(plan.shape()), 0.0);
  }

  void run() {
    for (int worker = 0; worker < plan_.num_workers(); ++worker) wake(worker);
    dispatch();
    std::size_t turn = 0;
    while (!events_.empty()) {
      check_interrupt(turn++);
      now_ = events_.top().time;
      // Handle all events of a moment before any worker chooses its next task.
      while (!events_.empty() && events_.top().time == now_) {
        const Event event = events_.top();
        events_.pop();
        handle(event);
      }
      dispatch();
    }
    if (!scheduler_.done()) {
      throw PlanError("this schedule never ends" +
                      std::string(joins_pairs_ ? " where the parts of an overlapped pair run as one" : "") +
                      ": these tasks wait for one another\n" + scheduler_.waiting());
    }
    result_.makespan = last_end_;  // later events are of workers that would have looked again
    result_.peak_in_flight = scheduler_.peak_by_rank();
    result_.peak_in_flight_of_stage = scheduler_.peak_by_stage();
    result_.peak_memory = scheduler_.peak_memory();
    result_.working_bytes = sizeof(double) * (result_.begin.size() + result_.stretched_end.size()) +
                            scheduler_.nbytes() + events_.nbytes() + workers_.size() * sizeof(Worker);
  }

 private:
  struct Worker {
    TaskId task = kNoTask;         // running; for a pair that runs as one task, its first part
    std::uint32_t generation = 0;  // of its latest event; earlier end events are stale
    double work_left = 0;          // at `since`; used only if tasks may contend
    double since = 0;
    bool awake = false;
  };

  // Until a task begins, result_.begin holds the latest arrival of its inputs so far.
  double& arrival(TaskId task) { return result_.begin[task]; }

  void push_end(int index, double time) {
    events_.push({time, static_cast<std::uint32_t>(index), ++workers_[index].generation});
  }

  void wake(int index) {
    if (workers_[index].awake) return;
    workers_[index].awake = true;
    awake_.push_back(index);
  }

  void handle(const Event& event) {
    const int index = static_cast<int>(event.worker);
    Worker& worker = workers_[index];
    wake(index);
    if (event.generation != worker.generation || worker.task == kNoTask) return;
    const TaskId task = worker.task;
    worker.task = kNoTask;
    last_end_ = now_;
    if (may_contend_) {
      result_.stretched_end[task] = now_;
      retime(index ^ 1, costs_.contention);
    }
    const TaskId end = joins_pairs_ ? plan_.end_of_cell(task) : task + 1;
    if (looks_ahead_) known_by(task).end(task);
    for (TaskId part = task; part < end; ++part) finish(part);
  }

  void finish(TaskId task) {
    const auto waker = [this](int idle) { wake(idle); };
    scheduler_.finish(task, waker);
    sent_.clear();
    for (const TaskId after : dependencies_.successors(task)) {
      double here = now_;
      if (plan_.rank_of(after) != plan_.rank_of(task)) {
        if (sent_.empty()) send(task);
        here = sent_to(plan_.action(after).stage).arrival;
        if (looks_ahead_ && apart_) known_by(after).hear(task, here);
      }
      arrival(after) = std::max(arrival(after), here);
      scheduler_.arrive(after, waker);
    }
  }

  // What the task that ended last sends to one stage on another rank.
  struct Sent {
    int stage = 0;
    int results = 0;
    double arrival = 0;
  };

  Sent& sent_to(int stage) {
    const auto is_to = [stage](const Sent& sent) { return sent.stage == stage; };
    const auto found = std::find_if(sent_.begin(), sent_.end(), is_to);
    return found == sent_.end() ? sent_.emplace_back(Sent{stage}) : *found;
  }

  // Sends the messages of `task`, which has ended, one after another, to the nearest stage first.
  void send(TaskId task) {
    const Action& action = plan_.action(task);
    for (const TaskId after : dependencies_.successors(task)) {
      if (plan_.rank_of(after) != plan_.rank_of(task)) ++sent_to(plan_.action(after).stage).results;
    }
    std::sort(sent_.begin(), sent_.end(), [&](const Sent& a, const Sent& b) {
      return std::abs(a.stage - action.stage) < std::abs(b.stage - action.stage);
    });
    const int boundary = Costs::boundary_sent_over(action);
    for (Sent& sent : sent_) {
      sent.arrival = now_ + costs_.latency[boundary];
      if (costs_.transfer.empty()) continue;
      double& free = link_free_[costs_.link(plan_.shape(), action)];
      free = std::max(free, now_) + sent.results * costs_.transfer[boundary];
      sent.arrival = free + costs_.latency[boundary];
    }
  }

  void dispatch() {
    // The order does not matter: what one worker takes does not change what others may take.
    for (const int index : awake_) {
      Worker& worker = workers_[index];
      worker.awake = false;
      if (worker.task != kNoTask) continue;
      double soonest = kNever;
      const auto is_here = [&](TaskId task) {
        const double here = joins_pairs_ ? arrival_of_cell(task) : arrival(task);
        if (here <= now_) return true;
        soonest = std::min(soonest, here);
        return false;
      };
      const auto waits = [&](TaskId planned, TaskId task) {
        const double at_most = wait(planned, task);
        const double again = now_ + at_most;
        if (again > now_) soonest = std::min(soonest, again);
        return again > now_;
      };
      worker.task = scheduler_.take(index, is_here, waits);
      if (worker.task == kNoTask) {
        if (soonest < kNever) {
          events_.push({soonest, static_cast<std::uint32_t>(index), kLookAgain});
        }
        continue;
      }
      result_.begin[worker.task] = now_;
      if (looks_ahead_) known_by(worker.task).begin(worker.task, now_);
      if (joins_pairs_) {
        const TaskId end = plan_.end_of_cell(worker.task);
        for (TaskId part = worker.task + 1; part < end; ++part) {
          result_.begin[scheduler_.take_joined(index)] = now_;
        }
        worker.work_left = costs_.duration_of_cell(plan_, worker.task);
      } else {
        worker.work_left = costs_.duration(plan_, worker.task);
      }
      worker.since = now_;
      push_end(index, now_ + worker.work_left * (may_contend_ ? stretch(index) : 1.0));
      if (may_contend_) retime(index ^ 1, 1.0);
    }
    awake_.clear();
  }

  // How long a worker leaves `task` for now, at most, because `planned` comes sooner than `task` would end.
  double wait(TaskId planned, TaskId task) {
    const double on_its_way = arrival(planned) - now_;
    const double length = costs_.of(plan_.action(task));
    if (scheduler_.missing(planned) == 0) {  // else it lacks a slot or memory, which `task` may free
      return on_its_way > 0 && on_its_way < length ? on_its_way : 0;
    }
    if (on_its_way >= length) return 0;
    return known_by(planned).wait(planned, task, now_, [&](TaskId t) {
      const Action& action = plan_.action(t);
      const bool travels = t != task && plan_.num_sent(t) > 0;
      return costs_.of(action) + (travels ? costs_.latency[Costs::boundary_sent_over(action)] : 0.0);
    });
  }

  LookAhead& known_by(TaskId task) { return ahead_[apart_ ? plan_.rank_of(task) : 0]; }

  // When the whole cell that begins with `first` may begin. A part may need another part of the cell: it runs
  // after it.
  double arrival_of_cell(TaskId first) {
    const TaskId end = plan_.end_of_cell(first);
    double last = arrival(first);
    for (TaskId part = first + 1; part < end; ++part) {
      int joined = 0;
      for (TaskId before = first; before < part; ++before) {
        const auto after = dependencies_.successors(before);
        joined += static_cast<int>(std::count(after.begin(), after.end(), part));
      }
      if (scheduler_.missing(part) > joined) return kNever;
      last = std::max(last, arrival(part));
    }
    return last;
  }

  // The rank's other stream became busy or idle: computes the new end of what `index` runs, which was stretched
  // by `pace` so far.
  void retime(int index, double pace) {
    Worker& worker = workers_[index];
    if (worker.task == kNoTask) return;
    worker.work_left = std::max(0.0, worker.work_left - (now_ - worker.since) / pace);
    worker.since = now_;
    push_end(index, now_ + worker.work_left * stretch(index));
  }

  double stretch(int index) const { return workers_[index ^ 1].task != kNoTask ? costs_.contention : 1.0; }

  const Plan& plan_;
  const Costs& costs_;
  Simulation& result_;
  const Dependencies& dependencies_;
  ListScheduler scheduler_;
  std::vector<LookAhead> ahead_;  // what all ranks know; or what each knows, by rank
  std::vector<Worker> workers_;
  EventHeap events_;
  std::vector<int> awake_;
  std::vector<double> link_free_;  // by Costs::link
  std::vector<Sent> sent_;         // by the task that ended last; one entry per stage, skips included
  const bool may_contend_;
  const bool joins_pairs_;
  const bool looks_ahead_;
  const bool apart_;
  double now_ = 0;
  double last_end_ = 0;
};

}  // namespace

void simulate_events(const Plan& plan, const Costs& costs, Simulation& result, bool apart) {
  EventClock(plan, costs, result, apart).run();
}

}  // namespace pe
