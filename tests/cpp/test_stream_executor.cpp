#include "runtime/stream_executor.hpp"

#include <atomic>
#include <cstring>
#include <set>
#include <stdexcept>

#include "scene.hpp"

using namespace pe;
using namespace std::chrono_literals;
using standin::controls;

namespace {

// Schedules on one device and on two; one whose order lists its messages.
std::vector<SharedStreamPlan> plans() {
  std::vector<SharedStreamPlan> made;
  for (const bool overlap : {false, true}) {
    for (const std::vector<int>& devices : {std::vector{0, 0, 0}, std::vector{0, 1, 0}}) {
      PlanOptions options{.overlap = overlap};
      made.push_back(on_streams(make_plan(find_schedule("1f1b"), 3, 3, 4, options), devices));
      options.packs.backward = {2, 2};
      made.push_back(on_streams(make_plan(find_schedule("gpipe"), 3, 3, 4, options), devices));
    }
    const std::vector<int> devices{1, 0};
    const Schedule& interleaved = find_schedule("interleaved-1f1b");
    made.push_back(on_streams(make_plan(interleaved, 4, 2, 4, {.overlap = overlap}), devices));
    const Order order = order_from_csv(
        "0F0,0SEND_F0,0F1,0SEND_F1,0RECV_B0,0B0,0RECV_B1,0B1,0REDUCE_GRAD\n"
        "1RECV_F0,1F0,1I0,1SEND_B0,1W0,1RECV_F1,1F1,1I1,1SEND_B1,1W1\n");
    made.push_back(on_streams(make_plan(order, {.overlap = overlap}), devices));
  }
  return made;
}

// One rank that runs 0F1 beside 0B0.
SharedStreamPlan overlapping() {
  return on_streams(make_plan(parse_order({{"0F0", "0F1", "0B0", "0B1"}}), {.overlap = true}), {0});
}

SharedStreamPlan on_two_devices() {
  return on_streams(make_plan(find_schedule("1f1b"), 2, 2, 4, {.overlap = true}), {0, 1});
}

std::string text_of(const std::exception_ptr& error) {
  try {
    if (error) std::rethrow_exception(error);
  } catch (const std::exception& caught) {
    return caught.what();
  }
  return "";
}

// The names of the driver functions in the log, from one line on.
std::set<std::string> called(std::size_t from_line) {
  std::set<std::string> names;
  const auto lines = controls().lines();
  for (std::size_t i = from_line; i < lines.size(); ++i) {
    names.insert(lines[i].substr(0, lines[i].find(' ')));
  }
  return names;
}

}  // namespace

TEST(on_the_device_each_task_follows_what_it_needs_and_each_step_the_one_before) {
  for (const SharedStreamPlan& plan : plans()) {
    Scene scene(plan);
    scene.make();
    scene.enqueue_on_callers("before");
    for (const std::string step : {"first ", "second ", "third "}) {
      scene.label = step;
      CHECK(scene.run().outcome == Outcome::Done);
      scene.enqueue_on_callers("after " + step);
    }
    auto ran = scene.ran();
    scene.check_step(ran, "first ", "before", "after first ");
    scene.check_step(ran, "second ", "after first ", "after second ");
    scene.check_step(ran, "third ", "after second ", "after third ");
  }
}

TEST(forward_and_backward_of_different_microbatches_run_at_the_same_time) {
  Scene scene(overlapping());
  std::atomic<int> met{0};
  scene.on_device = [&](const Action& action) {
    if (action == Action{0, 1, Kind::F}) met += scene.functions.wait_until_begun("0B0");
    if (action == Action{0, 0, Kind::B}) met += scene.functions.wait_until_begun("0F1");
  };
  scene.make();
  scene.run();
  auto ran = scene.ran();
  scene.check_step(ran, "");
  CHECK_EQ(met.load(), 2);
}

TEST(the_host_enqueues_a_step_without_waiting_for_it) {
  for (const SharedStreamPlan& plan : plans()) {
    Scene scene(plan);
    scene.make();
    controls().pause(1);
    CHECK(scene.run().outcome == Outcome::Done);
    CHECK(scene.functions.take().empty());
    controls().pause(0);
    auto ran = scene.ran();
    scene.check_step(ran, "");
  }
}

