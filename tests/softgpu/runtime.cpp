// The CUDA runtime's API (libcudart.so.13) on the software GPU: what torch calls of it.
#include <cuda_runtime_api.h>
#include <cxxabi.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <unordered_map>

#include "machine/kernels.hpp"
#include "machine/machine.hpp"
#include "machine/script.hpp"

using namespace softgpu;

namespace {

Machine& machine = Machine::get();

template <class F>
cudaError_t call(F body, const char* name = __builtin_FUNCTION()) {
  return static_cast<cudaError_t>(runtime_call(name, body));
}

// The driver's handles are the runtime's.
StreamHandle ours(cudaStream_t stream) { return reinterpret_cast<StreamHandle>(stream); }
EventHandle ours(cudaEvent_t event) { return reinterpret_cast<EventHandle>(event); }
GraphHandle ours(cudaGraph_t graph) { return reinterpret_cast<GraphHandle>(graph); }
ExecHandle ours(cudaGraphExec_t exec) { return reinterpret_cast<ExecHandle>(exec); }

Stream& stream_of(cudaStream_t stream) { return machine.stream(ours(stream), current_device()); }

std::unordered_map<const void*, const char*>& kernel_names() {
  static auto& names = *new std::unordered_map<const void*, const char*>;
  return names;
}

std::string kernel_name(const void* function) {
  const auto found = kernel_names().find(function);
  if (found == kernel_names().end()) return "an unregistered kernel";
  int status = 0;
  char* const text = abi::__cxa_demangle(found->second, nullptr, nullptr, &status);
  const std::string name = text ? text : found->second;
  std::free(text);
  return name;
}

// Operators have taken the place of torch's kernels; what still launches one is missing here, and says so.
cudaError_t launch(const void* function, void** arguments, cudaStream_t stream) {
  const std::string name = kernel_name(function);
  const auto launched = [&](Guard&) {
    if (name.find("spin_kernel") != std::string::npos) {  // torch.cuda._sleep
      const auto cycles = *static_cast<const std::int64_t*>(arguments[0]);
      return machine.submit(stream_of(stream), kNodeTypeKernel,
                            [=] { std::this_thread::sleep_for(std::chrono::nanoseconds(cycles / 2)); });
    }
    std::fprintf(stderr, "softgpu: there is no kernel for %s\n", name.substr(0, 300).c_str());
    throw Failed{kNotSupported};
  };
  return call(launched, "cudaLaunchKernel");
}

// Pageable memory is staged, as CUDA does it: what is copied from may be changed at once, and what is copied
// to is there when the call returns. Pinned memory and that of devices is read when the stream comes to it.
void copy(Guard& lock, void* to, const void* from, std::size_t nbytes, cudaStream_t stream) {
  if (nbytes == 0) return;
  Stream& at = stream_of(stream);
  const bool to_known = machine.find(to), from_known = machine.find(from);
  if (!from_known) {
    auto staged = std::make_shared<std::string>(static_cast<const char*>(from), nbytes);
    machine.submit(at, kNodeTypeMemcpy, [=] { std::memcpy(to, staged->data(), nbytes); });
  } else {
    machine.submit(at, kNodeTypeMemcpy, [=] { std::memcpy(to, from, nbytes); });
  }
  if (!to_known) machine.synchronize(lock, at);
}

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

const char* cudaGetErrorName(cudaError_t error) {
  const Error* const found = find_error(error);
  return found ? found->runtime_name : "an unknown error";
}
const char* cudaGetErrorString(cudaError_t error) {
  const Error* const found = find_error(error);
  return found ? found->text : "unknown";
}
cudaError_t cudaGetLastError() { return static_cast<cudaError_t>(std::exchange(last_error(), kSuccess)); }
cudaError_t cudaPeekAtLastError() { return static_cast<cudaError_t>(last_error()); }

// --- devices
cudaError_t cudaDriverGetVersion(int* version) {
  *version = 13000;
  return cudaSuccess;
}
cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = 13000;
  return cudaSuccess;
}
cudaError_t cudaGetDeviceCount(int* count) {
  *count = machine.num_devices;
  return cudaSuccess;
}
cudaError_t cudaGetDevice(int* device) {
  *device = current_device();
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) {
  return call([&](Guard&) {
    machine.need_device(device);
    if (context_stack().empty()) context_stack().push_back(device);
    context_stack().back() = device;
    machine.in_use.insert(device);
  });
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int device) {
  *p = {};
  std::snprintf(p->name, sizeof p->name, "software GPU %d", device);
  p->totalGlobalMem = kTotal;
  p->major = 9;
  p->multiProcessorCount = 132;
  p->warpSize = 32;
  p->maxThreadsPerBlock = 1024;
  p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024;
  p->maxThreadsDim[2] = 64;
  p->maxGridSize[0] = 2147483647;
  p->maxGridSize[1] = p->maxGridSize[2] = 65535;
  p->regsPerBlock = p->regsPerMultiprocessor = 65536;
  p->sharedMemPerBlock = 49152;
  p->sharedMemPerBlockOptin = 232448;
  p->sharedMemPerMultiprocessor = 233472;
  p->maxThreadsPerMultiProcessor = 2048;
  p->maxBlocksPerMultiProcessor = 32;
  p->l2CacheSize = 50 << 20;
  p->unifiedAddressing = p->concurrentKernels = p->managedMemory = 1;
  p->asyncEngineCount = 3;
  p->pciBusID = device + 1;
  p->uuid.bytes[0] = static_cast<char>(device + 1);
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  cudaDeviceProp p;
  cudaGetDeviceProperties(&p, device);
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = p.multiProcessorCount;
      break;
    case cudaDevAttrComputeCapabilityMajor:
      *value = 9;
      break;
    case cudaDevAttrComputeCapabilityMinor:
      *value = 0;
      break;
    case cudaDevAttrMaxThreadsPerBlock:
      *value = 1024;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = p.sharedMemPerBlockOptin;
      break;
    case cudaDevAttrMaxThreadsPerMultiProcessor:
      *value = 2048;
      break;
    case cudaDevAttrWarpSize:
      *value = 32;
      break;
    default:
      *value = 0;
  }
  return cudaSuccess;
}
cudaError_t cudaDeviceGetPCIBusId(char* id, int length, int device) {
  std::snprintf(id, length, "0000:%02x:00.0", device + 1);
  return cudaSuccess;
}
cudaError_t cudaDeviceCanAccessPeer(int* can, int device, int peer) {
  *can = device != peer;
  return cudaSuccess;
}
cudaError_t cudaDeviceEnablePeerAccess(int peer, unsigned flags) {
  return call([&](Guard&) {
    machine.need_device(peer);
    need(flags == 0 && peer != current_device(), kInvalidDevice);
    need(machine.peers.emplace(current_device(), peer).second, kPeerAccessAlreadyEnabled);
  });
}
cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  *least = 0;
  *greatest = -5;
  return cudaSuccess;
}
cudaError_t cudaDeviceSynchronize() {
  return call([](Guard& lock) {
    machine.forbid_unsafe();
    machine.synchronize_device(lock, current_device());
  });
}
cudaError_t cudaProfilerStart() { return cudaSuccess; }
cudaError_t cudaProfilerStop() { return cudaSuccess; }
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  const auto before = std::exchange(capture_mode(), static_cast<CaptureMode>(*mode));
  *mode = static_cast<cudaStreamCaptureMode>(before);
  return cudaSuccess;
}

