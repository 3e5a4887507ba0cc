#include "cuda/driver.hpp"

#include <memory>
#include <mutex>
#include <thread>
#include <utility>

#include "check.hpp"
#include "standin.hpp"

using namespace pe::cuda;
using standin::controls;

namespace {

const char* const kKinds[] = {"stream", "event", "graph", "graph_exec", "context"};

// Streams, events and work on device 0, whose context is current. The destructor checks that nothing is left
// alive.
struct Bench {
  Bench() {
    controls().reset(2);
    Context context = nullptr;
    PE_CUDA(driver, cuDevicePrimaryCtxRetain, &context, 0);
    PE_CUDA(driver, cuCtxPushCurrent, context);
  }
  Bench(const Bench&) = delete;
  ~Bench() {
    controls().drain();
    for (const StreamHandle stream : streams) driver.cuStreamDestroy(stream);
    for (const EventHandle event : events) driver.cuEventDestroy(event);
    driver.cuCtxPopCurrent(nullptr);
    driver.cuDevicePrimaryCtxRelease(0);
    for (const char* kind : kKinds) CHECK_EQ(controls().live(kind), 0);
  }

  StreamHandle stream() {
    PE_CUDA(driver, cuStreamCreateWithPriority, &streams.emplace_back(), kStreamNonBlocking, 0);
    return streams.back();
  }
  EventHandle event(unsigned flags = kEventDisableTiming) {
    PE_CUDA(driver, cuEventCreate, &events.emplace_back(), flags);
    return events.back();
  }
  void record(EventHandle event, StreamHandle stream, unsigned flags = kEventRecordDefault) {
    PE_CUDA(driver, cuEventRecordWithFlags, event, stream, flags);
  }
  void wait(StreamHandle stream, EventHandle event) { PE_CUDA(driver, cuStreamWaitEvent, stream, event, 0); }
  // Enqueues work that appends this letter to `done`.
  void work(StreamHandle stream, char letter) {
    Work& next = *works.emplace_back(std::make_unique<Work>(Work{this, letter}));
    const auto append = [](void* data) {
      const auto& [bench, appended] = *static_cast<Work*>(data);
      const std::lock_guard lock(bench->mutex);
      bench->done += appended;
    };
    driver.check(controls().launch_host(stream, append, &next), "cuLaunchHostFunc");
  }
  std::string done_after_drain() {
    controls().drain();
    const std::lock_guard lock(mutex);
    return std::exchange(done, "");
  }
  std::size_t num_dependencies(StreamHandle stream) {
    int status = 0;
    std::size_t count = 0;
    PE_CUDA(driver, cuStreamGetCaptureInfo, stream, &status, nullptr, nullptr, nullptr, &count);
    CHECK_EQ(status, kCaptureActive);
    return count;
  }

  struct Work {
    Bench* bench;
    char letter;
  };
  const Driver& driver = Driver::get();
  std::vector<StreamHandle> streams;
  std::vector<EventHandle> events;
  std::vector<std::unique_ptr<Work>> works;
  std::mutex mutex;
  std::string done;
};

}  // namespace

TEST(a_wait_holds_a_stream_until_what_was_recorded_is_done) {
  Bench bench;
  const StreamHandle a = bench.stream(), b = bench.stream(), c = bench.stream();
  const EventHandle after_a = bench.event(), after_b = bench.event();
  for (int round = 0; round < 200; ++round) {
    bench.work(a, 'a');
    bench.record(after_a, a);
    bench.wait(b, after_a);
    bench.work(b, 'b');
    bench.record(after_b, b);
    bench.wait(c, after_b);
    bench.work(c, 'c');
    CHECK_EQ(bench.done_after_drain(), "abc");
  }
}

TEST(a_wait_is_for_the_record_that_was_the_latest_when_it_was_called) {
  Bench bench;
  const StreamHandle a = bench.stream(), b = bench.stream(), c = bench.stream();
  const EventHandle first = bench.event(), last = bench.event();
  bench.wait(b, first);  // never recorded: nothing to wait for
  bench.work(b, 'b');
  CHECK_EQ(bench.done_after_drain(), "b");
  bench.record(first, a);
  bench.wait(b, first);
  bench.wait(c, last);  // recorded below, which is too late
  bench.work(b, 'b');
  bench.record(last, b);
  bench.wait(a, last);
  bench.record(first, a);  // a second time: would be a cycle if b waited for it
  CHECK_EQ(bench.done_after_drain(), "b");
  CHECK_EQ(bench.driver.cuEventQuery(first), kSuccess);
}