TEST(a_step_calls_nothing_but_what_enqueues_and_makes_nothing_twice) {
  Scene scene(on_two_devices());
  scene.make();
  std::size_t line = controls().lines().size();
  std::set<std::string> enqueueing = {"cuCtxPushCurrent", "cuCtxPopCurrent", "cuStreamWaitEvent",
                                      "cuEventRecordWithFlags", "cuLaunchHostFunc"};
  scene.run();
  CHECK(called(line) == enqueueing);
  scene.run(true);
  line = controls().lines().size();
  scene.run(true);
  CHECK(called(line) == enqueueing);
  const long streams = controls().live("stream"), contexts = controls().live("context");
  scene.laid.reset();
  scene.make();
  CHECK_EQ(controls().live("stream"), streams);  // a program that is laid out again reuses the streams
  CHECK_EQ(controls().live("context"), contexts);
}

TEST(a_step_leaves_the_callers_context_as_it_was) {
  Scene scene(on_two_devices());
  scene.make();
  scene.run(true);
  CHECK(scene.executor->wait_for_room({}) == Outcome::Done);
  CHECK_EQ(cuda::Driver::get().cuCtxPopCurrent(nullptr), 201);  // there was none
}

TEST(two_executors_reach_the_same_peers) {
  Scene scene(on_two_devices());
  scene.make();
  const StreamExecutor another({1, 0, 1});
  CHECK((another.devices() == std::vector{0, 1}));
  CHECK(controls().lines().back().starts_with("cuCtxPopCurrent"));
  const auto lines = controls().lines();
  CHECK_EQ(
      std::count_if(lines.begin(), lines.end(), [](const auto& line) { return line.ends_with("result=704"); }),
      2);
}

TEST(the_host_is_at_most_two_steps_ahead) {
  Scene scene(on_two_devices());
  scene.make();
  controls().pause(1);
  for (int step = 0; step < 2; ++step) {
    CHECK(scene.executor->wait_for_room({}) == Outcome::Done);
    scene.run();
  }
  CHECK(scene.executor->wait_for_room({20ms, nullptr}) == Outcome::TimedOut);
  int polls = 0;
  const auto poll = [&] { return ++polls == 3; };
  CHECK(scene.executor->wait_for_room({.poll = poll}) == Outcome::Interrupted);
  CHECK_EQ(polls, 3);
  controls().pause(0);
  CHECK(scene.executor->wait_for_room({}) == Outcome::Done);
  controls().drain();
  controls().pause(1);
  scene.executor->mark(scene.callers);  // as after the launch of a graph
  CHECK(scene.executor->wait_for_room({0s, nullptr}) == Outcome::Done);
  scene.executor->mark(scene.callers);
  CHECK(scene.executor->wait_for_room({0s, nullptr}) == Outcome::TimedOut);
}

TEST(what_reads_inputs_is_waited_for_and_only_once) {
  Scene scene(overlapping());
  scene.make();
  CHECK(scene.executor->wait_for_inputs({0s, nullptr}) == Outcome::Done);
  controls().pause(1);
  scene.executor->mark_inputs(0, scene.callers[0]);
  CHECK(scene.executor->wait_for_inputs({20ms, nullptr}) == Outcome::TimedOut);
  CHECK(scene.executor->wait_for_inputs({0s, nullptr}) == Outcome::Done);
  scene.executor->mark_inputs(0, scene.callers[0]);
  controls().pause(0);
  CHECK(scene.executor->wait_for_inputs({}) == Outcome::Done);
}

TEST(a_query_that_a_capture_forbids_leaves_the_executor_alive) {
  Scene scene(overlapping());
  scene.make();
  controls().fail_at(controls().num_calls() + 2, cuda::kFirstCaptureError);
  CHECK_THROWS(scene.executor->wait_for_room({}), cuda::CudaError,
               "cuEventQuery failed: CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED (900)");
  CHECK(!scene.executor->dead());
  CHECK(scene.executor->wait_for_room({}) == Outcome::Done);
}

