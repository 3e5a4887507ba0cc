// The state of the stand-in driver: streams as host threads, events, contexts, captures and graphs. One mutex
// guards everything; only the bodies of operations run without it.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <utility>
#include <vector>

#include "errors.hpp"

namespace standin {

using Clock = std::chrono::steady_clock;
using ExecHandle = struct OpaqueExec*;
using HostFunction = void (*)(void*);

inline constexpr int kNodeTypeMemcpy = 1;
inline constexpr int kNodeTypeEventRecord = 7;
inline constexpr int kLeastPriority = 0;
inline constexpr int kGreatestPriority = -5;

// A handle is a number cast to a pointer and is never reused, so a destroyed handle is always recognized. CUDA
// itself uses 1 and 2 for default streams. A context has the number of its device, with a large offset.
inline constexpr int kFirstHandle = 3;
inline constexpr int kFirstContext = 1'000'000'000;

inline int number(const void* handle) {
  const auto value = static_cast<int>(reinterpret_cast<std::intptr_t>(handle));
  return value < kFirstContext ? value : value - kFirstContext;
}

template <class Handle>
Handle as_handle(int number) {
  return reinterpret_cast<Handle>(static_cast<std::intptr_t>(number));
}

inline Context as_context(int device) { return as_handle<Context>(kFirstContext + device); }

// One recording of an event.
struct Record {
  bool done = false;
  Clock::time_point time;
};

struct Operation {
  std::shared_ptr<Record> after;  // what it waits for
  std::function<void()> body;
  std::shared_ptr<Record> records;  // what it completes
};

struct Capture {
  int graph;
  int origin;
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
  std::shared_ptr<Record> latest = nullptr;
  CapturePoint point = {};
};

struct Stream {
  int number;
  int device;
  std::deque<Operation> queue = {};
  bool busy = false;
  bool destroyed = false;
  CapturePoint point = {};
  std::vector<NodeHandle> shown = {};  // point.nodes as cuStreamGetCaptureInfo returned them
};

struct Node {
  int type;
  std::function<void()> body;
  std::shared_ptr<Event> event;  // of an event-record node
  std::set<NodeHandle> after = {};
};

using Graph = std::map<NodeHandle, Node>;

class Machine {
 public:
  // Never destroyed: threads of streams may use it while statics are destroyed.
  static Machine& get();

  // Ends all threads; work that has not begun never runs.
  void end();

  // These throw Failed. The default stream of the current context is created on first use.
  int current_context() const;
  Stream& stream(StreamHandle handle);
  const std::shared_ptr<Event>& event(EventHandle handle) const;
  Graph& graph(GraphHandle handle);
  const std::vector<Node>& exec(ExecHandle handle) const;
  const Node& node(NodeHandle handle) const;

  int new_number() { return given_out = next_number++; }
  std::shared_ptr<Stream> new_stream(int number, int device);

  void enqueue(Stream& stream, Operation operation);
  // Enqueues the body, or captures it as a node.
  void submit(Stream& stream, int type, std::function<void()> body);
  void record(Stream& stream, const std::shared_ptr<Event>& event, bool external);
  void wait(Stream& stream, const Event& event);
  void begin_capture(Stream& stream);
  int end_capture(Stream& stream);
  void launch(Stream& stream, const std::vector<Node>& nodes);

  std::mutex mutex;
  std::condition_variable changed;
  bool ending = false;
  bool paused = false;
  int num_threads = 0;
  long num_pending = 0;  // operations

  int num_devices = 2;
  int next_number = kFirstHandle;
  int given_out = 0;
  std::map<int, int> retained;                             // contexts: device -> number of retains
  std::set<std::pair<int, int>> peers;                     // (device, peer) with access enabled
  std::map<int, std::shared_ptr<Stream>> default_streams;  // by device
  std::map<StreamHandle, std::shared_ptr<Stream>> streams;
  std::map<EventHandle, std::shared_ptr<Event>> events;
  std::map<GraphHandle, Graph> graphs;
  std::map<ExecHandle, std::vector<Node>> execs;

 private:
  void work(Stream& stream);
  void capture_node(Stream& stream, Node node);
};

// The contexts this thread has pushed, by device.
inline thread_local std::vector<int> context_stack;

// The nodes in an order in which a graph may run. Where dependencies leave a choice, later nodes come first, to
// reveal missing dependencies.
std::vector<Node> launch_order(const Graph& graph);

}  // namespace standin
