#include "machine.hpp"

#include <algorithm>
#include <thread>

namespace standin {
namespace {

template <class Map, class Handle>
auto& find(Map& all, Handle handle) {
  const auto found = all.find(handle);
  if (found == all.end()) throw Failed{kInvalidHandle};
  return found->second;
}

struct AtExit {
  ~AtExit() { Machine::get().end(); }
} at_exit;

}  // namespace

Machine& Machine::get() {
  static Machine& machine = *new Machine;
  return machine;
}

void Machine::end() {
  std::unique_lock lock(mutex);
  ending = true;
  changed.notify_all();
  changed.wait(lock, [&] { return num_threads == 0; });
}

int Machine::current_context() const {
  if (context_stack.empty() || !retained.contains(context_stack.back())) {
    throw Failed{kInvalidContext};
  }
  return context_stack.back();
}

Stream& Machine::stream(StreamHandle handle) {
  const int device = current_context();
  if (handle != nullptr) return *find(streams, handle);
  auto& stream = default_streams[device];
  if (!stream) stream = new_stream(0, device);
  return *stream;
}

const std::shared_ptr<Event>& Machine::event(EventHandle handle) const { return find(events, handle); }

Graph& Machine::graph(GraphHandle handle) { return find(graphs, handle); }

const std::vector<Node>& Machine::exec(ExecHandle handle) const { return find(execs, handle); }

const Node& Machine::node(NodeHandle handle) const {
  for (const auto& [_, graph] : graphs) {
    if (graph.contains(handle)) return graph.at(handle);
  }
  throw Failed{kInvalidHandle};
}

std::shared_ptr<Stream> Machine::new_stream(int number, int device) {
  const auto stream = std::make_shared<Stream>(Stream{.number = number, .device = device});
  ++num_threads;
  std::thread([this, stream] { work(*stream); }).detach();
  return stream;
}

void Machine::work(Stream& stream) {
  std::unique_lock lock(mutex);
  for (;;) {
    changed.wait(lock, [&] {
      if (ending) return true;
      if (stream.queue.empty()) return stream.destroyed;
      return !paused && (!stream.queue.front().after || stream.queue.front().after->done);
    });
    if (ending || stream.queue.empty()) break;
    const Operation operation = std::move(stream.queue.front());
    stream.queue.pop_front();
    if (operation.body) {
      stream.busy = true;
      lock.unlock();
      operation.body();
      lock.lock();
      stream.busy = false;
    }
    if (operation.records) *operation.records = {true, Clock::now()};
    --num_pending;
    changed.notify_all();
  }
  --num_threads;
  changed.notify_all();
}

void Machine::enqueue(Stream& stream, Operation operation) {
  stream.queue.push_back(std::move(operation));
  ++num_pending;
  changed.notify_all();
}

void Machine::capture_node(Stream& stream, Node node) {
  CapturePoint& point = stream.point;
  if (point.capture->invalid) throw Failed{kCaptureInvalidated};
  const auto handle = as_handle<NodeHandle>(new_number());
  node.after = std::exchange(point.nodes, {handle});
  point.seen[stream.number] = ++point.capture->progress[stream.number];
  graph(as_handle<GraphHandle>(point.capture->graph)).emplace(handle, std::move(node));
}

void Machine::submit(Stream& stream, int type, std::function<void()> body) {
  if (stream.point.capture) {
    capture_node(stream, {type, std::move(body), nullptr});
  } else {
    enqueue(stream, {nullptr, std::move(body), nullptr});
  }
}

void Machine::record(Stream& stream, const std::shared_ptr<Event>& event, bool external) {
  if (event->device != stream.device) throw Failed{kInvalidHandle};
  if (external && !stream.point.capture) throw Failed{kInvalidValue};
  if (external) {
    capture_node(stream, {kNodeTypeEventRecord, nullptr, event});
  } else if (stream.point.capture) {
    event->point = stream.point;
  } else {
    event->point = {};
    event->latest = std::make_shared<Record>();
    enqueue(stream, {nullptr, nullptr, event->latest});
  }
}

void Machine::wait(Stream& stream, const Event& event) {
  const CapturePoint& from = event.point;
  CapturePoint& point = stream.point;
  if (!from.capture) {
    if (!event.latest) return;
    if (!point.capture) return enqueue(stream, {event.latest, nullptr, nullptr});
    point.capture->invalid = true;
    throw Failed{kCaptureIsolation};
  }
  if (from.capture->ended) throw Failed{kCapturedEvent};
  if (stream.number == 0) throw Failed{kCaptureImplicit};
  if (!point.capture) {
    point.capture = from.capture;
    point.seen[stream.number] = ++point.capture->progress[stream.number];
  } else if (point.capture != from.capture) {
    throw Failed{kCaptureMerge};
  }
  point.nodes.insert(from.nodes.begin(), from.nodes.end());
  for (const auto& [other, progress] : from.seen) {
    point.seen[other] = std::max(point.seen[other], progress);
  }
}

void Machine::begin_capture(Stream& stream) {
  if (stream.number == 0) throw Failed{kCaptureUnsupported};
  if (stream.point.capture) throw Failed{kIllegalState};
  const int graph = new_number();
  graphs[as_handle<GraphHandle>(graph)];
  stream.point.capture = std::make_shared<Capture>(Capture{graph, stream.number});
}

int Machine::end_capture(Stream& stream) {
  const auto capture = stream.point.capture;
  if (!capture) throw Failed{kIllegalState};
  if (capture->origin != stream.number) throw Failed{kCaptureUnmatched};
  const bool joined = stream.point.seen == capture->progress;
  capture->ended = true;
  for (const auto& [_, other] : streams) {
    if (other->point.capture == capture) other->point = {};
  }
  if (joined && !capture->invalid) return given_out = capture->graph;
  graphs.erase(as_handle<GraphHandle>(capture->graph));
  throw Failed{capture->invalid ? kCaptureInvalidated : kCaptureUnjoined};
}

void Machine::launch(Stream& stream, const std::vector<Node>& nodes) {
  if (stream.point.capture) throw Failed{kCaptureUnsupported};  // would be a child graph
  for (const Node& node : nodes) {
    if (node.event) {
      record(stream, node.event, false);
    } else {
      enqueue(stream, {nullptr, node.body, nullptr});
    }
  }
}

std::vector<Node> launch_order(const Graph& graph) {
  std::map<NodeHandle, std::size_t> missing;
  std::map<NodeHandle, std::vector<NodeHandle>> dependents;
  std::vector<NodeHandle> ready;
  for (const auto& [handle, node] : graph) {
    missing[handle] = node.after.size();
    for (const NodeHandle before : node.after) dependents[before].push_back(handle);
    if (node.after.empty()) ready.push_back(handle);
  }
  std::vector<Node> order;
  while (!ready.empty()) {
    const NodeHandle next = ready.back();
    ready.pop_back();
    order.push_back(graph.at(next));
    for (const NodeHandle dependent : dependents[next]) {
      if (--missing[dependent] == 0) ready.push_back(dependent);
    }
  }
  return order;
}

}  // namespace standin
