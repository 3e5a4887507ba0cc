// Explores steps of HostExecutor: every order in which its threads, those that stop it and those that deliver
// to it can take turns.
//
//   steps CSV [NAME=NUMBER ...]
//
// The plan: pack (K, both ways), limit (slots of each stage), reactive, overlap. What may happen: fail (tasks
// that raise), interrupt (times that the caller asks to stop), late (once, nothing happens for a long time),
// tell (another thread fails the step), close (another thread closes the executor), spurious (waits end by
// themselves). steps: how many, one after another. apart=1: each rank is a process with an executor of its own.
// alone=R: so it is, and only that of rank R is here; the other may do all that it may do in any plan.
// follow=1: it runs what another process decides, in any order that the plan allows. members=N: see groups.hpp;
// its fault=1, 2.
#include <algorithm>
#include <array>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "plan/order.hpp"
#include "protocol/explore.hpp"
#include "protocol/groups.hpp"
#include "protocol/watch.hpp"
#include "runtime/host_executor.hpp"
#include "schedule/list_scheduler.hpp"

using namespace pe;

namespace {

class Settings {
 public:
  Settings(int count, char** given) {
    for (int i = 0; i < count; ++i) {
      const std::string text = given[i];
      const std::size_t equals = text.find('=');
      numbers_[text.substr(0, equals)] = std::stoi(text.substr(equals + 1));
    }
  }
  int of(const char* name, int otherwise = 0) const {
    const auto found = numbers_.find(name);
    return found == numbers_.end() ? otherwise : found->second;
  }

 private:
  std::map<std::string, int> numbers_;
};

std::shared_ptr<const Plan> plan_of(const char* csv, const Settings& settings) {
  std::string text = csv;
  for (char& c : text) c = c == '/' ? '\n' : c;
  const Order order = order_from_csv(text);
  const Shape shape = validate(order);
  PlanOptions options{.overlap = settings.of("overlap") != 0, .reactive = settings.of("reactive") != 0};
  const int pack = settings.of("pack", 1);
  const std::vector<int> packs(shape.num_stages - 1, pack);
  if (pack > 1) options.packs = {packs, packs};
  std::vector<int> limits;
  if (const int limit = settings.of("limit")) limits.assign(shape.num_stages, limit);
  auto plan = std::make_shared<const Plan>(order, shape, options, limits);
  check_ends(*plan);
  plan->dependencies();
  return plan;
}

struct Raised {};

class Scene {
 public:
  Scene(std::shared_ptr<const Plan> plan, const Settings& settings)
      : plan_(std::move(plan)),
        settings_(settings),
        pack_(settings.of("pack", 1)),
        groups_((plan_->num_microbatches() + pack_ - 1) / pack_),
        alone_(settings.of("alone", kEveryRank)),
        apart_(settings.of("apart") != 0 || alone_ != kEveryRank),
        watch_(*plan_, pack_, apart_, now_.watch),
        program_(plan_) {
    for (int stage = 0; stage < plan_->num_stages(); ++stage) {
      for (const Kind kind : {Kind::F, Kind::B, Kind::I, Kind::W}) {
        program_.set_body(stage, kind, [this](const Action& action) { run_task(action); });
      }
    }
    for (TaskId task = 0; task < plan_->size(); ++task)
      names_.push_back("runs " + to_text(plan_->action(task)));
  }

  world::Explored explore(std::size_t most_states) {
    scene = this;
    world::taken = [](int thread) { scene->watch_.took(thread); };
    world::given_back = [](int thread) { scene->watch_.gave_back(thread); };
    const world::Rules rules{.polls = settings_.of("polls", settings_.of("interrupt")) != 0,
                             .spurious = settings_.of("spurious") != 0,
                             .late = settings_.of("late") != 0};
    const auto prepare = [this] {
      now_ = {};
      now_.fail = settings_.of("fail");
      now_.interrupt = settings_.of("interrupt");
    };
    const auto body = [this] {
      // Never freed: an abandoned thread may raise it after all others have ended.
      error_ = new std::exception_ptr(std::make_exception_ptr(Raised{}));
      apart_ ? run_apart() : run_together();
    };
    return world::explore(rules, prepare, body, std::as_writable_bytes(std::span(&now_, 1)), most_states);
  }

 private:
  // What a process has done for others, and what has reached it.
  struct Process {
    int begun, sent, received, decided;
    bool noticed, failed, closed;
  };
  // All of the state that is not the core's.
  struct Now {
    Watch::State watch;
    std::array<Process, kMostProcesses> processes;
    std::array<TaskId, Watch::State::kTasks> order;  // that was decided
    int ran;                                         // of these
    int fail, interrupt;                             // as often it may still happen
    int happened;
  };

  // One process that has all ranks.
  void run_together() {
    {
      HostExecutor executor(plan_->num_workers(), names_of_threads(plan_->num_workers()), hooks(0));
      std::vector<std::thread> others;
      if (settings_.of("tell")) {
        others.emplace_back([&] {
          happens(0);
          executor.fail(*error_);
        });
      }
      if (settings_.of("close")) {
        others.emplace_back([&] {
          happens(0);
          executor.close();
        });
      }
      for (int step = 0; step < settings_.of("steps", 1) && !executor.dead(); ++step) {
        if (step > 0) now_.fail = now_.interrupt = 0;
        run_step(executor, 0, kEveryRank);
      }
      for (std::thread& other : others) other.join();
    }
  }

