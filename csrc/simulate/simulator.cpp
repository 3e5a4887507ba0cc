#include "simulate/simulator.hpp"

#include <algorithm>
#include <limits>
#include <numeric>

#include "schedule/in_order.hpp"
#include "schedule/list_scheduler.hpp"
#include "simulate/event_heap.hpp"
#include "simulate/in_order_clock.hpp"

namespace pe {
namespace {

constexpr std::uint32_t kLookAgain = ~std::uint32_t{0};
constexpr double kNever = std::numeric_limits<double>::infinity();

class VirtualClock {
 public:
  VirtualClock(const Plan& plan, const Costs& costs, Simulation& result)
      : plan_(plan),
        costs_(costs),
        result_(result),
        links_(plan.links()),
        scheduler_(plan, costs.memory(plan.num_stages())),
        workers_(plan.num_workers()),
        may_contend_(plan.options().overlap && costs.contention > 1.0),
        joins_pairs_(plan.joins_pairs()) {
    result_.begin.resize(plan.size());
    if (may_contend_) result_.stretched_end.resize(plan.size());
    if (!costs.transfer.empty()) link_free_.assign(costs.num_links(plan.shape()), 0.0);
  }

  void run() {
    for (int worker = 0; worker < plan_.num_workers(); ++worker) wake(worker);
    dispatch();
    while (!events_.empty()) {
      now_ = events_.top().time;
      // All that happens at one moment happens before anyone chooses.
      while (!events_.empty() && events_.top().time == now_) {
        const Event event = events_.top();
        events_.pop();
        handle(event);
      }
      dispatch();
    }
    if (!scheduler_.done()) {
      throw PlanError("this schedule never ends: these tasks wait for one another\n" +
                      scheduler_.waiting());
    }
    result_.makespan = now_;
    result_.peak_in_flight = scheduler_.peak_by_rank();
    result_.peak_in_flight_of_stage = scheduler_.peak_by_stage();
    result_.peak_memory = scheduler_.peak_memory();
    result_.working_bytes = sizeof(double) * (result_.begin.size() + result_.stretched_end.size()) +
                            scheduler_.nbytes() + events_.nbytes() +
                            workers_.size() * sizeof(Worker);
  }

 private:
  struct Worker {
    TaskId task = kNoTask;         // running; of a pair that runs as one, its first part
    std::uint32_t generation = 0;  // of its latest event; an earlier one's end is stale
    double work_left = 0;          // at `since`; kept only where tasks may contend
    double since = 0;
    bool awake = false;
  };

  // Until a task begins, its place in the result holds when the last of its inputs so far arrives.
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
    if (may_contend_) {
      result_.stretched_end[task] = now_;
      retime(index ^ 1, costs_.contention);
    }
    const TaskId end = joins_pairs_ ? plan_.end_of_cell(task) : task + 1;
    for (TaskId part = task; part < end; ++part) finish(part);
  }

  void finish(TaskId task) {
    const auto waker = [this](int idle) { wake(idle); };
    scheduler_.finish(task, waker);
    double delivered = -1.0;
    for (const TaskId after : links_.successors(task)) {
      double here = now_;
      if (plan_.rank_of(after) != plan_.rank_of(task)) {
        if (delivered < 0) delivered = deliver(task);
        here = delivered;
      }
      arrival(after) = std::max(arrival(after), here);
      scheduler_.arrive(after, waker);
    }
  }

  // Sends the message of `task`, which has ended; returns when it arrives.
  double deliver(TaskId task) {
    const Action& action = plan_.action(task);
    const int boundary = Costs::boundary_sent_over(action);
    if (costs_.transfer.empty()) return now_ + costs_.latency[boundary];
    double& free = link_free_[costs_.link(plan_.shape(), action)];
    free = std::max(free, now_) + plan_.num_sent(task) * costs_.transfer[boundary];
    return free + costs_.latency[boundary];
  }