// --- memory
cudaError_t cudaMalloc(void** memory, std::size_t nbytes) {
  return call([&](Guard& lock) {
    machine.forbid_unsafe();
    *memory = nbytes ? machine.allocate(lock, nbytes, true, current_device()) : nullptr;
  });
}
cudaError_t cudaFree(void* memory) {
  return call([&](Guard& lock) {
    machine.forbid_unsafe();
    machine.release(lock, memory);
  });
}
cudaError_t cudaHostAlloc(void** memory, std::size_t nbytes, unsigned) {
  return call([&](Guard& lock) {
    machine.forbid_unsafe();
    *memory = machine.allocate(lock, nbytes, false, current_device());
  });
}
cudaError_t cudaFreeHost(void* memory) {
  return call([&](Guard& lock) { machine.release(lock, memory); });
}
cudaError_t cudaHostRegister(void* memory, std::size_t nbytes, unsigned) {
  return call([&](Guard&) {
    machine.allocations[reinterpret_cast<std::uintptr_t>(memory)] = {nbytes, false, current_device(), false};
  });
}
cudaError_t cudaHostUnregister(void* memory) {
  return call([&](Guard& lock) { machine.release(lock, memory); });
}
cudaError_t cudaMemGetInfo(std::size_t* free, std::size_t* total) {
  return call([&](Guard&) {
    *total = kTotal;
    *free = machine.free_memory(current_device());
  });
}
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* pointer) {
  return call([&](Guard&) {
    const Allocation* const found = machine.find(pointer);
    *attributes = {};
    attributes->type = !found             ? cudaMemoryTypeUnregistered
                       : found->on_device ? cudaMemoryTypeDevice
                                          : cudaMemoryTypeHost;
    attributes->device = found ? found->device : -2;
    attributes->hostPointer = found && found->on_device ? nullptr : const_cast<void*>(pointer);
    attributes->devicePointer = found ? const_cast<void*>(pointer) : nullptr;
  });
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t nbytes, cudaMemcpyKind,
                            cudaStream_t stream) {
  return call([&](Guard& lock) { copy(lock, to, from, nbytes, stream); });
}
cudaError_t cudaMemcpy(void* to, const void* from, std::size_t nbytes, cudaMemcpyKind) {
  return call([&](Guard& lock) {
    machine.forbid_unsafe();
    copy(lock, to, from, nbytes, nullptr);
    machine.synchronize(lock, stream_of(nullptr));
  });
}
cudaError_t cudaMemcpyPeerAsync(void* to, int, const void* from, int, std::size_t nbytes, cudaStream_t stream) {
  return call([&](Guard& lock) { copy(lock, to, from, nbytes, stream); });
}
cudaError_t cudaMemcpy2DAsync(void* to, std::size_t to_pitch, const void* from, std::size_t from_pitch,
                              std::size_t width, std::size_t height, cudaMemcpyKind, cudaStream_t stream) {
  return call([&](Guard&) {
    machine.submit(stream_of(stream), kNodeTypeMemcpy, [=] {
      for (std::size_t i = 0; i < height; ++i) {
        std::memcpy(static_cast<char*>(to) + i * to_pitch, static_cast<const char*>(from) + i * from_pitch,
                    width);
      }
    });
  });
}
cudaError_t cudaMemsetAsync(void* memory, int value, std::size_t nbytes, cudaStream_t stream) {
  return call([&](Guard&) {
    machine.submit(stream_of(stream), kNodeTypeMemset, [=] { std::memset(memory, value, nbytes); });
  });
}
cudaError_t cudaMemset(void* memory, int value, std::size_t nbytes) {
  return cudaMemsetAsync(memory, value, nbytes, nullptr);
}