  // A process for each rank, with a thread that receives and one that reads notices.
  void run_apart() {
    std::array<std::optional<HostExecutor>, kMostProcesses> executors;
    const int workers = plan_->workers_per_rank();
    for (int p = 0; p < kMostProcesses; ++p) {
      if (alone_ == kEveryRank || alone_ == p)
        executors[p].emplace(workers, names_of_threads(workers), hooks(p), p, settings_.of("follow") != 0);
    }
    const int first = alone_ == kEveryRank ? 0 : alone_;
    std::thread other([&] { alone_ == kEveryRank ? run_process(*executors[1], 1) : play_other(); });
    run_process(*executors[first], first);
    other.join();
  }

  // At some moment the other process fails; from then on no message arrives, or they go on arriving.
  void play_other() {
    if (settings_.of("tell") == 0) return;
    world::name("fails elsewhere");
    now_.processes[1 - alone_].closed = world::choose(2) == 1;
    now_.processes[alone_].noticed = true;
  }

  // Whether a message for the process has been sent and not received. One that is played sends as early as it
  // can: activations at once, gradients after the activations.
  bool has_message(int p) const {
    const Process& mine = now_.processes[p];
    const Process& other = now_.processes[1 - p];
    if (alone_ == kEveryRank) return mine.received < other.sent;
    return !other.closed && (p == 1 || mine.received < mine.sent);
  }

  void run_process(HostExecutor& executor, int p) {
    watch_.works(world::me(), p);
    std::thread receiver([&, p] { receive(executor, p); });
    std::thread watcher([&, p] { hear(executor, p); });
    std::optional<std::thread> decider;
    if (settings_.of("follow") != 0) decider.emplace([&, p] { decide(executor, p); });
    Process& mine = now_.processes[p];
    for (int step = 0; step < settings_.of("steps", 1) && !mine.failed; ++step) {
      ++mine.begun;
      if (run_step(executor, p, p) == Outcome::Done) continue;
      if (!mine.noticed && settings_.of("mute") == 0) now_.processes[1 - p].noticed = true;
      mine.failed = true;
    }
    mine.closed = true;
    receiver.join();
    watcher.join();
    if (decider) decider->join();
  }

  // One message after another: those of a step once that has begun.
  void receive(HostExecutor& executor, int p) {
    watch_.works(world::me(), p);
    const auto open = [](void* process) {
      const Process& mine = *static_cast<Process*>(process);
      const int me = static_cast<int>(&mine - scene->now_.processes.data());
      return mine.closed || (mine.received / scene->groups_ < mine.begun && scene->has_message(me));
    };
    Process& mine = now_.processes[p];
    const int steps = settings_.of("steps", 1);
    while (mine.received < steps * groups_) {
      world::name("receives");
      world::await(open, &mine, alone_ == kEveryRank);
      if (mine.closed) return;
      const int group = mine.received++ % groups_;
      const Kind kind = kind_sent_by(1 - p);
      std::vector<int> microbatches;
      TaskId last = 0;
      for (int m = group * pack_; m < std::min((group + 1) * pack_, plan_->num_microbatches()); ++m) {
        microbatches.push_back(m);
        last = std::max(last, watch_.find(1 - p, kind, m));
      }
      watch_.delivers(world::me(), 1 - p, group);
      executor.deliver(last, p, microbatches);
    }
  }

  // Another process decides the order of each step, whatever the plan allows: it may be far ahead, and late.
  void decide(HostExecutor& executor, int p) {
    watch_.works(world::me(), p);
    const auto open = [](void* process) {
      const Process& mine = *static_cast<Process*>(process);
      const int tasks = static_cast<int>(scene->plan_->end_of_rank(0));  // as many on each rank
      return mine.closed || mine.decided / tasks < mine.begun;
    };
    Process& mine = now_.processes[p];
    const TaskId first = plan_->first_of_rank(p), end = plan_->end_of_rank(p);
    for (int step = 0; step < settings_.of("steps", 1); ++step) {
      unsigned decided = 0;
      for (TaskId count = first; count < end; ++count) {
        world::name("hears");
        world::await(open, &mine, alone_ == kEveryRank);
        if (mine.closed) return;
        int found = 0;
        for (TaskId task = first; task < end; ++task) found += may_be_next(task, first, decided);
        int skipped = found == 1 ? 0 : world::choose(found);
        TaskId task = first;
        while (!may_be_next(task, first, decided) || skipped-- > 0) ++task;
        decided |= 1u << (task - first);
        now_.order[mine.decided++ % (end - first)] = task;
        executor.decide(task);
      }
    }
  }