TEST(while_the_device_is_paused_nothing_ends) {
  Bench bench;
  const StreamHandle a = bench.stream();
  const EventHandle event = bench.event();
  CHECK_EQ(bench.driver.cuEventQuery(event), kSuccess);
  controls().pause(1);
  bench.work(a, 'a');
  bench.record(event, a);
  CHECK_EQ(controls().query(a), kNotReady);
  CHECK_EQ(bench.driver.cuEventQuery(event), kNotReady);
  CHECK_EQ(bench.done, "");
  controls().pause(0);
  CHECK_EQ(bench.done_after_drain(), "a");
  CHECK_EQ(bench.driver.cuEventQuery(event), kSuccess);
  CHECK_EQ(controls().query(a), kSuccess);
}

TEST(a_destroyed_stream_still_does_its_work) {
  Bench bench;
  const StreamHandle a = bench.stream();
  controls().pause(1);
  bench.work(a, 'a');
  PE_CUDA(bench.driver, cuStreamDestroy, a);
  bench.streams.clear();
  CHECK_EQ(controls().query(a), 400);
  controls().pause(0);
  CHECK_EQ(bench.done_after_drain(), "a");
}

TEST(time_passes_between_timing_events_only) {
  Bench bench;
  const StreamHandle a = bench.stream();
  const EventHandle begin = bench.event(kEventDefault), end = bench.event(kEventDefault);
  const EventHandle untimed = bench.event();
  float milliseconds = -1;
  for (const EventHandle event : {begin, untimed, end}) bench.record(event, a);
  controls().drain();
  PE_CUDA(bench.driver, cuEventElapsedTime, &milliseconds, begin, end);
  CHECK(milliseconds >= 0);
  CHECK_EQ(bench.driver.cuEventElapsedTime(&milliseconds, begin, untimed), 400);
  controls().pause(1);
  bench.record(end, a);
  CHECK_EQ(bench.driver.cuEventElapsedTime(&milliseconds, begin, end), kNotReady);
  controls().pause(0);
}

TEST(an_error_names_the_function_and_the_code) {
  Bench bench;
  const EventHandle event = bench.event();
  PE_CUDA(bench.driver, cuEventDestroy, event);
  bench.events.clear();
  CHECK_THROWS(PE_CUDA(bench.driver, cuEventQuery, event), CudaError,
               "cuEventQuery failed: CUDA_ERROR_INVALID_HANDLE (400), invalid resource handle");
  controls().fail_at(controls().num_calls(), 12345);
  CHECK_THROWS(bench.event(), CudaError, "cuEventCreate failed: an unknown error (12345), it has no text");
  bench.events.clear();
}

TEST(an_event_belongs_to_the_context_it_was_made_in) {
  Bench bench;
  const EventHandle of_0 = bench.event();
  Context context = nullptr;
  PE_CUDA(bench.driver, cuDevicePrimaryCtxRetain, &context, 1);
  PE_CUDA(bench.driver, cuCtxPushCurrent, context);
  const StreamHandle of_1 = bench.stream();
  CHECK_EQ(bench.driver.cuEventRecordWithFlags(of_0, of_1, 0), 400);
  bench.wait(of_1, of_0);  // is allowed across devices
  PE_CUDA(bench.driver, cuCtxPopCurrent, nullptr);
  PE_CUDA(bench.driver, cuDevicePrimaryCtxRelease, 1);
  int least = 0, greatest = 0;
  Result elsewhere = kSuccess;
  std::thread([&] { elsewhere = bench.driver.cuCtxGetStreamPriorityRange(&least, &greatest); }).join();
  CHECK_EQ(elsewhere, 201);  // no context is current in another thread
}

TEST(bytes_are_copied_between_devices_in_stream_order) {
  Bench bench;
  Context contexts[2] = {};
  for (const int device : {0, 1}) {
    PE_CUDA(bench.driver, cuDevicePrimaryCtxRetain, &contexts[device], device);
  }
  PE_CUDA(bench.driver, cuCtxEnablePeerAccess, contexts[1], 0);
  CHECK_EQ(bench.driver.cuCtxEnablePeerAccess(contexts[1], 0), kPeerAccessAlreadyEnabled);
  const StreamHandle stream = bench.stream();
  const std::string from = "what is copied";
  std::string between(from.size(), ' '), to(from.size(), ' ');
  const auto copy = [&](std::string& target, const std::string& source, int device) {
    PE_CUDA(bench.driver, cuMemcpyPeerAsync, reinterpret_cast<Address>(target.data()), contexts[device],
            reinterpret_cast<Address>(source.data()), contexts[1 - device], source.size(), stream);
  };
  copy(between, from, 1);
  copy(to, between, 0);
  controls().drain();
  CHECK_EQ(to, from);
  CHECK_EQ(controls().lines().back(),
           "cuMemcpyPeerAsync stream=" + std::to_string(controls().number(stream)) + " nbytes=14 to=0 from=1");
  for (const int device : {0, 1}) PE_CUDA(bench.driver, cuDevicePrimaryCtxRelease, device);
}

