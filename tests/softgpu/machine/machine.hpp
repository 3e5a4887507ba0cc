// The state of the software GPU, which the driver's API and the runtime's are both served from: streams as
// host threads, events, contexts, captures and graphs, and memory, which is the host's. One mutex guards
// everything; only the bodies of tasks run without it.
#pragma once

#include <array>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "errors.hpp"

namespace softgpu {

using pe::cuda::Context;
using pe::cuda::EventHandle;
using pe::cuda::GraphHandle;
using pe::cuda::kAttributePriority;
using pe::cuda::kCaptureActive;
using pe::cuda::kEventDisableTiming;
using pe::cuda::kEventRecordExternal;
using pe::cuda::kNodeTypeKernel;
using pe::cuda::kStreamNonBlocking;
using pe::cuda::NodeHandle;
using pe::cuda::StreamHandle;
using ExecHandle = struct OpaqueExec*;

using Body = std::function<void()>;
using Clock = std::chrono::steady_clock;
using Guard = std::unique_lock<std::mutex>;

inline constexpr int kNodeTypeMemcpy = 1;
inline constexpr int kNodeTypeMemset = 2;
inline constexpr int kNodeTypeHost = 3;
inline constexpr int kNodeTypeEventRecord = 7;
inline constexpr std::size_t kTotal = std::size_t{16} << 30;  // bytes of a device's memory
inline constexpr int kLeastPriority = 0;
inline constexpr int kGreatestPriority = -5;

// A handle is a number as a pointer to 16 bytes, as torch expects an aligned one. None is used twice, so a
// destroyed handle is always recognized. CUDA itself uses the pointers 1 and 2 for default streams. A context
// has the number of its device, with a large offset.
inline constexpr int kFirstContext = 1'000'000'000;

inline int number(const void* handle) {
  const auto value = static_cast<int>(reinterpret_cast<std::intptr_t>(handle) / 16);
  return value < kFirstContext ? value : value - kFirstContext;
}

template <class Handle>
Handle as_handle(int number) {
  return reinterpret_cast<Handle>(static_cast<std::intptr_t>(number) * 16);
}

inline Context as_context(int device) { return as_handle<Context>(kFirstContext + device); }

// Something that will have been done at some time.
struct Record {
  bool done = false;
  Clock::time_point time;
};
using RecordPtr = std::shared_ptr<Record>;

struct Task {
  std::vector<RecordPtr> after;
  Body body;
  RecordPtr completes;
};

enum class CaptureMode { global = 0, thread_local_ = 1, relaxed = 2 };

struct Capture {
  int graph;
  int origin;
  CaptureMode mode;
  std::thread::id thread;
  bool invalid = false;
  bool ended = false;
  std::map<int, long> progress = {};  // per stream: 1 for joining the capture, and 1 for each node
};

// A point in a capture: the next node depends on `nodes`, and `seen` is the progress of each stream it
// includes.
struct CapturePoint {
  std::shared_ptr<Capture> capture;
  std::set<NodeHandle> nodes;
  std::map<int, long> seen;
};

struct Event {
  unsigned flags;
  int device;
  RecordPtr latest = nullptr;
  CapturePoint point = {};
};

struct Stream {
  int number;
  int device;
  unsigned flags = 0;
  int priority = 0;
  bool is_engines = false;  // made through the driver's API
  bool destroyed = false;
  bool started = false;  // its thread
  std::condition_variable woken = {};
  std::deque<Task> queue = {};
  RecordPtr tail = nullptr;  // of the last task
  CapturePoint point = {};
  std::vector<NodeHandle> shown = {};  // point.nodes as they were given out
};
using StreamPtr = std::shared_ptr<Stream>;

struct Node {
  int type;
  Body body;
  std::shared_ptr<Event> event;  // of an event-record node
  bool waits = false;            // for other processes: other nodes must go on meanwhile
  std::set<NodeHandle> after = {};
};

using Graph = std::map<NodeHandle, Node>;

struct Allocation {
  std::size_t nbytes;
  bool on_device;  // or pinned memory of the host
  int device;
  bool owned;  // or the caller's, registered
};

class Machine {
 public:
  // Never destroyed: threads of streams may use it while statics are destroyed.
  static Machine& get();

  // Ends all threads; work that has not begun never runs.
  void end();

