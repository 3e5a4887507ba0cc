// The part of NVIDIA's driver API that pipeline_ext calls, and what tests call in torch's place. Every call is
// numbered and logged, and can be made to fail. As in CUDA, cuGetProcAddress_v2 hands out functions for the
// requested version. Not modelled: child graphs.
#include <cstring>
#include <initializer_list>
#include <string_view>

#include "machine/machine.hpp"
#include "machine/script.hpp"

using namespace softgpu;
using pe::cuda::Address;
using pe::cuda::AttributeValue;
using pe::cuda::Device;

namespace {

using HostFunction = void (*)(void*);

Machine& machine = Machine::get();
Script& script = Script::get();

template <class Body>
Result call(const char* name, std::initializer_list<Field> fields, Body body) {
  return driver_call(name, fields, [&](Guard&) { body(); });
}

template <class Handle, class Value>
void erase(std::map<Handle, Value>& all, Handle handle) {
  need(all.erase(handle) == 1, kInvalidHandle);
}

// The default stream is that of the current context.
Stream& stream_of(StreamHandle stream) { return machine.stream(stream, machine.current_context()); }

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

Result cuDeviceGet(Device* device, int ordinal) {
  return call("cuDeviceGet", {{"ordinal", ordinal}}, [&] {
    machine.need_device(ordinal);
    *device = ordinal;
  });
}

Result cuDevicePrimaryCtxRetain(Context* context, Device device) {
  return call("cuDevicePrimaryCtxRetain", {{"device", device}}, [&] {
    machine.need_device(device);
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
  need(context == as_context(device) && (machine.retained.contains(device) || machine.in_use.contains(device)),
       kInvalidContext);
  return device;
}

Result cuCtxPushCurrent(Context context) {
  return call("cuCtxPushCurrent", {{"context", number(context)}},
              [&] { context_stack().push_back(device_of(context)); });
}

Result cuCtxPopCurrent(Context* context) {
  return call("cuCtxPopCurrent", {{"context", kGivenOut}}, [&] {
    need(!context_stack().empty(), kInvalidContext);
    machine.given_out = context_stack().back();
    if (context != nullptr) *context = as_context(machine.given_out);
    context_stack().pop_back();
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
    machine.need_device(device);
    machine.need_device(peer);
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
    *stream = machine.new_stream(device, flags, priority);
    machine.streams.at(*stream)->is_engines = true;
  });
}

Result cuStreamDestroy(StreamHandle stream) {
  return call("cuStreamDestroy", {{"stream", number(stream)}}, [&] {
    need(stream != nullptr, kInvalidHandle);
    machine.destroy_stream(stream);
  });
}

Result cuStreamQuery(StreamHandle stream) {
  return call("cuStreamQuery", {{"stream", number(stream)}}, [&] {
    const Stream& asked = stream_of(stream);
    need(!asked.point.capture, kCaptureUnsupported);
    machine.forbid_unsafe();
    need(!asked.tail || asked.tail->done, kNotReady);
  });
}

Result cuStreamWaitEvent(StreamHandle stream, EventHandle event, unsigned flags) {
  return call("cuStreamWaitEvent", {{"stream", number(stream)}, {"event", number(event)}}, [&] {
    need(flags == 0, kInvalidValue);
    Stream& waiting = stream_of(stream);
    if (!drops_wait(waiting)) machine.wait(waiting, *machine.event(event));
  });
}

Result cuStreamBeginCapture(StreamHandle stream, int mode) {
  return call("cuStreamBeginCapture", {{"stream", number(stream)}, {"mode", mode}},
              [&] { machine.begin_capture(stream_of(stream), static_cast<CaptureMode>(mode)); });
}

Result cuStreamEndCapture(StreamHandle stream, GraphHandle* graph) {
  return call("cuStreamEndCapture", {{"stream", number(stream)}, {"graph", kGivenOut}}, [&] {
    *graph = nullptr;
    *graph = as_handle<GraphHandle>(machine.end_capture(stream_of(stream)));
  });
}

Result cuStreamGetCaptureInfo(StreamHandle stream, int* status, std::uint64_t* id, GraphHandle* graph,
                              const NodeHandle** dependencies, std::size_t* num_dependencies) {
  return call("cuStreamGetCaptureInfo", {{"stream", number(stream)}}, [&] {
    Stream& asked = stream_of(stream);
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

Result cuThreadExchangeStreamCaptureMode(int* mode) {
  return call("cuThreadExchangeStreamCaptureMode", {{"mode", *mode}}, [&] {
    need(*mode >= 0 && *mode <= pe::cuda::kCaptureModeRelaxed, kInvalidValue);
    *mode = static_cast<int>(std::exchange(capture_mode(), static_cast<CaptureMode>(*mode)));
  });
}

Result cuEventCreate(EventHandle* event, unsigned flags) {
  return call("cuEventCreate", {{"event", kGivenOut}, {"flags", flags}}, [&] {
    const int device = machine.current_context();
    *event = machine.new_event(device, flags);
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
    machine.record(stream_of(stream), machine.event(event), flags == kEventRecordExternal);
  });
}

Result cuEventQuery(EventHandle event) {
  return call("cuEventQuery", {{"event", number(event)}}, [&] { need(machine.is_done(event), kNotReady); });
}

Result cuEventElapsedTime(float* milliseconds, EventHandle begin, EventHandle end) {
  return call("cuEventElapsedTime", {{"begin", number(begin)}, {"end", number(end)}}, [&] {
    machine.current_context();
    *milliseconds = machine.elapsed(begin, end);
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
    machine.submit(stream_of(stream), kNodeTypeMemcpy, [=] {
      std::memcpy(reinterpret_cast<void*>(to), reinterpret_cast<const void*>(from), nbytes);
    });
  });
}

// The only work that runs code of a test. As a node it claims to be a kernel, so that it can have a priority.
Result cuLaunchHostFunc(StreamHandle stream, HostFunction function, void* data) {
  return call("cuLaunchHostFunc", {{"stream", number(stream)}},
              [&] { machine.submit(stream_of(stream), kNodeTypeKernel, [=] { function(data); }); });
}

Result cuGraphGetNodes(GraphHandle graph, NodeHandle* nodes, std::size_t* count) {
  return call("cuGraphGetNodes", {{"graph", number(graph)}}, [&] { machine.nodes(graph, nodes, count); });
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
  return call("cuGraphInstantiateWithFlags", fields,
              [&] { *exec = machine.instantiate(machine.graph(graph)); });
}

Result cuGraphLaunch(ExecHandle exec, StreamHandle stream) {
  return call("cuGraphLaunch", {{"graph_exec", number(exec)}, {"stream", number(stream)}},
              [&] { machine.launch(stream_of(stream), machine.exec(exec)); });
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

}  // extern "C"
