#include "machine.hpp"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>

namespace softgpu {
namespace {

template <class Map, class Handle>
auto& find_in(Map& all, Handle handle) {
  const auto found = all.find(handle);
  if (found == all.end()) throw Failed{kInvalidHandle};
  return found->second;
}

long setting(const char* name, long otherwise) {
  const char* const text = std::getenv(name);
  return text && *text ? std::strtol(text, nullptr, 10) : otherwise;
}

// Half of the tasks are hardly late, a few are very late: one in ten by the measure, one in a hundred by eight
// times that.
std::chrono::microseconds delay(long measure, std::mt19937& random) {
  const double u = std::uniform_real_distribution(0.01, 1.0)(random);
  return std::chrono::microseconds(
      std::lround(static_cast<double>(measure) * std::min(8.0, 0.11 * (1 / u - 1))));
}

bool has_ended(const RecordPtr& record) { return record->done; }

struct AtExit {
  ~AtExit() { Machine::get().end(); }
} at_exit;

}  // namespace

Machine& Machine::get() {
  static Machine& machine = []() -> Machine& {
    Machine& made = *new Machine;
    made.num_devices = static_cast<int>(setting("SOFTGPU_DEVICES", 2));
    made.delay_us = setting("SOFTGPU_DELAY_US", 0);
    made.random.seed(static_cast<unsigned>(setting("SOFTGPU_SEED", 1)));
    return made;
  }();
  return machine;
}

void Machine::end() {
  Guard lock(mutex);
  ending = true;
  wake_all();
  changed.wait_for(lock, std::chrono::seconds(5), [&] { return num_threads == 0; });
}

ContextStack& context_stack() {
  static thread_local ContextStack stack{};
  return stack;
}

int current_device() { return context_stack().empty() ? 0 : context_stack().back(); }

CaptureMode& capture_mode() {
  static thread_local CaptureMode mode = CaptureMode::global;
  return mode;
}

void run(const Body& body) {
  try {
    body();
  } catch (const std::exception& error) {
    std::fprintf(stderr, "softgpu: a kernel failed: %s\n", error.what());
    const Guard lock(Machine::get().mutex);
    Machine::get().fault = kLaunchFailed;
  }
}

int Machine::current_context() const {
  ContextStack& stack = context_stack();
  if (stack.empty() || !(retained.contains(stack.back()) || in_use.contains(stack.back()))) {
    throw Failed{kInvalidContext};
  }
  return stack.back();
}

Stream& Machine::stream(StreamHandle handle, int device) {
  constexpr std::uintptr_t kPerThread = 2;  // is taken for the legacy one
  if (reinterpret_cast<std::uintptr_t>(handle) > kPerThread) return *find_in(streams, handle);
  StreamPtr& made = default_streams[device];
  if (!made) made = std::make_shared<Stream>(0, device);
  return *made;
}

const std::shared_ptr<Event>& Machine::event(EventHandle handle) const { return find_in(events, handle); }

Graph& Machine::graph(GraphHandle handle) { return find_in(graphs, handle); }

const std::shared_ptr<const Graph>& Machine::exec(ExecHandle handle) const { return find_in(execs, handle); }

const Node& Machine::node(NodeHandle handle) const {
  for (const auto& [_, graph] : graphs) {
    if (graph.contains(handle)) return graph.at(handle);
  }
  throw Failed{kInvalidHandle};
}

StreamHandle Machine::new_stream(int device, unsigned flags, int priority) {
  const auto handle = as_handle<StreamHandle>(new_number());
  streams[handle] = std::make_shared<Stream>(number(handle), device, flags, priority);
  return handle;
}

void Machine::destroy_stream(StreamHandle handle) {
  const StreamPtr stream = find_in(streams, handle);
  stream->destroyed = true;  // its thread finishes the pending work and ends
  stream->woken.notify_all();
  streams.erase(handle);
  std::erase_if(captures, [&](const auto& capture) { return capture->origin == stream->number; });
}

EventHandle Machine::new_event(int device, unsigned flags) {
  const auto handle = as_handle<EventHandle>(new_number());
  events[handle] = std::make_shared<Event>(Event{.flags = flags, .device = device});
  return handle;
}

void Machine::work(const StreamPtr& stream) {
  Guard lock(mutex);
  for (;;) {
    stream->woken.wait(lock, [&] {
      if (ending) return true;
      if (stream->queue.empty()) return stream->destroyed;
      return !paused && std::ranges::all_of(stream->queue.front().after, has_ended);
    });
    if (ending || stream->queue.empty()) break;
    Task task = std::move(stream->queue.front());
    stream->queue.pop_front();
    if (task.body) {
      const auto late = delay_us > 0 ? delay(delay_us, random) : std::chrono::microseconds(0);
      lock.unlock();
      if (late.count() > 0) std::this_thread::sleep_for(late);
      run(task.body);
      task.body = nullptr;  // destroys what it holds without the lock
      lock.lock();
    }
    *task.completes = {true, Clock::now()};
    --num_pending;
    wake_all();
  }
  --num_threads;
  std::erase(started, stream);
  changed.notify_all();
}

// Wakes the host's waits, and the streams that wait for another's work.
void Machine::wake_all() {
  changed.notify_all();
  for (const StreamPtr& stream : started) {
    if (ending || (!stream->queue.empty() && (paused || !stream->queue.front().after.empty()))) {
      stream->woken.notify_all();
    }
  }
}

void Machine::enqueue(Stream& stream, Task task) {
  if (fault != kSuccess) throw Failed{fault};
  if (!stream.started) {
    stream.started = true;
    ++num_threads;
    const bool is_default = stream.number == 0;
    started.push_back(is_default ? default_streams.at(stream.device)
                                 : streams.at(as_handle<StreamHandle>(stream.number)));
    std::thread([this, self = started.back()] { work(self); }).detach();
  }
  if (!task.completes) task.completes = std::make_shared<Record>();
  // The legacy stream and the blocking ones wait for each other.
  const bool blocking = !(stream.flags & kStreamNonBlocking);
  if (stream.number == 0) {
    for (const StreamPtr& other : started) {
      const bool waits = other->device == stream.device && !(other->flags & kStreamNonBlocking);
      if (waits && other.get() != &stream && other->tail) task.after.push_back(other->tail);
    }
  } else if (blocking) {
    const auto legacy = default_streams.find(stream.device);
    if (legacy != default_streams.end() && legacy->second->tail) task.after.push_back(legacy->second->tail);
  }
  stream.tail = task.completes;
  stream.queue.push_back(std::move(task));
  ++num_pending;
  if (stream.queue.size() == 1) stream.woken.notify_one();
}

void Machine::submit(Stream& stream, int type, Body body, bool waits) {
  if (stream.point.capture) {
    capture_node(stream, {type, std::move(body), nullptr, waits});
  } else {
    enqueue(stream, {{}, std::move(body), nullptr});
  }
}

void Machine::record(Stream& stream, const std::shared_ptr<Event>& event, bool external) {
  need(event->device == stream.device, kInvalidHandle);
  need(!external || stream.point.capture, kInvalidValue);
  if (external) {
    capture_node(stream, {kNodeTypeEventRecord, nullptr, event});
  } else if (stream.point.capture) {
    event->point = stream.point;
  } else {
    event->point = {};
    event->latest = std::make_shared<Record>();
    enqueue(stream, {{}, nullptr, event->latest});
  }
}

void Machine::wait(Stream& stream, const Event& event) {
  const CapturePoint& from = event.point;
  CapturePoint& point = stream.point;
  if (!from.capture) {
    if (!event.latest) return;
    if (!point.capture) return enqueue(stream, {{event.latest}, nullptr, nullptr});
    point.capture->invalid = true;
    throw Failed{kCaptureIsolation};
  }
  need(!from.capture->ended, kCapturedEvent);
  need(stream.number != 0, kCaptureImplicit);
  if (!point.capture) {
    point.capture = from.capture;
    point.seen[stream.number] = ++point.capture->progress[stream.number];
  } else {
    need(point.capture == from.capture, kCaptureMerge);
  }
  point.nodes.insert(from.nodes.begin(), from.nodes.end());
  for (const auto& [other, progress] : from.seen) {
    point.seen[other] = std::max(point.seen[other], progress);
  }
}

bool Machine::is_done(EventHandle handle) {
  const Event& asked = *event(handle);
  need(!asked.point.capture, kCapturedEvent);
  forbid_unsafe();
  return !asked.latest || asked.latest->done;
}

float Machine::elapsed(EventHandle begin, EventHandle end) const {
  const Event& first = *event(begin);
  const Event& last = *event(end);
  for (const Event* event : {&first, &last}) {
    need(!(event->flags & kEventDisableTiming) && event->latest, kInvalidHandle);
    need(!event->point.capture, kCapturedEvent);
  }
  need(first.device == last.device, kInvalidHandle);
  need(first.latest->done && last.latest->done, kNotReady);
  return std::chrono::duration<float, std::milli>(last.latest->time - first.latest->time).count();
}

void Machine::wait_for(Guard& lock, const RecordPtr& record) {
  if (record) changed.wait(lock, [&] { return record->done || ending; });
  if (fault != kSuccess) throw Failed{fault};
}

void Machine::synchronize(Guard& lock, Stream& stream) {
  if (stream.point.capture) {
    stream.point.capture->invalid = true;
    throw Failed{kCaptureUnsupported};
  }
  wait_for(lock, RecordPtr(stream.tail));
}

void Machine::synchronize_device(Guard& lock, int device) {
  std::vector<RecordPtr> tails;
  for (const StreamPtr& stream : started) {
    if (stream->device == device && stream->tail) tails.push_back(stream->tail);
  }
  for (const RecordPtr& tail : tails) wait_for(lock, tail);
}

}  // namespace softgpu