// --- streams
cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned flags, int priority) {
  return call([&](Guard&) {
    *stream = reinterpret_cast<cudaStream_t>(machine.new_stream(current_device(), flags, priority));
  });
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) {
  return cudaStreamCreateWithPriority(stream, flags, 0);
}
cudaError_t cudaStreamCreate(cudaStream_t* stream) { return cudaStreamCreateWithPriority(stream, 0, 0); }
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  return call([&](Guard&) { machine.destroy_stream(ours(stream)); });
}
cudaError_t cudaStreamGetPriority(cudaStream_t stream, int* priority) {
  return call([&](Guard&) { *priority = stream_of(stream).priority; });
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  return call([&](Guard& lock) {
    machine.forbid_unsafe();
    machine.synchronize(lock, stream_of(stream));
  });
}
cudaError_t cudaStreamQuery(cudaStream_t stream) {
  return call([&](Guard&) {
    Stream& at = stream_of(stream);
    machine.forbid_unsafe();
    need(!at.tail || at.tail->done, kNotReady);
  });
}
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags) {
  return call([&](Guard&) {
    need(flags == 0, kInvalidValue);
    machine.wait(stream_of(stream), *machine.event(ours(event)));
  });
}
cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void* data) {
  return call([&](Guard&) { machine.submit(stream_of(stream), kNodeTypeHost, [=] { function(data); }); });
}
cudaError_t cudaStreamAddCallback(cudaStream_t stream, cudaStreamCallback_t function, void* data, unsigned) {
  return call([&](Guard&) {
    machine.submit(stream_of(stream), kNodeTypeHost, [=] { function(stream, cudaSuccess, data); });
  });
}
cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode) {
  return call([&](Guard&) { machine.begin_capture(stream_of(stream), static_cast<CaptureMode>(mode)); });
}
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
  *graph = nullptr;
  return call([&](Guard&) { *graph = as_handle<cudaGraph_t>(machine.end_capture(stream_of(stream))); });
}
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  return call([&](Guard&) {
    const auto& capture = stream_of(stream).point.capture;
    *status = static_cast<cudaStreamCaptureStatus>(!capture ? 0 : capture->invalid ? 2 : 1);
  });
}
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, cudaStreamCaptureStatus* status,
                                     unsigned long long* id, cudaGraph_t* graph, const cudaGraphNode_t** nodes,
                                     const cudaGraphEdgeData** edges, std::size_t* count) {
  return call([&](Guard&) {
    Stream& at = stream_of(stream);
    const auto& capture = at.point.capture;
    *status = static_cast<cudaStreamCaptureStatus>(!capture ? 0 : capture->invalid ? 2 : 1);
    if (*status != 1) return;
    at.shown.assign(at.point.nodes.begin(), at.point.nodes.end());
    if (id) *id = static_cast<unsigned long long>(capture->graph);
    if (graph) *graph = as_handle<cudaGraph_t>(capture->graph);
    if (nodes) *nodes = reinterpret_cast<const cudaGraphNode_t*>(at.shown.data());
    if (edges) *edges = nullptr;
    if (count) *count = at.shown.size();
  });
}

