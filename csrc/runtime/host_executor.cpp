#include "runtime/host_executor.hpp"

#include <cxxabi.h>
#include <pthread.h>
#include <unistd.h>

#include <algorithm>
#include <condition_variable>
#include <limits>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <system_error>
#include <thread>
#include <utility>

#include "runtime/mean_times.hpp"
#include "runtime/process_end.hpp"
#include "schedule/decided_order.hpp"
#include "schedule/list_scheduler.hpp"
#include "schedule/look_ahead.hpp"

namespace pe {
namespace {

using Clock = std::chrono::steady_clock;
constexpr Nanoseconds kNoWait = std::numeric_limits<Nanoseconds>::max();
constexpr auto kPollPeriod = std::chrono::milliseconds(50);

Nanoseconds now() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(Clock::now().time_since_epoch()).count();
}

double to_seconds(Nanoseconds time) { return 1e-9 * static_cast<double>(time); }

void check_delivery(const Plan& plan, TaskId task) {
  if (task < plan.size()) return;
  throw std::out_of_range("results of task " + std::to_string(task) + " have arrived, and the plan has " +
                          std::to_string(plan.size()) + " tasks");
}

void check_decision(const Plan& plan, int rank, TaskId task) {
  const TaskId first = plan.first_of_rank(rank), end = plan.end_of_rank(rank);
  if (task >= first && task < end) return;
  throw std::out_of_range("task " + std::to_string(task) + " was decided, and those of rank " +
                          std::to_string(rank) + " are " + std::to_string(first) + " to " +
                          std::to_string(end - 1));
}

}  // namespace

struct HostExecutor::Delivery {
  TaskId task;
  int stage;
  std::vector<int> microbatches;
};

struct HostExecutor::Step {
  Step(std::shared_ptr<const Program> to_run, int of_rank, bool follows_another, const RunOptions& options)
      : program(std::move(to_run)),
        rank(of_rank),
        follows(follows_another),
        first_worker(rank == kEveryRank ? 0 : rank * program->plan().workers_per_rank()),
        scheduler(program->plan(), rank) {
    result.begin = now();
    last_progress = result.begin;
    if (options.look_ahead && !follows && plan().options().looks_ahead) {
      ahead.emplace(plan(), scheduler, rank, to_seconds(result.begin));
    }
    if (options.record) {
      result.task_begin.assign(program->plan().size(), 0);
      result.task_end.assign(program->plan().size(), 0);
    }
  }

  const Plan& plan() const { return program->plan(); }
  bool recording() const { return !result.task_begin.empty(); }
  bool over() const { return running == 0 && (stopping || scheduler.done()); }
  template <class Waits>
  TaskId take(int worker, Waits&& waits) {
    if (follows) return decided.take(scheduler, first_worker + worker);
    return scheduler.take(first_worker + worker, [](TaskId) { return true; }, waits);
  }
  std::string waiting() const {
    std::string text = scheduler.waiting();
    if (!follows) return text;
    const TaskId next = decided.next();
    return text + "  rank " + std::to_string(rank) + " follows another process, which has decided " +
           (next == kNoTask ? "no next task\n" : "that " + to_text(plan().action(next)) + " is next\n");
  }

  // How long a worker leaves `task` for now, at most, because `planned` is expected before `task` would end.
  // Not at all as long as no step has told how long tasks take.
  Nanoseconds wait(TaskId planned, TaskId task, const MeanTimes& times) const {
    if (!ahead || !times.known() || scheduler.missing(planned) == 0) return 0;
    const auto expected = [&](TaskId t) { return times.of(plan().action(t)); };
    const double seconds = ahead->wait(planned, task, to_seconds(now()), expected);
    return static_cast<Nanoseconds>(std::min(seconds, kForever.count()) * 1e9);
  }

  // Tells the scheduler that the results of `task` are there. Calls wake(worker) with workers counted from this
  // process's first one.
  template <class Wake>
  void arrive_after(TaskId task, Wake&& wake) {
    for (const TaskId after : plan().successors(task)) {
      if (rank != kEveryRank && plan().rank_of(after) != rank) continue;
      scheduler.arrive(after, [&](int worker) { wake(worker - first_worker); });
    }
  }

