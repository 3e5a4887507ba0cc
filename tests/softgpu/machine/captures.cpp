// Captures, and the graphs that come of them.
#include <algorithm>

#include "machine.hpp"

namespace softgpu {
namespace {

// One launch of a graph.
struct Launch {
  Launch(Machine& of, std::shared_ptr<const Graph> launched, unsigned seed)
      : machine(of), graph(std::move(launched)), choose(seed) {}

  void run() {
    for (const auto& [handle, node] : *graph) {
      missing[handle] = node.after.size();
      for (const NodeHandle before : node.after) dependents[before].push_back(handle);
      if (node.after.empty()) ready.push_back(handle);
    }
    std::vector<std::thread> waiting;
    Guard lock(mutex);
    while (num_ended < graph->size()) {
      ended.wait(lock, [&] { return !ready.empty() || num_ended == graph->size(); });
      if (ready.empty()) break;
      std::swap(ready[choose() % ready.size()], ready.back());
      const NodeHandle next = ready.back();
      ready.pop_back();
      if (graph->at(next).waits) {
        waiting.emplace_back([this, next] { run_node(next); });
        continue;
      }
      lock.unlock();
      run_node(next);
      lock.lock();
    }
    lock.unlock();
    for (std::thread& thread : waiting) thread.join();
  }

  void run_node(NodeHandle handle) {
    if (const Node& node = graph->at(handle); node.body) softgpu::run(node.body);
    if (const auto found = records.find(handle); found != records.end()) {
      const Guard lock(machine.mutex);
      *found->second = {true, Clock::now()};
      machine.wake_all();
    }
    const Guard lock(mutex);
    ++num_ended;
    for (const NodeHandle dependent : dependents[handle]) {
      if (--missing[dependent] == 0) ready.push_back(dependent);
    }
    ended.notify_all();
  }

  Machine& machine;
  const std::shared_ptr<const Graph> graph;
  std::mt19937 choose;
  std::map<NodeHandle, RecordPtr> records;
  std::mutex mutex;
  std::condition_variable ended;
  std::map<NodeHandle, std::size_t> missing;
  std::map<NodeHandle, std::vector<NodeHandle>> dependents;
  std::vector<NodeHandle> ready;
  std::size_t num_ended = 0;
};

}  // namespace

void Machine::capture_node(Stream& stream, Node node) {
  CapturePoint& point = stream.point;
  need(!point.capture->invalid, kCaptureInvalidated);
  const auto handle = as_handle<NodeHandle>(new_number());
  node.after = std::exchange(point.nodes, {handle});
  point.seen[stream.number] = ++point.capture->progress[stream.number];
  graph(as_handle<GraphHandle>(point.capture->graph)).emplace(handle, std::move(node));
}

void Machine::begin_capture(Stream& stream, CaptureMode mode) {
  need(stream.number != 0, kCaptureUnsupported);
  need(!stream.point.capture, kIllegalState);
  const int graph = new_number();
  graphs[as_handle<GraphHandle>(graph)];
  stream.point.capture =
      std::make_shared<Capture>(Capture{graph, stream.number, mode, std::this_thread::get_id()});
  captures.insert(stream.point.capture);
}

int Machine::end_capture(Stream& stream) {
  const auto capture = stream.point.capture;
  need(capture != nullptr, kIllegalState);
  need(capture->origin == stream.number, kCaptureUnmatched);
  need(capture->mode == CaptureMode::relaxed || capture->thread == std::this_thread::get_id(),
       kCaptureWrongThread);
  const bool joined = stream.point.seen == capture->progress;
  capture->ended = true;
  captures.erase(capture);
  for (const auto& [_, other] : streams) {
    if (other->point.capture == capture) other->point = {};
  }
  if (joined && !capture->invalid) return given_out = capture->graph;
  graphs.erase(as_handle<GraphHandle>(capture->graph));
  throw Failed{capture->invalid ? kCaptureInvalidated : kCaptureUnjoined};
}

void Machine::nodes(GraphHandle of, NodeHandle* nodes, std::size_t* count) {
  const Graph& asked = graph(of);
  if (nodes == nullptr) {
    *count = asked.size();
    return;
  }
  const std::size_t room = std::exchange(*count, 0);
  for (const auto& [node, _] : asked) {
    if (*count < room) nodes[(*count)++] = node;
  }
  std::fill(nodes + *count, nodes + room, nullptr);
}

ExecHandle Machine::instantiate(const Graph& graph) {
  auto copy = std::make_shared<const Graph>(graph);
  const auto handle = as_handle<ExecHandle>(new_number());
  execs[handle] = std::move(copy);
  return handle;
}

// The nodes run one after another, in an order that the edges allow, which is another one in each launch. Those
// that wait for other processes run beside them.
void Machine::launch(Stream& stream, const std::shared_ptr<const Graph>& graph) {
  need(!stream.point.capture, kCaptureUnsupported);  // would be a child graph
  auto launched = std::make_shared<Launch>(*this, graph, static_cast<unsigned>(random()));
  for (const auto& [handle, node] : *graph) {
    if (!node.event) continue;
    launched->records[handle] = node.event->latest = std::make_shared<Record>();
    node.event->point = {};
  }
  enqueue(stream, {{}, [launched] { launched->run(); }, nullptr});
}

void Machine::forbid_unsafe() {
  if (fault != kSuccess) throw Failed{fault};
  if (capture_mode() == CaptureMode::relaxed) return;
  const auto self = std::this_thread::get_id();
  for (const auto& capture : captures) {
    const bool own = capture->thread == self && capture->mode != CaptureMode::relaxed;
    const bool others = capture->thread != self && capture->mode == CaptureMode::global &&
                        capture_mode() == CaptureMode::global;
    if (own || others) {
      capture->invalid = true;
      throw Failed{kCaptureUnsupported};
    }
  }
}

}  // namespace softgpu