TEST(where_the_driver_cannot_say_whether_there_is_room_the_executor_is_dead) {
  Scene scene(overlapping());
  scene.make();
  controls().fail_at(controls().num_calls() + 2, 719);  // the context is made current, the capture mode relaxed
  CHECK_THROWS(scene.executor->wait_for_room({}), cuda::CudaError,
               "cuEventQuery failed: CUDA_ERROR_LAUNCH_FAILED (719)");
  CHECK(scene.executor->dead());
  CHECK_THROWS(scene.executor->wait_for_room({}), std::logic_error, "it is dead: a device has failed");
  CHECK_THROWS(scene.run(), std::logic_error, "it is dead: a device has failed");
}

TEST(a_recorded_step_tells_when_its_tasks_ran) {
  for (const SharedStreamPlan& plan : plans()) {
    Scene scene(plan);
    scene.make();
    controls().pause(1);
    CHECK(!scene.run().times);
    const auto first = scene.run(true).times, second = scene.run(true).times;
    CHECK(first != second);  // both are on their way
    CHECK(!first->done());
    CHECK_THROWS(first->read(), cuda::CudaError, "CUDA_ERROR_NOT_READY (600)");
    controls().pause(0);
    controls().drain();
    for (const auto& recorded : {first, second}) {
      CHECK(recorded->done());
      const MeasuredTimes times = recorded->read();
      const Plan& tasks = plan->plan();
      CHECK_EQ(times.begin.size(), plan->ops().size());
      CHECK_EQ(times.end.size(), plan->ops().size());
      for (std::size_t i = 0; i < times.begin.size(); ++i) {
        CHECK(0 <= times.begin[i] && times.begin[i] <= times.end[i] && times.end[i] <= times.step);
      }
      for (TaskId t = 0; t < tasks.size(); ++t) {
        for (const TaskId after : tasks.successors(t)) {
          const std::uint32_t a = plan->op_of(t), b = plan->op_of(after);
          const auto device = [&](std::uint32_t op) { return plan->streams()[plan->ops()[op].stream].device; };
          if (device(a) == device(b)) CHECK(times.end[a] <= times.begin[b]);
        }
      }
    }
  }
}

TEST(times_that_nobody_holds_are_used_again) {
  Scene scene(overlapping());
  scene.make();
  const DeviceTimes* const first = scene.run(true).times.get();
  CHECK(scene.run(true).times.get() == first);
}

TEST(a_captured_step_is_a_graph_that_keeps_every_dependency) {
  for (const SharedStreamPlan& plan : plans()) {
    const auto& devices = plan->device_of_rank();
    if (std::any_of(devices.begin(), devices.end(), [](int device) { return device != 0; })) continue;
    Scene scene(plan);
    scene.make();
    scene.run();  // a capture comes after steps that ran eagerly
    scene.ran();
    const auto [result, exec] = scene.capture(true);
    CHECK(result.outcome == Outcome::Done);
    CHECK(scene.ran().empty());
    double earlier = 0;
    for (int launch = 0; launch < 3; ++launch) {
      scene.enqueue_on_callers("before");
      scene.launch(exec);
      scene.enqueue_on_callers("after");
      auto ran = scene.ran();
      scene.check_step(ran, "", "before", "after");
      CHECK(result.times->done());
      const MeasuredTimes times = result.times->read();
      for (std::size_t i = 0; i < times.begin.size(); ++i) {
        CHECK(0 <= times.begin[i] && times.begin[i] <= times.end[i] && times.end[i] <= times.step);
      }
      CHECK(times.step > 0 && times.step != earlier);
      earlier = times.step;
    }
    scene.run();  // and eagerly again
    auto ran = scene.ran();
    scene.check_step(ran, "");
  }
}

TEST(in_a_graph_the_kernels_of_backwards_have_the_greatest_priority_and_no_others_have_one) {
  Scene scene(overlapping());
  scene.in_body = [](const Action& action) { controls().note(to_text(action).c_str()); };
  scene.make();
  const auto [result, exec] = scene.capture(true);
  std::map<std::string, std::vector<std::string>> set;  // by the action before
  std::string action;
  for (const std::string& line : controls().lines()) {
    if (!line.starts_with("cu")) action = line;
    if (line.starts_with("cuGraphKernelNodeSetAttribute")) {
      CHECK(line.ends_with(" attribute=8 priority=-5"));
      set[action].push_back(line);
    }
  }
  CHECK_EQ(set.size(), 2u);
  CHECK_EQ(set["0B0"].size(), 1u);
  CHECK_EQ(set["0B1"].size(), 1u);
  CHECK(set["0B0"] != set["0B1"]);
}