  // These throw Failed, and so do those below. The default stream of a device is made on first use.
  int current_context() const;
  void need_device(int device) const { need(device >= 0 && device < num_devices, kInvalidDevice); }
  Stream& stream(StreamHandle handle, int device);
  const std::shared_ptr<Event>& event(EventHandle handle) const;
  Graph& graph(GraphHandle handle);
  const std::shared_ptr<const Graph>& exec(ExecHandle handle) const;
  const Node& node(NodeHandle handle) const;

  int new_number() { return given_out = next_number++; }
  StreamHandle new_stream(int device, unsigned flags, int priority);
  void destroy_stream(StreamHandle handle);
  EventHandle new_event(int device, unsigned flags);

  void enqueue(Stream& stream, Task task);
  // Enqueues the body, or captures it as a node. `waits`: it waits for other processes.
  void submit(Stream& stream, int type, Body body, bool waits = false);
  void record(Stream& stream, const std::shared_ptr<Event>& event, bool external);
  void wait(Stream& stream, const Event& event);

  // Whether the latest record of an event is done.
  bool is_done(EventHandle handle);
  // Milliseconds between the latest records of two events.
  float elapsed(EventHandle begin, EventHandle end) const;
  // Puts as many nodes of a graph as there is room into `nodes`, and how many into `count`; without `nodes`
  // only how many there are.
  void nodes(GraphHandle of, NodeHandle* nodes, std::size_t* count);

  // --- captures.cpp
  void begin_capture(Stream& stream, CaptureMode mode);
  int end_capture(Stream& stream);
  ExecHandle instantiate(const Graph& graph);
  void launch(Stream& stream, const std::shared_ptr<const Graph>& graph);
  // Refuses what CUDA forbids while this thread, or another one in global mode, captures.
  void forbid_unsafe();

  // These let go of the mutex while they wait.
  void wait_for(Guard& lock, const RecordPtr& record);
  void synchronize(Guard& lock, Stream& stream);
  void synchronize_device(Guard& lock, int device);

  // --- memory.cpp
  void* allocate(Guard& lock, std::size_t nbytes, bool on_device, int device);
  void release(Guard& lock, void* pointer);
  // The allocation that holds this address, and where it begins; null if none does.
  const Allocation* find(const void* pointer, std::uintptr_t* begin = nullptr) const;
  std::size_t free_memory(int device) const;

  void wake_all();

  std::mutex mutex;
  std::condition_variable changed;
  bool ending = false;
  bool paused = false;
  int num_threads = 0;
  long num_pending = 0;     // tasks
  Result fault = kSuccess;  // of a kernel that failed: what every later call returns
  long delay_us = 0;        // a measure of how much later tasks begin
  std::mt19937 random;

  int num_devices = 2;
  int next_number = 1;
  int given_out = 0;
  std::map<int, int> retained;               // contexts: device -> number of retains
  std::set<int> in_use;                      // devices whose context the runtime holds
  std::set<std::pair<int, int>> peers;       // (device, peer) with access enabled
  std::map<int, StreamPtr> default_streams;  // by device
  std::map<StreamHandle, StreamPtr> streams;
  std::vector<StreamPtr> started;  // those with a thread
  std::map<EventHandle, std::shared_ptr<Event>> events;
  std::map<GraphHandle, Graph> graphs;
  std::map<ExecHandle, std::shared_ptr<const Graph>> execs;
  std::set<std::shared_ptr<Capture>> captures;  // that have not ended
  std::map<std::uintptr_t, Allocation> allocations;
  std::map<int, std::size_t> used;     // bytes by device
  std::map<int, std::size_t> allowed;  // bytes by device, where it is less than all

 private:
  void work(const StreamPtr& stream);
  void capture_node(Stream& stream, Node node);
};

// The devices whose contexts a thread has pushed; the last is current. It needs no destructor, as destructors
// of statics still call CUDA when what is thread_local is gone.
class ContextStack {
 public:
  bool empty() const { return size_ == 0; }
  int& back() { return devices_[size_ - 1]; }
  void push_back(int device) {
    need(size_ < devices_.size(), kInvalidContext);
    devices_[size_++] = device;
  }
  void pop_back() { --size_; }
  void clear() { size_ = 0; }

 private:
  std::array<int, 256> devices_;
  std::size_t size_;
};
ContextStack& context_stack();  // of this thread
int current_device();
CaptureMode& capture_mode();  // of this thread

// Runs the body of a task; an error becomes the device's fault.
void run(const Body& body);

}  // namespace softgpu