// --- events
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned flags) {
  return call(
      [&](Guard&) { *event = reinterpret_cast<cudaEvent_t>(machine.new_event(current_device(), flags)); });
}
cudaError_t cudaEventCreate(cudaEvent_t* event) { return cudaEventCreateWithFlags(event, 0); }
cudaError_t cudaEventDestroy(cudaEvent_t event) {
  return call([&](Guard&) { need(machine.events.erase(ours(event)) == 1, kInvalidHandle); });
}
cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned flags) {
  return call([&](Guard&) {
    machine.record(stream_of(stream), machine.event(ours(event)), flags == kEventRecordExternal);
  });
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  return cudaEventRecordWithFlags(event, stream, 0);
}
cudaError_t cudaEventQuery(cudaEvent_t event) {
  return call([&](Guard&) { need(machine.is_done(ours(event)), kNotReady); });
}
cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  return call([&](Guard& lock) {
    const auto asked = machine.event(ours(event));
    need(!asked->point.capture, kCapturedEvent);
    machine.forbid_unsafe();
    machine.wait_for(lock, asked->latest);
  });
}
cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t begin, cudaEvent_t end) {
  return call([&](Guard&) { *milliseconds = machine.elapsed(ours(begin), ours(end)); });
}

// --- graphs
cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  Graph gone;  // goes without the lock: its bodies may hold tensors
  return call([&](Guard&) {
    gone = std::move(machine.graph(ours(graph)));
    machine.graphs.erase(ours(graph));
  });
}
cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t* nodes, std::size_t* count) {
  return call([&](Guard&) { machine.nodes(ours(graph), reinterpret_cast<NodeHandle*>(nodes), count); });
}
cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* exec, cudaGraph_t graph, unsigned long long) {
  return call([&](Guard&) {
    *exec = reinterpret_cast<cudaGraphExec_t>(machine.instantiate(machine.graph(ours(graph))));
  });
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* exec, cudaGraph_t graph, unsigned long long flags) {
  return cudaGraphInstantiateWithFlags(exec, graph, flags);
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) {
  std::shared_ptr<const Graph> gone;  // as above
  return call([&](Guard&) {
    gone = machine.exec(ours(exec));
    machine.execs.erase(ours(exec));
  });
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t stream) {
  return call([&](Guard&) { machine.launch(stream_of(stream), machine.exec(ours(exec))); });
}

// --- kernels: only their names are known
void** __cudaRegisterFatBinary(void*) {
  static void* handle[1];
  return handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, void*, void*, void*, void*,
                            int*) {
  kernel_names()[host] = name;
}
void __cudaRegisterVar(void**, char*, char*, const char*, int, std::size_t, int, int) {}
char __cudaInitModule(void**) { return 1; }
static thread_local struct {
  dim3 grid, block;
  std::size_t shared;
  void* stream;
} configuration;
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, std::size_t shared, void* stream) {
  configuration = {grid, block, shared, stream};
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, std::size_t* shared, void* stream) {
  *grid = configuration.grid;
  *block = configuration.block;
  *shared = configuration.shared;
  *static_cast<void**>(stream) = configuration.stream;
  return cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
  *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(function));
  return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3, dim3, void** arguments, std::size_t,
                               cudaStream_t stream) {
  return launch(kernel, arguments, stream);
}
cudaError_t cudaLaunchKernel(const void* function, dim3, dim3, void** arguments, std::size_t,
                             cudaStream_t stream) {
  return launch(function, arguments, stream);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function, void** arguments) {
  return launch(function, arguments, config->stream);
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  *attributes = {};
  attributes->maxThreadsPerBlock = 1024;
  attributes->binaryVersion = attributes->ptxVersion = 90;
  return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }

cudaError_t cudaGetDriverEntryPointByVersion(const char*, void** function, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
  *function = nullptr;
  if (result) *result = cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}

}  // extern "C"