TEST(a_captured_graph_runs_as_its_streams_would_have) {
  Bench bench;
  const StreamHandle a = bench.stream(), b = bench.stream();
  const EventHandle fork = bench.event(), join = bench.event(), timed = bench.event(kEventDefault);
  CHECK_EQ(controls().begin_capture(a, 0), kSuccess);
  bench.work(a, 'f');
  bench.record(fork, a);
  bench.work(a, 'a');
  bench.wait(b, fork);
  bench.work(b, 'b');
  bench.work(b, 'c');
  bench.record(timed, b, kEventRecordExternal);
  bench.record(join, b);
  CHECK_EQ(bench.num_dependencies(a), 1u);
  bench.wait(a, join);
  CHECK_EQ(bench.num_dependencies(a), 2u);
  bench.work(a, 'j');
  CHECK_EQ(bench.num_dependencies(a), 1u);
  CHECK_EQ(bench.driver.cuEventQuery(join), 907);
  GraphHandle graph = nullptr;
  CHECK_EQ(controls().end_capture(a, &graph), kSuccess);
  CHECK_EQ(bench.done_after_drain(), "");

  std::size_t count = 0;
  PE_CUDA(bench.driver, cuGraphGetNodes, graph, nullptr, &count);
  std::vector<NodeHandle> nodes(count);
  PE_CUDA(bench.driver, cuGraphGetNodes, graph, nodes.data(), &count);
  CHECK_EQ(count, 6u);
  const AttributeValue priority = {.priority = -5};
  std::string types;
  for (const NodeHandle node : nodes) {
    int type = -1;
    PE_CUDA(bench.driver, cuGraphNodeGetType, node, &type);
    types += std::to_string(type);
    const Result result = bench.driver.cuGraphKernelNodeSetAttribute(node, kAttributePriority, &priority);
    CHECK_EQ(result, type == kNodeTypeKernel ? kSuccess : 400);
  }
  CHECK_EQ(types, "000070");

  standin::ExecHandle exec = nullptr;
  CHECK_EQ(controls().instantiate(&exec, graph, 0), kSuccess);
  CHECK_EQ(controls().destroy_graph(graph), kSuccess);
  for (int launch = 0; launch < 3; ++launch) {
    CHECK_EQ(controls().launch(exec, b), kSuccess);
    const std::string done = bench.done_after_drain();
    CHECK(done == "fabcj" || done == "fbacj" || done == "fbcaj");
    CHECK_EQ(bench.driver.cuEventQuery(timed), kSuccess);
  }
  CHECK_EQ(controls().destroy_exec(exec), kSuccess);
}

TEST(a_capture_that_is_not_joined_gives_no_graph) {
  Bench bench;
  const StreamHandle a = bench.stream(), b = bench.stream();
  const EventHandle fork = bench.event(), join = bench.event();
  CHECK_EQ(controls().begin_capture(a, 0), kSuccess);
  bench.work(a, 'a');
  bench.record(fork, a);
  bench.wait(b, fork);
  bench.work(b, 'b');
  bench.record(join, b);
  bench.work(b, 'c');  // after the record, so the join does not cover it
  bench.wait(a, join);
  GraphHandle graph = nullptr;
  CHECK_EQ(controls().end_capture(a, &graph), 904);
  CHECK(graph == nullptr);
  bench.work(b, 'd');  // neither stream is captured any more
  CHECK_EQ(bench.done_after_drain(), "d");
}

TEST(a_capture_that_waits_for_uncaptured_work_is_void) {
  Bench bench;
  const StreamHandle a = bench.stream(), b = bench.stream();
  const EventHandle event = bench.event();
  bench.record(event, b);
  CHECK_EQ(controls().begin_capture(a, 0), kSuccess);
  CHECK_THROWS(bench.wait(a, event), CudaError, "CUDA_ERROR_STREAM_CAPTURE_ISOLATION (905)");
  CHECK_THROWS(bench.work(a, 'a'), CudaError, "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED (901)");
  GraphHandle graph = nullptr;
  CHECK_EQ(controls().end_capture(a, &graph), 901);
}