  // Whether the leader could take the task after those that it has: they are a set, from the rank's first task
  // on.
  bool may_be_next(TaskId task, TaskId first, unsigned decided) const {
    const auto is_decided = [&](TaskId other) { return (decided >> (other - first) & 1) != 0; };
    if (is_decided(task)) return false;
    const Action& a = plan_->action(task);
    int in_flight = 0;
    for (TaskId other = first; other < plan_->end_of_rank(plan_->rank_of(task)); ++other) {
      const Action& b = plan_->action(other);
      if (b.kind == a.kind && other < task && !is_decided(other)) return false;
      const bool is_before = b.microbatch == a.microbatch && other < task && a.kind != Kind::F;
      if (is_before && !is_decided(other)) return false;
      if (is_decided(other)) in_flight += plan_->takes_slot(other) - plan_->frees_slot(other);
    }
    return a.kind != Kind::F || in_flight < plan_->limit(a.stage);
  }

  void hear(HostExecutor& executor, int p) {
    watch_.works(world::me(), p);
    Process& mine = now_.processes[p];
    world::name("reads its notices");
    world::await(
        [](void* process) {
          const auto* of = static_cast<Process*>(process);
          return of->noticed || of->closed;
        },
        &mine, false);
    if (!mine.noticed) return;
    mine.failed = true;
    happens(p);
    executor.fail(*error_);
  }

  Outcome run_step(HostExecutor& executor, int process, int rank) {
    RunOptions options;
    options.look_ahead = false;  // it depends on the clock, and only leaves out some of these runs
    options.poll = [this, process] {
      if (now_.interrupt == 0 || world::choose(2) == 0) return false;
      --now_.interrupt;
      happens(process);
      return true;
    };
    const int happened = now_.happened;
    now_.ran = 0;
    watch_.step_begins(process, rank);
    StepResult result;
    try {
      // Not counted: the count would not be put back with the world.
      result = executor.run(std::shared_ptr<const Program>(std::shared_ptr<void>(), &program_), options);
    } catch (const std::logic_error&) {
      result.outcome = Outcome::Closed;
    }
    watch_.step_ended(process, result.outcome == Outcome::Done, executor.dead());
    // What another thread asks for may reach a later step.
    const bool is_explained = now_.happened > happened || settings_.of("tell") != 0 ||
                              settings_.of("close") != 0 || (apart_ && now_.happened > 0) ||
                              settings_.of("late") != 0;
    if (result.outcome != Outcome::Done && !is_explained)
      world::fail("a step fails of which nothing has failed");
    return result.outcome;
  }

  void run_task(const Action& action) {
    const TaskId task = watch_.find(action.stage, action.kind, action.microbatch);
    const int thread = world::me();
    watch_.begins(thread, task);
    if (settings_.of("follow") != 0 && now_.order[now_.ran++] != task) {
      world::fail(to_text(action) + " begins out of the decided order");
    }
    world::name(names_[task].c_str());
    if (now_.fail > 0 && world::choose(2) == 1) {
      --now_.fail;
      watch_.raises(thread);
      happens(watch_.process_of(thread));
      std::rethrow_exception(*error_);
    }
    if (apart_ && action.kind == kind_sent_by(action.stage) && watch_.completes_group(task)) send(action);
  }

  // The message of a group leaves with its last result.
  void send(const Action& action) {
    int& sent = now_.processes[action.stage].sent;
    if (sent++ % groups_ != action.microbatch / pack_) world::fail("groups are sent out of order");
  }

  Kind kind_sent_by(int stage) const {
    return stage == 0 ? Kind::F : watch_.find(stage, Kind::B, 0) == kNoTask ? Kind::I : Kind::B;
  }

  // Something that may end the running step: this thread asks for it.
  void happens(int process) {
    ++now_.happened;
    watch_.asks_to_stop(world::me(), process);
  }

  HostExecutor::ThreadHooks hooks(int process) {
    return {[this, process](int) { watch_.works(world::me(), process); }, {}};
  }
  static std::vector<std::string> names_of_threads(int count) {
    return std::vector<std::string>(count, "worker");
  }

  static Scene* scene;  // for the functions that the world calls
  const std::shared_ptr<const Plan> plan_;
  const Settings& settings_;
  const int pack_;
  const int groups_;  // messages each way in a step
  const int alone_;
  const bool apart_;
  Now now_{};
  Watch watch_;
  Program program_;
  const std::exception_ptr* error_ = nullptr;  // in the world, for all who raise: it takes no memory then
  std::vector<std::string> names_;
};

Scene* Scene::scene = nullptr;

}  // namespace

int main(int count, char** given) {
  if (count < 2) return 2;
  const Settings settings(count - 2, given + 2);
  const std::shared_ptr<const Plan> plan = plan_of(given[1], settings);
  const int members = settings.of("members");
  const world::Explored found = members > 0
                                    ? explore_groups(*plan, members, static_cast<Fault>(settings.of("fault")))
                                    : Scene(plan, settings).explore(settings.of("most", 10'000'000));
  for (const std::string& line : found.trace) std::printf("  %s\n", line.c_str());
  if (!found.violation.empty()) std::printf("violated: %s\n", found.violation.c_str());
  std::printf("%zu states, %zu transitions, %zu ends, longest way %zu\n", found.states, found.transitions,
              found.ends, found.longest);
  return found.violation.empty() ? 0 : 1;
}
