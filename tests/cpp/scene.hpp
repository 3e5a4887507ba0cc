// A program on the stand-in driver, in which each task is a host function that records when it runs.
#pragma once

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

#include "check.hpp"
#include "cuda/driver.hpp"
#include "cuda/stream_pool.hpp"
#include "runtime/stream_executor.hpp"
#include "simulate/make_plan.hpp"
#include "standin.hpp"
#include "times.hpp"

namespace pe {

using SharedStreamPlan = std::shared_ptr<const StreamPlan>;

inline SharedStreamPlan on_streams(Plan made, std::vector<int> device_of_rank) {
  const auto plan = std::make_shared<const Plan>(std::move(made));
  const TaskTimes times = times_of(*plan, Costs::uniform(plan->num_stages()));
  return std::make_shared<const StreamPlan>(plan, times, std::move(device_of_rank));
}

// Owners of graphs, like torch's.
struct Destroy {
  void operator()(cuda::GraphHandle graph) const { standin::controls().destroy_graph(graph); }
  void operator()(standin::ExecHandle exec) const { standin::controls().destroy_exec(exec); }
};
using Graph = std::unique_ptr<std::remove_pointer_t<cuda::GraphHandle>, Destroy>;
using Exec = std::unique_ptr<std::remove_pointer_t<standin::ExecHandle>, Destroy>;

// When a host function ran: positions among all begins and ends, from 1; 0 if it did not run.
struct Ran {
  int begin = 0;
  int end = 0;
};

// Host functions on streams, by name.
class HostFunctions {
 public:
  void enqueue(cuda::StreamHandle stream, const std::string& name, std::function<void()> work) {
    Function& function = functions_.emplace_back(Function{*this, name, std::move(work)});
    const auto run = [](void* data) { static_cast<Function*>(data)->run(); };
    cuda::Driver::get().check(standin::controls().launch_host(stream, run, &function), "cuLaunchHostFunc");
  }

  // Lets work check that other work runs at the same time.
  bool wait_until_begun(const std::string& name) {
    std::unique_lock lock(mutex_);
    return begun_.wait_for(lock, std::chrono::seconds(30), [&] { return ran_[name].begin > 0; });
  }

  // What has run since the last call; the last time, if it ran twice.
  std::map<std::string, Ran> take() {
    const std::lock_guard lock(mutex_);
    now_ = 0;
    return std::exchange(ran_, {});
  }

 private:
  struct Function {
    void run() const {
      {
        const std::lock_guard lock(owner.mutex_);
        owner.ran_[name].begin = ++owner.now_;
      }
      owner.begun_.notify_all();
      work();
      const std::lock_guard lock(owner.mutex_);
      owner.ran_[name].end = ++owner.now_;
    }

    HostFunctions& owner;
    const std::string name;
    const std::function<void()> work;
  };

  std::deque<Function> functions_;
  std::mutex mutex_;
  std::condition_variable begun_;
  std::map<std::string, Ran> ran_;
  int now_ = 0;
};

// A freshly reset stand-in driver, an executor, a program laid out on it, and a caller's stream on each device.
// The destructor checks that nothing is alive except what the driver refused to destroy.
class Scene {
 public:
  explicit Scene(SharedStreamPlan laid_plan) : plan(std::move(laid_plan)) {
    standin::controls().reset(2);
    for (std::uint32_t i = 0; i < plan->ops().size(); ++i) {
      number_of_[to_text(plan->ops()[i].action)] = i;
    }
    const auto program = std::make_shared<Program>(plan->shared_plan());
    for (int stage = 0; stage < plan->plan().num_stages(); ++stage) {
      for (int kind = 0; kind < kNumKinds; ++kind) {
        program->set_body(stage, static_cast<Kind>(kind), [this](const Action& a) { body(a); });
      }
    }
    program_ = program;
    std::vector<int> devices = plan->device_of_rank();
    std::sort(devices.begin(), devices.end());
    devices.erase(std::unique(devices.begin(), devices.end()), devices.end());
    for (const int device : devices) {
      contexts_.push_back(std::make_shared<cuda::PrimaryContext>(device));
      streams_.emplace_back(contexts_.back(), 0);
      callers.push_back(streams_.back().handle());
    }
  }
  Scene(const Scene&) = delete;
  ~Scene() {
    release();
    std::map<std::string, long> refused;
    for (const std::string& line : standin::controls().lines()) {
      if (line.find("result=") == std::string::npos) continue;
      if (line.starts_with("cuStreamDestroy")) ++refused["stream"];
      if (line.starts_with("cuEventDestroy")) ++refused["event"];
      if (line.starts_with("cuDevicePrimaryCtxRelease")) ++refused["context"];
    }
    standin::controls().reset(2);
    streams_.clear();
    contexts_.clear();
    for (const char* kind : {"stream", "event", "graph", "graph_exec", "context"}) {
      if (!leaves_things_behind) CHECK_EQ(standin::controls().live(kind), refused[kind]);
    }
    standin::controls().discard();
  }

  // Creates what does not exist yet.
  void make() {
    if (!executor) executor.emplace(plan->device_of_rank());
    if (!laid) laid = executor->lay_out(program_, plan);
  }
  // Lets enqueued work run, and releases what was created.
  void release() {
    standin::controls().pause(0);
    standin::controls().drain();
    laid.reset();
    executor.reset();
    cuda::empty_stream_pool();
  }