TEST(only_a_stream_that_is_captured_takes_a_step_into_a_graph) {
  Scene scene(overlapping());
  scene.make();
  const DeviceStepResult result = scene.executor->run(*scene.laid, {scene.callers, false, true});
  CHECK(result.outcome == Outcome::Failed);
  CHECK(text_of(result.error).find("the stream is not being captured") != std::string::npos);
  CHECK(!scene.executor->dead());
}

TEST(results_are_copied_to_the_device_that_needs_them) {
  const SharedStreamPlan plan = on_two_devices();
  Scene scene(plan);
  using Buffers = std::map<std::pair<int, int>, std::vector<char>>;  // by stage and microbatch
  Buffers activations, received, gradients, returned;
  for (int stage : {0, 1}) {
    for (int m = 0; m < 4; ++m) {
      for (Buffers* all : {&activations, &received, &gradients, &returned}) {
        (*all)[{stage, m}].assign(4096, 0);
      }
    }
  }
  const auto send = [&](std::vector<char>& to, const std::vector<char>& from, const Action& a) {
    scene.executor->copy(reinterpret_cast<cuda::Address>(to.data()), 1 - a.stage,
                         reinterpret_cast<cuda::Address>(from.data()), a.stage, from.size(),
                         scene.stream_of(a));
  };
  scene.in_body = [&](const Action& a) {
    const std::pair here{a.stage, a.microbatch}, there{1 - a.stage, a.microbatch};
    if (a.kind == Kind::SendF) send(received.at(there), activations.at(here), a);
    if (a.kind == Kind::SendB) send(returned.at(there), gradients.at(here), a);
  };
  std::atomic<int> arrived{0};
  scene.on_device = [&](const Action& a) {
    const std::pair here{a.stage, a.microbatch};
    const auto fill = [&](std::vector<char>& bytes, int with) {
      std::memset(bytes.data(), with + a.microbatch, bytes.size());
    };
    const auto expect = [&](const std::vector<char>& bytes, int with) {
      arrived += bytes == std::vector<char>(4096, static_cast<char>(with + a.microbatch));
    };
    if (a.kind == Kind::F && a.stage == 0) fill(activations.at(here), 10);
    if (a.kind == Kind::F && a.stage == 1) expect(received.at(here), 10);
    if (a.kind == Kind::B && a.stage == 1) fill(gradients.at(here), 20);
    if (a.kind == Kind::B && a.stage == 0) expect(returned.at(here), 20);
  };
  scene.make();
  CHECK(scene.run().outcome == Outcome::Done);
  auto ran = scene.ran();
  scene.check_step(ran, "");
  CHECK_EQ(arrived.load(), 8);
}

TEST(a_body_that_throws_ends_the_step_and_the_next_one_runs) {
  for (const SharedStreamPlan& plan : {on_two_devices(), overlapping()}) {
    Scene scene(plan);
    scene.make();
    for (std::size_t bad = 0; bad < plan->ops().size(); ++bad) {
      const StreamOp& op = plan->ops()[bad];
      scene.label = "failing ";
      scene.in_body = [&](const Action& action) {
        if (action == op.action) throw std::runtime_error("stage broke");
      };
      const DeviceStepResult failed = scene.run(true);
      scene.enqueue_on_callers("after");
      CHECK(failed.outcome == Outcome::Failed);
      CHECK_EQ(failed.failed_task, op.task);
      CHECK_EQ(text_of(failed.error), "stage broke");
      CHECK(!scene.executor->dead());
      scene.label = "";
      scene.in_body = nullptr;
      CHECK(scene.run(true).outcome == Outcome::Done);
      auto ran = scene.ran();
      scene.check_step(ran, "", "after");
      for (std::size_t i = 0; i < plan->ops().size(); ++i) {
        const Ran& early = ran["failing " + to_text(plan->ops()[i].action)];
        CHECK_EQ(early.end > 0, i < bad);
        for (std::size_t d = 0; d < scene.callers.size(); ++d) {
          CHECK(early.end < ran["after " + std::to_string(d)].begin);
        }
      }
    }
  }
}

