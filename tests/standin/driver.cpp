// A test double of NVIDIA's CUDA driver, to test the CUDA runtime without a GPU. Device memory is host memory,
// and a stream is a thread. Every call is numbered and logged, and can be made to fail. As in CUDA,
// cuGetProcAddress_v2 hands out functions for the requested version. Not modelled: the synchronization between
// the legacy default stream and blocking streams; child graphs; the calls that CUDA forbids during a capture in
// global mode, like cuEventQuery.
#include <climits>
#include <cstring>
#include <initializer_list>
#include <string>
#include <string_view>

#include "machine.hpp"

using namespace standin;

namespace {

Machine& machine = Machine::get();

// What tests can script and inspect; guarded by the machine's mutex.
struct Script {
  long num_calls = 0;
  std::map<long, Result> failures;
  long sticky_from = LONG_MAX;
  Result sticky = kSuccess;
  int version = 13000;
  std::set<std::string, std::less<>> hidden;
  std::string log;
  std::string shown;  // what standin_log returned
};
Script& script = *new Script;  // never destroyed, like the machine

Result scripted_failure(long call) {
  if (call >= script.sticky_from) return script.sticky;
  const auto found = script.failures.find(call);
  return found == script.failures.end() ? kSuccess : found->second;
}

struct Field {
  const char* name;
  long value;
};
constexpr long kGivenOut = LONG_MIN;  // stands for the number of the handle that the call returns

// One call to the driver: counts it, runs the body unless a failure is scripted, and logs it.
template <class Body>
Result call(const char* name, std::initializer_list<Field> fields, Body body) {
  const std::lock_guard lock(machine.mutex);
  Result result = scripted_failure(script.num_calls++);
  machine.given_out = 0;
  if (result == kSuccess) {
    try {
      body();
    } catch (const Failed& failed) {
      result = failed.code;
    }
  }
  script.log += name;
  for (const Field& field : fields) {
    const long value = field.value == kGivenOut ? machine.given_out : field.value;
    script.log += std::string(" ") + field.name + "=" + std::to_string(value);
  }
  if (result != kSuccess) script.log += " result=" + std::to_string(result);
  script.log += '\n';
  return result;
}

void need(bool condition, Result otherwise) {
  if (!condition) throw Failed{otherwise};
}

template <class Handle, class Value>
void erase(std::map<Handle, Value>& all, Handle handle) {
  need(all.erase(handle) == 1, kInvalidHandle);
}

Result cuInit(unsigned flags) {
  return call("cuInit", {{"flags", flags}}, [&] { need(machine.num_devices > 0, kNoDevice); });
}

Result cuDriverGetVersion(int* version) {
  return call("cuDriverGetVersion", {}, [&] { *version = script.version; });
}

Result cuGetErrorName(Result code, const char** name) {
  const Error* const error = find_error(code);
  *name = error ? error->name : nullptr;
  return error ? kSuccess : kInvalidValue;
}

Result cuGetErrorString(Result code, const char** text) {
  const Error* const error = find_error(code);
  *text = error ? error->text : nullptr;
  return error ? kSuccess : kInvalidValue;
}

Result cuDeviceGetCount(int* count) {
  return call("cuDeviceGetCount", {}, [&] { *count = machine.num_devices; });
}

void need_device(Device device) { need(device >= 0 && device < machine.num_devices, kInvalidDevice); }

Result cuDeviceGet(Device* device, int ordinal) {
  return call("cuDeviceGet", {{"ordinal", ordinal}}, [&] {
    need_device(ordinal);
    *device = ordinal;
  });
}

Result cuDevicePrimaryCtxRetain(Context* context, Device device) {
  return call("cuDevicePrimaryCtxRetain", {{"device", device}}, [&] {
    need_device(device);
    ++machine.retained[device];
    *context = as_context(device);
  });
}

Result cuDevicePrimaryCtxRelease(Device device) {
  return call("cuDevicePrimaryCtxRelease", {{"device", device}}, [&] {
    need(machine.retained.contains(device), kInvalidContext);
    if (--machine.retained[device] > 0) return;
    machine.retained.erase(device);
    std::erase_if(machine.peers,
                  [&](const auto& pair) { return pair.first == device || pair.second == device; });
  });
}

// The device of a live context.
int device_of(Context context) {
  const int device = number(context);
  need(context == as_context(device) && machine.retained.contains(device), kInvalidContext);
  return device;
}

Result cuCtxPushCurrent(Context context) {
  return call("cuCtxPushCurrent", {{"context", number(context)}},
              [&] { context_stack.push_back(device_of(context)); });
}

Result cuCtxPopCurrent(Context* context) {
  return call("cuCtxPopCurrent", {{"context", kGivenOut}}, [&] {
    need(!context_stack.empty(), kInvalidContext);
    machine.given_out = context_stack.back();
    if (context != nullptr) *context = as_context(machine.given_out);
    context_stack.pop_back();
  });
}

Result cuCtxGetStreamPriorityRange(int* least, int* greatest) {
  return call("cuCtxGetStreamPriorityRange", {}, [&] {
    machine.current_context();
    if (least != nullptr) *least = kLeastPriority;
    if (greatest != nullptr) *greatest = kGreatestPriority;
  });
}

Result cuDeviceCanAccessPeer(int* can, Device device, Device peer) {
  return call("cuDeviceCanAccessPeer", {{"device", device}, {"peer", peer}}, [&] {
    need_device(device);
    need_device(peer);
    *can = device != peer;
  });
}

Result cuCtxEnablePeerAccess(Context peer, unsigned flags) {
  return call("cuCtxEnablePeerAccess", {{"peer", number(peer)}, {"flags", flags}}, [&] {
    const int device = machine.current_context();
    need(flags == 0, kInvalidValue);
    need(device_of(peer) != device, kInvalidContext);
    need(machine.peers.emplace(device, number(peer)).second, kPeerAccessAlreadyEnabled);
  });
}

Result cuStreamCreateWithPriority(StreamHandle* stream, unsigned flags, int priority) {
  const auto fields = {Field{"stream", kGivenOut}, {"flags", flags}, {"priority", priority}};
  return call("cuStreamCreateWithPriority", fields, [&] {
    const int device = machine.current_context();
    need(flags <= kStreamNonBlocking, kInvalidValue);
    *stream = as_handle<StreamHandle>(machine.new_number());
    machine.streams[*stream] = machine.new_stream(number(*stream), device);
  });
}

Result cuStreamDestroy(StreamHandle stream) {
  return call("cuStreamDestroy", {{"stream", number(stream)}}, [&] {
    need(stream != nullptr, kInvalidHandle);
    machine.stream(stream).destroyed = true;  // its thread finishes the pending work and ends
    machine.streams.erase(stream);
    machine.changed.notify_all();
  });
}

Result cuStreamQuery(StreamHandle stream) {
  return call("cuStreamQuery", {{"stream", number(stream)}}, [&] {
    const Stream& asked = machine.stream(stream);
    need(!asked.point.capture, kCaptureUnsupported);
    need(asked.queue.empty() && !asked.busy, kNotReady);
  });
}

Result cuStreamWaitEvent(StreamHandle stream, EventHandle event, unsigned flags) {
  return call("cuStreamWaitEvent", {{"stream", number(stream)}, {"event", number(event)}}, [&] {
    need(flags == 0, kInvalidValue);
    machine.wait(machine.stream(stream), *machine.event(event));
  });
}

Result cuStreamBeginCapture(StreamHandle stream, int mode) {
  return call("cuStreamBeginCapture", {{"stream", number(stream)}, {"mode", mode}},
              [&] { machine.begin_capture(machine.stream(stream)); });
}

Result cuStreamEndCapture(StreamHandle stream, GraphHandle* graph) {
  return call("cuStreamEndCapture", {{"stream", number(stream)}, {"graph", kGivenOut}}, [&] {
    *graph = nullptr;
    *graph = as_handle<GraphHandle>(machine.end_capture(machine.stream(stream)));
  });
}

Result cuStreamGetCaptureInfo(StreamHandle stream, int* status, std::uint64_t* id, GraphHandle* graph,
                              const NodeHandle** dependencies, std::size_t* num_dependencies) {
  return call("cuStreamGetCaptureInfo", {{"stream", number(stream)}}, [&] {
    Stream& asked = machine.stream(stream);
    const auto capture = asked.point.capture;
    *status = !capture ? 0 : capture->invalid ? 2 : kCaptureActive;
    if (*status != kCaptureActive) return;
    asked.shown.assign(asked.point.nodes.begin(), asked.point.nodes.end());
    if (id != nullptr) *id = static_cast<std::uint64_t>(capture->graph);
    if (graph != nullptr) *graph = as_handle<GraphHandle>(capture->graph);
    if (dependencies != nullptr) *dependencies = asked.shown.data();
    if (num_dependencies != nullptr) *num_dependencies = asked.shown.size();
  });
}

Result cuEventCreate(EventHandle* event, unsigned flags) {
  return call("cuEventCreate", {{"event", kGivenOut}, {"flags", flags}}, [&] {
    const int device = machine.current_context();
    *event = as_handle<EventHandle>(machine.new_number());
    machine.events[*event] = std::make_shared<Event>(Event{.flags = flags, .device = device});
  });
}

Result cuEventDestroy(EventHandle event) {
  return call("cuEventDestroy", {{"event", number(event)}}, [&] {
    machine.current_context();
    erase(machine.events, event);
  });
}

Result cuEventRecordWithFlags(EventHandle event, StreamHandle stream, unsigned flags) {
  const auto fields = {Field{"event", number(event)}, {"stream", number(stream)}, {"flags", flags}};
  return call("cuEventRecordWithFlags", fields, [&] {
    need(flags <= kEventRecordExternal, kInvalidValue);
    machine.record(machine.stream(stream), machine.event(event), flags == kEventRecordExternal);
  });
}

Result cuEventQuery(EventHandle event) {
  return call("cuEventQuery", {{"event", number(event)}}, [&] {
    const Event& asked = *machine.event(event);
    need(!asked.point.capture, kCapturedEvent);
    need(!asked.latest || asked.latest->done, kNotReady);
  });
}

Result cuEventElapsedTime(float* milliseconds, EventHandle begin, EventHandle end) {
  return call("cuEventElapsedTime", {{"begin", number(begin)}, {"end", number(end)}}, [&] {
    machine.current_context();
    const Event& first = *machine.event(begin);
    const Event& last = *machine.event(end);
    for (const Event* event : {&first, &last}) {
      need(!(event->flags & kEventDisableTiming) && event->latest, kInvalidHandle);
      need(!event->point.capture, kCapturedEvent);
    }
    need(first.device == last.device, kInvalidHandle);
    need(first.latest->done && last.latest->done, kNotReady);
    const std::chrono::duration<float, std::milli> time = last.latest->time - first.latest->time;
    *milliseconds = time.count();
  });
}

Result cuMemcpyPeerAsync(Address to, Context to_context, Address from, Context from_context, std::size_t nbytes,
                         StreamHandle stream) {
  const auto fields = {Field{"stream", number(stream)},
                       {"nbytes", static_cast<long>(nbytes)},
                       {"to", number(to_context)},
                       {"from", number(from_context)}};
  return call("cuMemcpyPeerAsync", fields, [&] {
    device_of(to_context);
    device_of(from_context);
    machine.submit(machine.stream(stream), kNodeTypeMemcpy, [=] {
      std::memcpy(reinterpret_cast<void*>(to), reinterpret_cast<const void*>(from), nbytes);
    });
  });
}

// The only work that runs code of a test. As a node it claims to be a kernel, so that it can have a priority.
Result cuLaunchHostFunc(StreamHandle stream, HostFunction function, void* data) {
  return call("cuLaunchHostFunc", {{"stream", number(stream)}},
              [&] { machine.submit(machine.stream(stream), kNodeTypeKernel, [=] { function(data); }); });
}

Result cuGraphGetNodes(GraphHandle graph, NodeHandle* nodes, std::size_t* count) {
  return call("cuGraphGetNodes", {{"graph", number(graph)}}, [&] {
    const Graph& asked = machine.graph(graph);
    if (nodes == nullptr) {
      *count = asked.size();
      return;
    }
    const std::size_t room = std::exchange(*count, 0);
    for (const auto& [node, _] : asked) {
      if (*count < room) nodes[(*count)++] = node;
    }
    std::fill(nodes + *count, nodes + room, nullptr);
  });
}

Result cuGraphNodeGetType(NodeHandle node, int* type) {
  return call("cuGraphNodeGetType", {{"node", number(node)}}, [&] { *type = machine.node(node).type; });
}

Result cuGraphKernelNodeSetAttribute(NodeHandle node, int attribute, const AttributeValue* value) {
  const bool is_priority = attribute == kAttributePriority;
  const auto fields = {
      Field{"node", number(node)}, {"attribute", attribute}, {"priority", is_priority ? value->priority : 0}};
  return call("cuGraphKernelNodeSetAttribute", fields, [&] {
    need(machine.node(node).type == kNodeTypeKernel, kInvalidHandle);
    need(is_priority, kInvalidValue);
  });
}

Result cuGraphInstantiateWithFlags(ExecHandle* exec, GraphHandle graph, std::uint64_t flags) {
  const auto fields = {
      Field{"graph_exec", kGivenOut}, {"graph", number(graph)}, {"flags", static_cast<long>(flags)}};
  return call("cuGraphInstantiateWithFlags", fields, [&] {
    auto order = launch_order(machine.graph(graph));
    *exec = as_handle<ExecHandle>(machine.new_number());
    machine.execs[*exec] = std::move(order);
  });
}

Result cuGraphLaunch(ExecHandle exec, StreamHandle stream) {
  return call("cuGraphLaunch", {{"graph_exec", number(exec)}, {"stream", number(stream)}},
              [&] { machine.launch(machine.stream(stream), machine.exec(exec)); });
}

Result cuGraphDestroy(GraphHandle graph) {
  return call("cuGraphDestroy", {{"graph", number(graph)}}, [&] { erase(machine.graphs, graph); });
}

Result cuGraphExecDestroy(ExecHandle exec) {
  return call("cuGraphExecDestroy", {{"graph_exec", number(exec)}}, [&] { erase(machine.execs, exec); });
}

struct Function {
  const char* name;
  int version;
  void* address;
};

// The functions that the CUDA runtime calls, and those that tests call in place of torch.
#define FUNCTION(name, version, parameters) \
  {#name, version, reinterpret_cast<void*>(static_cast<Result(*) parameters>(name))},
// clang-format off
const Function kFunctions[] = {
    PE_CUDA_FUNCTIONS(FUNCTION)
    FUNCTION(cuStreamQuery, 2000, (StreamHandle))
    FUNCTION(cuStreamBeginCapture, 10010, (StreamHandle, int))
    FUNCTION(cuStreamEndCapture, 10000, (StreamHandle, GraphHandle*))
    FUNCTION(cuLaunchHostFunc, 10000, (StreamHandle, HostFunction, void*))
    FUNCTION(cuGraphInstantiateWithFlags, 11040, (ExecHandle*, GraphHandle, std::uint64_t))
    FUNCTION(cuGraphLaunch, 10000, (ExecHandle, StreamHandle))
    FUNCTION(cuGraphDestroy, 10000, (GraphHandle))
    FUNCTION(cuGraphExecDestroy, 10000, (ExecHandle))
};
// clang-format on
#undef FUNCTION

}  // namespace

extern "C" {

// Neither counted nor logged.
Result cuGetProcAddress_v2(const char* symbol, void** address, int version, std::uint64_t, int*) {
  const std::lock_guard lock(machine.mutex);
  *address = nullptr;
  for (const Function& function : kFunctions) {
    if (std::string_view(symbol) == function.name && version == function.version &&
        !script.hidden.contains(function.name)) {
      *address = function.address;
    }
  }
  return *address ? kSuccess : kNotFound;
}

// Back to the state after loading, with this number of devices. What is alive stays alive, and handles stay
// unique.
void standin_reset(int num_devices) {
  const std::lock_guard lock(machine.mutex);
  script = {};
  machine.num_devices = num_devices;
  machine.paused = false;
  machine.changed.notify_all();
}

// Makes the call with this number, counted from 0 since the last reset, fail with this code and do nothing
// else.
void standin_fail_at(long call, int code) {
  const std::lock_guard lock(machine.mutex);
  script.failures[call] = code;
}

// The same for all calls from this one on, as on a device that has faulted.
void standin_fail_sticky(long call, int code) {
  const std::lock_guard lock(machine.mutex);
  script.sticky_from = call;
  script.sticky = code;
}

long standin_num_calls() {
  const std::lock_guard lock(machine.mutex);
  return script.num_calls;
}

// One line per call, "name key=value ...", with " result=CODE" if it failed. Valid until the next call of this
// function or of standin_reset.
const char* standin_log() {
  const std::lock_guard lock(machine.mutex);
  script.shown = script.log;
  return script.shown.c_str();
}

// Adds a line of the test to the log.
void standin_note(const char* text) {
  const std::lock_guard lock(machine.mutex);
  script.log += std::string(text) + "\n";
}

// How many of a kind are alive: stream, event, graph, graph_exec; or context, the retains that are not
// released. -1 for an unknown kind.
long standin_live(const char* kind) {
  const std::lock_guard lock(machine.mutex);
  long retains = 0;
  for (const auto& [_, count] : machine.retained) retains += count;
  const std::map<std::string_view, long> counts = {
      {"stream", machine.streams.size()},
      {"event", machine.events.size()},
      {"graph", machine.graphs.size()},
      {"graph_exec", machine.execs.size()},
      {"context", retains},
  };
  const auto found = counts.find(kind);
  return found == counts.end() ? -1 : found->second;
}

// Destroys all that is alive, and the calling thread's context stack, like the end of a process: cleans up
// after scripted failures to destroy.
void standin_discard() {
  const std::lock_guard lock(machine.mutex);
  for (const auto& [_, stream] : machine.streams) stream->destroyed = true;
  machine.streams.clear();
  machine.events.clear();
  machine.graphs.clear();
  machine.execs.clear();
  machine.retained.clear();
  machine.peers.clear();
  context_stack.clear();
  machine.changed.notify_all();
}

// A handle's number in the log.
int standin_number(void* handle) { return number(handle); }

// Sets what cuDriverGetVersion returns; initially 13000.
void standin_set_version(int version) {
  const std::lock_guard lock(machine.mutex);
  script.version = version;
}

// Makes cuGetProcAddress not find this function, as in a driver that is too old.
void standin_hide(const char* function) {
  const std::lock_guard lock(machine.mutex);
  script.hidden.insert(function);
}

// While paused, streams begin no new work.
void standin_pause(int paused) {
  const std::lock_guard lock(machine.mutex);
  machine.paused = paused != 0;
  machine.changed.notify_all();
}

// Waits until all streams are idle; never returns while work is pending and streams are paused.
void standin_drain() {
  std::unique_lock lock(machine.mutex);
  machine.changed.wait(lock, [] { return machine.num_pending == 0; });
}

}  // extern "C"
