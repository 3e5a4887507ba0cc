#include "simulate/simulator.hpp"

#include <algorithm>
#include <numeric>

#include "schedule/list_scheduler.hpp"

namespace pe {
namespace {

struct Event {
  double time;
  TaskId task;
  std::uint32_t generation;  // of an end: stale unless it is the worker's latest; kArrival: an arrival
};
constexpr std::uint32_t kArrival = ~std::uint32_t{0};

bool later(const Event& a, const Event& b) {
  return a.time != b.time ? a.time > b.time : a.task > b.task;
}

class VirtualClock {
 public:
  VirtualClock(const Plan& plan, const Costs& costs, Simulation& result)
      : plan_(plan),
        costs_(costs),
        result_(result),
        scheduler_(plan),
        workers_(plan.num_workers()),
        may_contend_(plan.options().overlap && costs.contention > 1.0) {}

  void run() {
    awake_.resize(plan_.num_workers());
    std::iota(awake_.begin(), awake_.end(), 0);
    for (auto& worker : workers_) worker.awake = true;
    dispatch();
    while (!events_.empty()) {
      now_ = events_.front().time;
      // All that happens at one moment happens before anyone chooses.
      while (!events_.empty() && events_.front().time == now_) {
        std::pop_heap(events_.begin(), events_.end(), later);
        const Event event = events_.back();
        events_.pop_back();
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
  }

 private:
  struct Worker {
    TaskId task = kNoTask;  // running
    std::uint32_t generation = 0;
    double work_left = 0;  // at `since`; kept only where tasks may contend
    double since = 0;
    bool awake = false;
  };

  void push(Event event) {
    events_.push_back(event);
    std::push_heap(events_.begin(), events_.end(), later);
  }

  void wake(int worker) {
    if (!workers_[worker].awake) {
      workers_[worker].awake = true;
      awake_.push_back(worker);
    }
  }

  void handle(const Event& event) {
    const auto waker = [this](int worker) { wake(worker); };
    if (event.generation == kArrival) {
      scheduler_.arrive(event.task, waker);
      return;
    }
    const int index = plan_.worker_of(event.task);
    Worker& worker = workers_[index];
    if (worker.task != event.task || worker.generation != event.generation) return;
    worker.task = kNoTask;
    result_.end[event.task] = now_;
    if (may_contend_) retime(index ^ 1);
    wake(index);
    scheduler_.finish(event.task, waker);
    for (const TaskId after : plan_.successors(event.task)) {
      const double latency = costs_.latency_between(plan_, event.task, after);
      if (latency > 0) {
        push({now_ + latency, after, kArrival});
      } else {
        scheduler_.arrive(after, waker);
      }
    }
  }

  void dispatch() {
    std::sort(awake_.begin(), awake_.end());
    for (const int index : awake_) {
      Worker& worker = workers_[index];
      worker.awake = false;
      if (worker.task != kNoTask) continue;
      worker.task = scheduler_.take(index);
      if (worker.task == kNoTask) continue;
      result_.begin[worker.task] = now_;
      const double cost = costs_.of(plan_.action(worker.task));
      if (!may_contend_) {
        push({now_ + cost, worker.task, ++worker.generation});
        continue;
      }
      worker.work_left = cost;
      worker.since = now_;
      push({now_ + cost * stretch(index), worker.task, ++worker.generation});
      retime(index ^ 1, /*was_alone=*/true);
    }
    awake_.clear();
  }

  // The rank's other stream has become busy or idle: what `index` runs ends at another time.
  void retime(int index, bool was_alone = false) {
    Worker& worker = workers_[index];
    if (worker.task == kNoTask) return;
    const double pace = was_alone ? 1.0 : costs_.contention;
    worker.work_left = std::max(0.0, worker.work_left - (now_ - worker.since) / pace);
    worker.since = now_;
    push({now_ + worker.work_left * stretch(index), worker.task, ++worker.generation});
  }

  double stretch(int index) const {
    return workers_[index ^ 1].task != kNoTask ? costs_.contention : 1.0;
  }

  const Plan& plan_;
  const Costs& costs_;
  Simulation& result_;
  ListScheduler scheduler_;
  std::vector<Worker> workers_;
  std::vector<Event> events_;  // a heap, earliest first
  std::vector<int> awake_;
  const bool may_contend_;
  double now_ = 0;
};

// Time in which at least one task of the rank runs.
double busy_time(const Plan& plan, const Simulation& simulation, int rank) {
  const TaskId first = plan.first_of_rank(rank);
  const TaskId end = plan.end_of_rank(rank);
  double busy = 0;
  if (!plan.options().overlap) {
    for (TaskId t = first; t < end; ++t) busy += simulation.end[t] - simulation.begin[t];
    return busy;
  }
  std::vector<TaskId> tasks(end - first);
  std::iota(tasks.begin(), tasks.end(), first);
  std::sort(tasks.begin(), tasks.end(),
            [&](TaskId a, TaskId b) { return simulation.begin[a] < simulation.begin[b]; });
  double covered = 0;
  for (const TaskId t : tasks) {
    busy += std::max(0.0, simulation.end[t] - std::max(covered, simulation.begin[t]));
    covered = std::max(covered, simulation.end[t]);
  }
  return busy;
}

}  // namespace

double Simulation::bubble() const {
  double sum = 0;
  for (std::size_t rank = 0; rank < busy.size(); ++rank) sum += bubble_of(static_cast<int>(rank));
  return busy.empty() ? 0.0 : sum / static_cast<double>(busy.size());
}

Simulation simulate(const Plan& plan, const Costs& costs) {
  costs.validate(plan.num_stages());
  Simulation result;
  result.begin.resize(plan.size());
  result.end.resize(plan.size());
  VirtualClock(plan, costs, result).run();
  for (int rank = 0; rank < plan.num_ranks(); ++rank) {
    result.busy.push_back(busy_time(plan, result, rank));
  }
  return result;
}

Order order_of(const Plan& plan, const Simulation& simulation) {
  Order order;
  for (int rank = 0; rank < plan.num_ranks(); ++rank) {
    std::vector<TaskId> tasks(plan.end_of_rank(rank) - plan.first_of_rank(rank));
    std::iota(tasks.begin(), tasks.end(), plan.first_of_rank(rank));
    std::stable_sort(tasks.begin(), tasks.end(), [&](TaskId a, TaskId b) {
      return simulation.begin[a] != simulation.begin[b] ? simulation.begin[a] < simulation.begin[b]
                                                        : simulation.end[a] < simulation.end[b];
    });
    auto& actions = order.emplace_back();
    for (const TaskId t : tasks) actions.push_back(plan.action(t));
  }
  return order;
}

}  // namespace pe