TEST(a_body_that_throws_spoils_the_capture_alone) {
  Scene scene(overlapping());
  scene.make();
  scene.in_body = [](const Action& action) {
    if (action.kind == Kind::B) throw std::runtime_error("stage broke");
  };
  const auto [failed, none] = scene.capture();
  CHECK(failed.outcome == Outcome::Failed);
  CHECK(none == nullptr);
  scene.in_body = nullptr;
  const auto [result, exec] = scene.capture();
  scene.launch(exec);
  auto ran = scene.ran();
  scene.check_step(ran, "");
}

TEST(closed_from_inside_a_step_it_ends_there_and_lets_go_of_everything) {
  for (const bool throws : {false, true}) {
    Scene scene(on_two_devices());
    scene.make();
    int bodies = 0;
    scene.in_body = [&](const Action&) {
      if (++bodies < 5) return;
      scene.executor->close();
      if (throws) throw std::runtime_error("closed");
    };
    CHECK(scene.run().outcome == (throws ? Outcome::Failed : Outcome::Closed));
    CHECK_EQ(bodies, 5);
    scene.enqueue_on_callers("after");
    cuda::empty_stream_pool();
    CHECK_EQ(controls().live("stream"), 2);  // the callers'
    auto ran = scene.ran();
    int done = 0;
    for (const auto& [name, when] : ran) {
      done += !name.starts_with("after") && when.end < ran["after 0"].begin;
    }
    CHECK_EQ(done, throws ? 4 : 5);
    CHECK_THROWS(scene.run(), std::logic_error, "it is closed");
    CHECK_THROWS(scene.executor->wait_for_room({}), std::logic_error, "it is closed");
    scene.laid.reset();
    CHECK_EQ(controls().live("event"), 0);
    CHECK_EQ(controls().live("context"), 2);
  }
}

TEST(closed_while_a_result_is_being_sent_it_still_sends_it) {
  Scene scene(on_two_devices());
  scene.make();
  const std::string from = "a result";
  std::string to(from.size(), ' ');
  scene.in_body = [&](const Action& action) {
    if (action.kind != Kind::SendF) return;
    scene.executor->close();
    scene.executor->copy(reinterpret_cast<cuda::Address>(to.data()), 1,
                         reinterpret_cast<cuda::Address>(from.data()), 0, from.size(), scene.stream_of(action));
  };
  CHECK(scene.run().outcome == Outcome::Closed);
  scene.ran();
  CHECK_EQ(to, from);
  CHECK_THROWS(scene.executor->copy(0, 1, 0, 0, 0, nullptr), std::logic_error, "it is closed");
}

TEST(closed_while_it_waits_for_room_it_stops_waiting) {
  for (const bool by_poll : {false, true}) {
    Scene scene(on_two_devices());
    scene.make();
    controls().pause(1);
    for (int step = 0; step < 2; ++step) scene.run();
    std::atomic<bool> waiting{false};
    std::thread other;
    if (!by_poll) {
      other = std::thread([&] {
        while (!waiting) std::this_thread::sleep_for(1ms);
        scene.executor->close();
      });
    }
    const auto poll = [&] {
      if (by_poll) scene.executor->close();
      waiting = true;
      return false;
    };
    CHECK(scene.executor->wait_for_room({30s, poll}) == Outcome::Closed);
    waiting = true;
    if (other.joinable()) other.join();
    cuda::empty_stream_pool();
    CHECK_EQ(controls().live("stream"), 2);
    controls().pause(0);
    CHECK_EQ(scene.ran().size(), scene.plan->ops().size());  // what is enqueued still runs
  }
}

TEST(it_runs_one_step_at_a_time) {
  Scene scene(overlapping());
  scene.make();
  scene.in_body = [&](const Action&) { scene.run(); };
  const DeviceStepResult result = scene.run();
  CHECK(result.outcome == Outcome::Failed);
  CHECK_EQ(text_of(result.error), "it is running a step already");
}