  // The same for delivered results: at most once for each waiting task per delivery.
  template <class Wake>
  void arrive(const Delivery& delivery, Wake&& wake) {
    const auto after = plan().successors(delivery.task);
    for (auto it = after.begin(); it != after.end(); ++it) {
      const Action& action = plan().action(*it);
      const auto& ms = delivery.microbatches;
      if (action.stage != delivery.stage || plan().rank_of(*it) != rank) continue;
      if (std::find(ms.begin(), ms.end(), action.microbatch) == ms.end()) continue;
      if (std::find(after.begin(), it, *it) != it) continue;
      if (ahead) ahead->hear(delivery.task, to_seconds(last_progress));
      scheduler.arrive(*it, [&](int worker) { wake(worker - first_worker); });
    }
  }

  const std::shared_ptr<const Program> program;
  const int rank;
  const bool follows;
  const int first_worker;
  ListScheduler scheduler;
  std::optional<LookAhead> ahead;
  DecidedOrder decided;
  StepResult result;
  Nanoseconds last_progress;
  int running = 0;
  bool stopping = false;
};

struct HostExecutor::Shared {
  Shared(int num_workers, ThreadHooks thread_hooks)
      : hooks(std::move(thread_hooks)),
        work(num_workers),
        running(num_workers, kNoTask),
        abandoned(num_workers, false) {}

  // Threads are left only if close() was called on one of them, which cannot join itself.
  ~Shared() {
    for (std::thread& thread : threads) thread.detach();
  }

  const ThreadHooks hooks;
  std::mutex mutex;                           // guards all below
  std::vector<std::condition_variable> work;  // by worker: it may have a task
  std::condition_variable over;               // the step is over
  std::condition_variable idle;               // there is no step
  std::thread::id runner;                     // the thread that called run()
  std::unique_ptr<Step> step;                 // the running step, if any
  std::unique_ptr<Step> lost;                 // the step that abandoned threads still run
  std::vector<TaskId> running;                // by worker
  std::vector<Delivery> early;                // deliveries for the next step
  std::vector<TaskId> early_decided;          // decisions for the next step
  std::exception_ptr early_error;             // of the next step
  MeanTimes times;
  std::vector<bool> abandoned;  // by worker
  std::vector<std::thread> threads;
  bool closing = false;
  bool giving_up = false;
  bool dead = false;
};

HostExecutor::HostExecutor(int num_workers, const std::vector<std::string>& thread_names, ThreadHooks hooks,
                           int rank, bool follows)
    : num_workers_(num_workers),
      rank_(rank),
      follows_(follows),
      owner_pid_(getpid()),
      shared_(std::make_shared<Shared>(num_workers, std::move(hooks))) {
  if (follows && (rank == kEveryRank || num_workers != 1)) {
    throw std::invalid_argument("only a rank with one worker follows another process");
  }
  try {
    for (int worker = 0; worker < num_workers; ++worker) {
      auto& thread =
          shared_->threads.emplace_back([shared = shared_, worker] { HostExecutor::work(shared, worker); });
      // The kernel keeps 15 characters.
      pthread_setname_np(thread.native_handle(), thread_names[worker].substr(0, 15).c_str());
    }
  } catch (const std::system_error&) {  // the machine has no more threads
    close();
    throw;
  }
}

HostExecutor::~HostExecutor() { close(); }

