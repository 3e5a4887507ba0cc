// Makes every driver call of two steps fail in turn: expects one clear error, no leaks, and no hang.
#include <functional>
#include <set>
#include <stdexcept>

#include "runtime/stream_executor.hpp"
#include "scene.hpp"

using namespace pe;
using standin::controls;

namespace {

constexpr int kOutOfMemory = 2, kLaunchFailure = 719;
const std::string kReleasing = "releasing";

// What a test does with a scene. Throws the driver's error; called again, it retries what failed.
using Act = std::function<void(Scene&)>;

void two_steps(Scene& scene) {
  scene.make();
  DeviceStepResult result;
  for (int step = 0; step < 2; ++step) {
    CHECK(scene.executor->wait_for_room({}) == Outcome::Done);
    result = scene.run(true);
    if (result.error) std::rethrow_exception(result.error);
  }
  controls().drain();
  CHECK(result.times->done());
  result.times->read();
}

void two_launches(Scene& scene) {
  scene.make();
  const auto [result, exec] = scene.capture(true);
  if (result.error) std::rethrow_exception(result.error);
  for (int launch = 0; launch < 2; ++launch) {
    CHECK(scene.executor->wait_for_room({}) == Outcome::Done);
    scene.launch(exec);
    scene.executor->mark(scene.callers);
  }
  controls().drain();
  result.times->read();
}

// The driver's error while `act` runs; empty if there is none.
std::string error_of(const Act& act, Scene& scene) {
  try {
    act(scene);
  } catch (const cuda::CudaError& error) {
    return error.what();
  }
  return "";
}

// The driver functions that a scene without failures calls; kReleasing marks where the release begins.
std::vector<std::string> calls_of(const Act& act, const SharedStreamPlan& plan) {
  Scene scene(plan);
  const long first = controls().num_calls();
  act(scene);
  controls().note(kReleasing.c_str());
  scene.release();
  std::vector<std::string> names;
  for (const std::string& line : controls().lines()) names.push_back(line.substr(0, line.find(' ')));
  names.erase(names.begin(), names.begin() + first);
  return names;
}

// Runs `check` with a fresh scene for each call. `loud`: whether an error of this call can be reported to a
// caller.
void at_each_call(const Act& act, const SharedStreamPlan& plan,
                  const std::function<void(Scene&, long call, const std::string& name, bool loud)>& check) {
  // torch makes these calls, and cleans up after their failure.
  const std::set<std::string> of_torch = {"cuStreamEndCapture", "cuGraphDestroy", "cuGraphExecDestroy"};
  const std::set<std::string> quiet = {"cuCtxPopCurrent", "cuThreadExchangeStreamCaptureMode"};
  long number = 0;
  bool releasing = false;
  for (const std::string& name : calls_of(act, plan)) {
    if (name == kReleasing) {
      releasing = true;
      continue;
    }
    if (!of_torch.contains(name)) {
      Scene scene(plan);
      check(scene, controls().num_calls() + number, name, !releasing && !quiet.contains(name));
    }
    ++number;
  }
}

// One call fails; a retry succeeds.
void fail_once_at_each_call(const Act& act, const SharedStreamPlan& plan) {
  at_each_call(act, plan, [&](Scene& scene, long call, const std::string& name, bool loud) {
    controls().fail_at(call, kOutOfMemory);
    const std::string error = error_of(act, scene);
    const std::string expected = name + " failed: CUDA_ERROR_OUT_OF_MEMORY (2), out of memory";
    CHECK_EQ(error, loud ? expected : "");
    if (error.empty()) return;
    if (scene.executor && scene.executor->dead()) {
      CHECK_THROWS(scene.run(), std::logic_error, "it is dead: a device has failed");
    } else {
      scene.enqueue_on_callers("after");
      auto ran = scene.ran();
      for (const auto& [function, when] : ran) {
        CHECK(function.starts_with("after") || when.end < ran["after 0"].begin);
      }
      CHECK_EQ(error_of(act, scene), "");
      ran = scene.ran();
      scene.check_step(ran, "");
    }
  });
}

// A device faults: from one call on, every call fails.
void fail_from_each_call_on(const Act& act, const SharedStreamPlan& plan) {
  at_each_call(act, plan, [&](Scene& scene, long call, const std::string&, bool loud) {
    scene.leaves_things_behind = true;
    controls().fail_sticky(call, kLaunchFailure);
    const std::string error = error_of(act, scene);
    if (loud) CHECK(error.find(" failed: CUDA_ERROR_LAUNCH_FAILED (719), ") != std::string::npos);
    if (error.empty() || !scene.executor) return;
    try {
      CHECK(!error_of(act, scene).empty());
    } catch (const std::logic_error& refused) {
      CHECK(scene.executor->dead());
    }
  });
}

SharedStreamPlan on_devices(const std::vector<int>& devices) {
  return on_streams(make_plan(find_schedule("gpipe"), 2, 2, 1, {.overlap = true}), devices);
}

}  // namespace

TEST(an_error_of_any_call_is_told_and_the_next_step_runs_or_the_executor_is_dead) {
  fail_once_at_each_call(two_steps, on_devices({0, 1}));
}

TEST(an_error_of_any_call_while_capturing_is_told_and_the_next_capture_succeeds) {
  fail_once_at_each_call(two_launches, on_devices({0, 0}));
}

TEST(a_device_that_fails_at_any_call_is_told_and_nothing_hangs) {
  fail_from_each_call_on(two_steps, on_devices({0, 1}));
}

TEST(a_device_that_fails_at_any_call_while_capturing_is_told_and_nothing_hangs) {
  fail_from_each_call_on(two_launches, on_devices({0, 0}));
}