  DeviceStepResult run(bool record = false) { return executor->run(*laid, {callers, record, false}); }
  // Captures a step from the first caller's stream, like torch; no graph if the step failed.
  std::pair<DeviceStepResult, Exec> capture(bool record = false) {
    const cuda::Driver& driver = cuda::Driver::get();
    const cuda::CurrentContext current(*contexts_[0]);
    driver.check(standin::controls().begin_capture(callers[0], 0), "cuStreamBeginCapture");
    const DeviceStepResult result = executor->run(*laid, {callers, record, true});
    cuda::GraphHandle ended = nullptr;
    const cuda::Result end = standin::controls().end_capture(callers[0], &ended);
    const Graph graph(ended);
    if (result.error) return {result, nullptr};
    driver.check(end, "cuStreamEndCapture");
    std::size_t num_nodes = 0;
    PE_CUDA(driver, cuGraphGetNodes, graph.get(), nullptr, &num_nodes);
    CHECK_EQ(result.num_nodes, num_nodes);
    standin::ExecHandle exec = nullptr;
    driver.check(standin::controls().instantiate(&exec, graph.get(), 0), "cuGraphInstantiateWithFlags");
    return {result, Exec(exec)};
  }
  void launch(const Exec& exec) {
    const cuda::CurrentContext current(*contexts_[0]);
    cuda::Driver::get().check(standin::controls().launch(exec.get(), callers[0]), "cuGraphLaunch");
  }

  // Enqueues a host function on each caller's stream: "NAME 0", "NAME 1".
  void enqueue_on_callers(const std::string& name) {
    for (std::size_t i = 0; i < callers.size(); ++i) {
      const cuda::CurrentContext current(*contexts_[i]);
      functions.enqueue(callers[i], name + " " + std::to_string(i), [] {});
    }
  }

  // Waits until all streams are idle; returns what has run.
  std::map<std::string, Ran> ran() {
    standin::controls().drain();
    return functions.take();
  }
  // Checks that all ops of the step with this label ran, each after its dependencies, and between the functions
  // `before` and `after` of enqueue_on_callers().
  void check_step(std::map<std::string, Ran>& ran, const std::string& label, const std::string& before = "",
                  const std::string& after = "") const {
    const auto of = [&](std::uint32_t number) { return ran[label + to_text(plan->ops()[number].action)]; };
    const Plan& tasks = plan->plan();
    for (TaskId t = 0; t < tasks.size(); ++t) {
      const std::uint32_t own = plan->op_of(t), sent = plan->sent_by(t);
      CHECK(own == sent || of(own).end < of(sent).begin);
      for (const TaskId next : tasks.successors(t)) {
        const auto device = [&](TaskId task) { return plan->device_of_rank()[tasks.rank_of(task)]; };
        CHECK(of(device(t) == device(next) ? own : sent).end < of(plan->op_of(next)).begin);
      }
    }
    std::vector<int> worker_free(tasks.num_workers(), 0);
    for (std::uint32_t i = 0; i < plan->ops().size(); ++i) {
      const StreamOp& op = plan->ops()[i];
      CHECK(0 < of(i).begin && of(i).begin < of(i).end);
      for (std::size_t d = 0; d < callers.size(); ++d) {
        const std::string device = " " + std::to_string(d);
        if (!before.empty()) CHECK(0 < ran[before + device].end);
        if (!before.empty() && plan->streams()[op.stream].device == executor->devices()[d]) {
          CHECK(ran[before + device].end < of(i).begin);
        }
        if (!after.empty()) CHECK(of(i).end < ran[after + device].begin);
      }
      if (op.is_copy) continue;
      CHECK(worker_free[tasks.worker_of(op.task)] < of(i).begin);
      worker_free[tasks.worker_of(op.task)] = of(i).end;
    }
  }

  cuda::StreamHandle stream_of(const Action& action) const {
    const StreamOp& op = plan->ops()[number_of_.at(to_text(action))];
    return StreamExecutor::streams_of(*laid)[op.stream];
  }

  const SharedStreamPlan plan;
  std::optional<StreamExecutor> executor;
  std::shared_ptr<StreamExecutor::Laid> laid;
  std::vector<cuda::StreamHandle> callers;  // by device
  HostFunctions functions;
  std::string label;                             // prefix of the names of a step's functions
  std::function<void(const Action&)> in_body;    // called while a task is enqueued
  std::function<void(const Action&)> on_device;  // called while it runs
  bool leaves_things_behind = false;             // as on a device that has failed

 private:
  void body(const Action& action) {
    if (in_body) in_body(action);
    const std::string name = label + to_text(action);
    functions.enqueue(stream_of(action), name, [this, action, name] {
      std::this_thread::sleep_for(std::chrono::microseconds(std::hash<std::string>()(name) % 100));
      if (on_device) on_device(action);
    });
  }

  std::map<std::string, std::uint32_t> number_of_;  // of ops, by the text of their action
  std::shared_ptr<const Program> program_;
  std::vector<std::shared_ptr<cuda::PrimaryContext>> contexts_;
  std::vector<cuda::Stream> streams_;
};

}  // namespace pe