void HostExecutor::work(const std::shared_ptr<Shared>& shared, int me) {
  Shared& s = *shared;
  if (s.hooks.start) s.hooks.start(me);
  std::vector<int> to_wake;
  const auto wake = [&](int worker) {
    if (worker != me) to_wake.push_back(worker);
  };
  std::unique_lock lock(s.mutex);
  while (!s.closing) {
    Step* const step = s.step.get();
    Nanoseconds wait = kNoWait;
    const auto waits = [&](TaskId planned, TaskId task) {
      const Nanoseconds at_most = step->wait(planned, task, s.times);
      if (at_most > 0) wait = std::min(wait, at_most);
      return at_most > 0;
    };
    const TaskId task = step && !step->stopping ? step->take(me, waits) : kNoTask;
    if (task == kNoTask && to_wake.empty()) {
      if (wait == kNoWait) {
        s.work[me].wait(lock);
      } else {
        s.work[me].wait_for(lock, std::chrono::nanoseconds(wait));
      }
      continue;
    }
    if (task != kNoTask) {
      s.running[me] = task;
      ++step->running;
      step->last_progress = now();
      if (step->ahead) step->ahead->begin(task, to_seconds(step->last_progress));
      if (step->recording()) step->result.task_begin[task] = step->last_progress;
    }
    const Nanoseconds began = task == kNoTask ? 0 : step->last_progress;
    lock.unlock();
    for (const int worker : to_wake) s.work[worker].notify_one();
    to_wake.clear();
    if (task == kNoTask) {
      lock.lock();
      continue;
    }

    std::exception_ptr error;
    try {
      step->program->run(task);
    } catch (const abi::__forced_unwind&) {
      throw;  // the interpreter ends this thread, which must not be prevented
    } catch (...) {
      error = std::current_exception();
    }
    const Nanoseconds ended = now();

    lock.lock();
    if (s.abandoned[me]) {  // the step is gone
      lock.unlock();        // before `error` is destroyed, which may need the GIL
      error = nullptr;
      if (s.hooks.stop) s.hooks.stop(me);
      thread_has_ended();
      return;
    }
    s.running[me] = kNoTask;
    --step->running;
    step->last_progress = ended;
    if (step->recording()) step->result.task_end[task] = ended;
    if (error) {
      if (!step->stopping) {
        step->stopping = true;
        step->result.outcome = Outcome::Failed;
        step->result.failed_task = task;
        step->result.error = error;
      }
    } else {
      if (step->ahead) {
        step->ahead->end(task);
        s.times.note(step->plan().action(task), to_seconds(ended - began));
      }
      step->scheduler.finish(task, [&](int worker) { wake(worker - step->first_worker); });
      step->arrive_after(task, wake);
    }
    if (step->over()) s.over.notify_one();
    if (error) {
      lock.unlock();  // as above
      error = nullptr;
      lock.lock();
    }
  }
  lock.unlock();
  if (s.hooks.stop) s.hooks.stop(me);
}

StepResult HostExecutor::run(std::shared_ptr<const Program> program, const RunOptions& options) {
  Shared& s = *shared_;
  if (getpid() != owner_pid_) {
    throw std::logic_error("its threads live in the process that made it, not in this fork of it");
  }
  std::unique_lock lock(s.mutex);
  if (s.dead) throw std::logic_error("it is dead: a stage's code never returned");
  if (s.closing) throw std::logic_error("it is closed");
  if (s.step) throw std::logic_error("it is running a step already");
  const Plan& plan = program->plan();
  if (num_workers_ != (rank_ == kEveryRank ? plan.num_workers() : plan.workers_per_rank())) {
    throw std::logic_error("the plan is for another number of workers");
  }
  if (rank_ != kEveryRank && rank_ >= plan.num_ranks()) {
    throw std::logic_error("the plan has no rank " + std::to_string(rank_));
  }
  const std::vector<Delivery> early = std::exchange(s.early, {});
  const std::vector<TaskId> early_decided = std::exchange(s.early_decided, {});
  for (const Delivery& delivery : early) check_delivery(plan, delivery.task);
  for (const TaskId task : early_decided) check_decision(plan, rank_, task);
  s.step = std::make_unique<Step>(std::move(program), rank_, follows_, options);
  s.runner = std::this_thread::get_id();
  Step& step = *s.step;
  if (step.ahead) s.times.begin(step.program->shared_plan());
  for (const Delivery& delivery : early) step.arrive(delivery, [](int) {});
  for (const TaskId task : early_decided) step.decided.decide(task);
  if (s.early_error) {
    step.stopping = true;
    step.result.outcome = Outcome::Failed;
    step.result.error = std::exchange(s.early_error, nullptr);
  }
  for (auto& worker : s.work) worker.notify_one();

  const Nanoseconds timeout = static_cast<Nanoseconds>(options.timeout.count() * 1e9);
  auto next_poll = Clock::now() + kPollPeriod;
  while (!step.over()) {
    if (s.giving_up) {
      abandon(step);
      break;
    }
    if (s.over.wait_until(lock, next_poll) != std::cv_status::timeout) continue;
    lock.unlock();
    const bool interrupt = options.poll && options.poll();
    lock.lock();
    next_poll = Clock::now() + kPollPeriod;
    if (step.over()) break;
    if (interrupt) {
      if (step.stopping) {
        abandon(step);
        break;
      }
      step.result.outcome = Outcome::Interrupted;
      step.stopping = true;
    }
    if (now() - step.last_progress > timeout) {
      if (!step.stopping) {
        step.result.outcome = Outcome::TimedOut;
        step.result.waiting = step.waiting();
        step.stopping = true;
      }
      if (step.running > 0) {
        abandon(step);
        break;
      }
    }
  }
  if (step.ahead && step.result.outcome == Outcome::Done) s.times.end();
  StepResult result = std::move(step.result);
  result.end = now();
  result.peak_by_stage = step.scheduler.peak_by_stage();
  result.peak_by_rank = step.scheduler.peak_by_rank();
  std::unique_ptr<Step> ended = std::move(s.step);
  if (s.dead) s.lost = std::move(ended);
  s.early.clear();
  s.early_decided.clear();
  s.runner = {};
  lock.unlock();
  s.idle.notify_all();
  return result;
}