  void dispatch() {
    // In any order: what one worker takes leaves the others' choice as it was.
    for (const int index : awake_) {
      Worker& worker = workers_[index];
      worker.awake = false;
      if (worker.task != kNoTask) continue;
      double soonest = kNever;
      worker.task = scheduler_.take(index, [&](TaskId task) {
        const double here = joins_pairs_ ? arrival_of_cell(task) : arrival(task);
        if (here <= now_) return true;
        soonest = std::min(soonest, here);
        return false;
      });
      if (worker.task == kNoTask) {
        if (soonest < kNever) {
          events_.push({soonest, static_cast<std::uint32_t>(index), kLookAgain});
        }
        continue;
      }
      result_.begin[worker.task] = now_;
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

  // When all parts of the cell that `first` begins may begin: one that needs another runs behind it.
  double arrival_of_cell(TaskId first) {
    const TaskId end = plan_.end_of_cell(first);
    double last = arrival(first);
    for (TaskId part = first + 1; part < end; ++part) {
      int joined = 0;
      for (TaskId before = first; before < part; ++before) {
        const auto after = links_.successors(before);
        joined += static_cast<int>(std::count(after.begin(), after.end(), part));
      }
      if (scheduler_.missing(part) > joined) return kNever;
      last = std::max(last, arrival(part));
    }
    return last;
  }

  // The rank's other stream has become busy or idle: what `index` runs, so far stretched by `pace`, ends
  // at another time.
  void retime(int index, double pace) {
    Worker& worker = workers_[index];
    if (worker.task == kNoTask) return;
    worker.work_left = std::max(0.0, worker.work_left - (now_ - worker.since) / pace);
    worker.since = now_;
    push_end(index, now_ + worker.work_left * stretch(index));
  }

  double stretch(int index) const {
    return workers_[index ^ 1].task != kNoTask ? costs_.contention : 1.0;
  }

  const Plan& plan_;
  const Costs& costs_;
  Simulation& result_;
  const Links& links_;
  ListScheduler scheduler_;
  std::vector<Worker> workers_;
  EventHeap events_;
  std::vector<int> awake_;
  std::vector<double> link_free_;  // by Costs::link
  const bool may_contend_;
  const bool joins_pairs_;
  double now_ = 0;
};

// Time in which at least one task of the rank runs.
double busy_time(const Plan& plan, const Costs& costs, const Simulation& simulation,
                 const std::vector<double>& ends, int rank) {
  const TaskId first = plan.first_of_rank(rank);
  const TaskId end = plan.end_of_rank(rank);
  double busy = 0;
  if (!plan.options().overlap) {
    if (plan.joins_pairs()) {
      for (TaskId t = first; t < end; t = plan.end_of_cell(t)) busy += costs.duration_of_cell(plan, t);
    } else {
      for (TaskId t = first; t < end; ++t) busy += costs.duration(plan, t);
    }
    return busy;
  }
  std::vector<TaskId> tasks(end - first);
  std::iota(tasks.begin(), tasks.end(), first);
  std::sort(tasks.begin(), tasks.end(),
            [&](TaskId a, TaskId b) { return simulation.begin[a] < simulation.begin[b]; });
  double covered = 0;
  for (const TaskId t : tasks) {
    busy += std::max(0.0, ends[t] - std::max(covered, simulation.begin[t]));
    covered = std::max(covered, ends[t]);
  }
  return busy;
}

// By rank, when it starts and finishes and how long it is busy.
void note_ranks(const Plan& plan, const Costs& costs, Simulation& result) {
  const std::vector<double> ends = end_times(plan, costs, result);
  for (int rank = 0; rank < plan.num_ranks(); ++rank) {
    const auto first = result.begin.begin() + plan.first_of_rank(rank);
    const auto end = result.begin.begin() + plan.end_of_rank(rank);
    const auto ends_of_rank = ends.begin() + plan.first_of_rank(rank);
    result.first_start.push_back(first == end ? 0.0 : *std::min_element(first, end));
    result.finish.push_back(first == end ? 0.0 : *std::max_element(ends_of_rank, ends_of_rank + (end - first)));
    result.busy.push_back(busy_time(plan, costs, result, ends, rank));
  }
}

}  // namespace

double Simulation::bubble() const {
  double sum = 0;
  for (std::size_t rank = 0; rank < busy.size(); ++rank) sum += bubble_of(static_cast<int>(rank));
  return busy.empty() ? 0.0 : sum / static_cast<double>(busy.size());
}

double Simulation::bubble_from_first_start() const {
  int longest = 0;
  const auto span = [&](int rank) { return finish[rank] - first_start[rank]; };
  for (int rank = 1; rank < static_cast<int>(finish.size()); ++rank) {
    if (span(rank) > span(longest)) longest = rank;
  }
  return span(longest) > 0 ? 1.0 - busy[longest] / span(longest) : 0.0;
}

double Simulation::bubble_latest() const {
  return bubble_of(static_cast<int>(std::max_element(finish.begin(), finish.end()) - finish.begin()));
}

Simulation simulate(const Plan& plan, const Costs& costs) {
  costs.validate(plan.num_stages(), plan.num_ranks());
  const Memory memory = costs.memory(plan.num_stages());
  Simulation result;
  if (plan.runs_in_order()) {
    result.peak_memory = peak_memory(plan, memory);
    InOrderClock clock(plan, costs, result);
    if (run_in_order(plan, clock)) {
      result.makespan = *std::max_element(result.finish.begin(), result.finish.end());
      result.peak_in_flight = plan.planned_peaks().of_rank;
      result.peak_in_flight_of_stage = plan.planned_peaks().of_stage;
      result.working_bytes = sizeof(double) * (result.begin.size() + Inputs(plan).size()) + clock.nbytes();
      return result;
    }
    result = {};  // the scheduler tells what waits for what
  } else if (memory.limited()) {
    peak_memory(plan, memory);  // refuses
  }
  VirtualClock(plan, costs, result).run();
  note_ranks(plan, costs, result);
  return result;
}

Simulation simulate_by_events(const Plan& plan, const Costs& costs) {
  costs.validate(plan.num_stages(), plan.num_ranks());
  Simulation result;
  VirtualClock(plan, costs, result).run();
  note_ranks(plan, costs, result);
  return result;
}

std::vector<double> end_times(const Plan& plan, const Costs& costs, const Simulation& simulation) {
  if (!simulation.stretched_end.empty()) return simulation.stretched_end;
  std::vector<double> ends = simulation.begin;
  if (plan.joins_pairs()) {
    for (TaskId t = 0; t < plan.size();) {
      const double end = ends[t] + costs.duration_of_cell(plan, t);
      for (const TaskId next = plan.end_of_cell(t); t < next; ++t) ends[t] = end;
    }
    return ends;
  }
  for (TaskId t = 0; t < plan.size(); ++t) ends[t] += costs.duration(plan, t);
  return ends;
}

Order order_of(const Plan& plan, const Simulation& simulation) {
  Order order;
  for (int rank = 0; rank < plan.num_ranks(); ++rank) {
    std::vector<TaskId> tasks(plan.end_of_rank(rank) - plan.first_of_rank(rank));
    std::iota(tasks.begin(), tasks.end(), plan.first_of_rank(rank));
    std::stable_sort(tasks.begin(), tasks.end(), [&](TaskId a, TaskId b) {
      return simulation.begin[a] < simulation.begin[b];
    });
    auto& actions = order.emplace_back();
    for (const TaskId t : tasks) actions.push_back(plan.action(t));
  }
  return order;
}

}  // namespace pe