void HostExecutor::deliver(TaskId task, int stage, const std::vector<int>& microbatches) {
  Shared& s = *shared_;
  std::vector<int> to_wake;
  {
    std::lock_guard lock(s.mutex);
    if (!s.step) {
      s.early.push_back({task, stage, microbatches});
      return;
    }
    if (s.step->stopping) return;
    check_delivery(s.step->plan(), task);
    s.step->last_progress = now();
    s.step->arrive({task, stage, microbatches}, [&](int worker) { to_wake.push_back(worker); });
  }
  for (const int worker : to_wake) s.work[worker].notify_one();
  // On a shared core, lets the worker begin before this thread prepares for the next message.
  if (!to_wake.empty()) std::this_thread::yield();
}

void HostExecutor::decide(TaskId task) {
  if (!follows_) throw std::invalid_argument("it follows no other process");
  Shared& s = *shared_;
  {
    std::lock_guard lock(s.mutex);
    if (!s.step) {
      s.early_decided.push_back(task);
      return;
    }
    if (s.step->stopping) return;
    check_decision(s.step->plan(), rank_, task);
    s.step->last_progress = now();
    s.step->decided.decide(task);
  }
  s.work[0].notify_one();
}

bool HostExecutor::fail(std::exception_ptr error) {
  Shared& s = *shared_;
  std::lock_guard lock(s.mutex);
  if (!s.step) {
    // The first one. Destroying an error may need the GIL, which a thread that waits for the mutex may hold.
    if (!s.early_error) s.early_error = std::move(error);
    return false;
  }
  if (!s.step->stopping) {
    s.step->stopping = true;
    s.step->result.outcome = Outcome::Failed;
    s.step->result.error = std::move(error);
    s.over.notify_one();
  }
  return true;
}

void HostExecutor::abandon(Step& step) {
  Shared& s = *shared_;
  std::string running;
  for (int worker = 0; worker < num_workers_; ++worker) {
    if (s.running[worker] == kNoTask) continue;
    s.abandoned[worker] = true;
    thread_may_not_end();
    running += "  rank " + std::to_string(step.plan().rank_of_worker(step.first_worker + worker)) + ": " +
               to_text(step.plan().action(s.running[worker])) + " is running and has not returned\n";
  }
  step.result.waiting = running + step.result.waiting;
  s.dead = true;
}

void HostExecutor::close(std::chrono::duration<double> limit) {
  if (!shared_) return;
  if (getpid() != owner_pid_) {
    new std::shared_ptr<Shared>(std::move(shared_));  // leaked: threads and locks do not survive a fork
    return;
  }
  Shared& s = *shared_;
  std::unique_lock lock(s.mutex);
  s.closing = true;
  for (auto& worker : s.work) worker.notify_one();
  if (s.step) {
    if (!s.step->stopping) s.step->result.outcome = Outcome::Closed;
    s.step->stopping = true;
    s.over.notify_one();
  }
  const auto me = std::this_thread::get_id();
  if (s.runner == me) return;
  for (const std::thread& thread : s.threads) {
    if (thread.get_id() == me) return;
  }
  const auto idle = [&] { return s.step == nullptr; };
  if (!s.idle.wait_for(lock, limit, idle)) {
    s.giving_up = true;
    s.over.notify_one();
    s.idle.wait(lock, idle);
  }
  std::vector<std::thread> threads = std::move(s.threads);
  s.threads.clear();
  const std::vector<bool> abandoned = s.abandoned;
  lock.unlock();
  for (std::size_t worker = 0; worker < threads.size(); ++worker) {
    abandoned[worker] ? threads[worker].detach() : threads[worker].join();
  }
}

bool HostExecutor::dead() const {
  std::lock_guard lock(shared_->mutex);
  return shared_->dead;
}

}  // namespace pe
