// The part of NVIDIA's driver API that we call: types, constants and functions as in cuda.h of CUDA 12.0.
// Declared here so that the build needs no toolkit; a test compares it with a real cuda.h.
#pragma once

#include <cstddef>
#include <cstdint>

namespace pe::cuda {

using Result = int;
using Device = int;
using Context = struct OpaqueContext*;
using StreamHandle = struct OpaqueStream*;
using EventHandle = struct OpaqueEvent*;
using GraphHandle = struct OpaqueGraph*;
using NodeHandle = struct OpaqueNode*;
using Address = unsigned long long;  // on a device

inline constexpr Result kSuccess = 0;
inline constexpr Result kNotReady = 600;
inline constexpr Result kPeerAccessAlreadyEnabled = 704;
inline constexpr Result kFirstCaptureError = 900;  // a call that a capture forbids, of this thread or another
inline constexpr Result kLastCaptureError = 908;

inline constexpr unsigned kStreamNonBlocking = 1;
inline constexpr unsigned kEventDefault = 0;
inline constexpr unsigned kEventDisableTiming = 2;
inline constexpr unsigned kEventRecordDefault = 0;
inline constexpr unsigned kEventRecordExternal = 1;
inline constexpr int kNodeTypeKernel = 0;
inline constexpr int kAttributePriority = 8;
inline constexpr int kCaptureNone = 0;
inline constexpr int kCaptureActive = 1;
inline constexpr int kCaptureModeRelaxed = 2;

// cuda.h has a union of 64 bytes.
union AttributeValue {
  char pad[64];
  int priority;
};

using GetProcAddress = Result (*)(const char* symbol, void** function, int version, std::uint64_t flags,
                                  int* status);

// X(name, version of the ABI, parameters). Later versions of a function may have other parameters; the driver
// returns the one for the requested version.
#define PE_CUDA_FUNCTIONS(X)                                                                                   \
  X(cuInit, 2000, (unsigned flags))                                                                            \
  X(cuDriverGetVersion, 2020, (int* version))                                                                  \
  X(cuGetErrorName, 6000, (Result error, const char** name))                                                   \
  X(cuGetErrorString, 6000, (Result error, const char** text))                                                 \
  X(cuDeviceGetCount, 2000, (int* count))                                                                      \
  X(cuDeviceGet, 2000, (Device * device, int ordinal))                                                         \
  X(cuDevicePrimaryCtxRetain, 7000, (Context * context, Device device))                                        \
  X(cuDevicePrimaryCtxRelease, 11000, (Device device))                                                         \
  X(cuCtxPushCurrent, 4000, (Context context))                                                                 \
  X(cuCtxPopCurrent, 4000, (Context * context))                                                                \
  X(cuCtxGetStreamPriorityRange, 5050, (int* least, int* greatest))                                            \
  X(cuDeviceCanAccessPeer, 4000, (int* can, Device device, Device peer))                                       \
  X(cuCtxEnablePeerAccess, 4000, (Context peer, unsigned flags))                                               \
  X(cuStreamCreateWithPriority, 5050, (StreamHandle * stream, unsigned flags, int priority))                   \
  X(cuStreamDestroy, 4000, (StreamHandle stream))                                                              \
  X(cuStreamWaitEvent, 3020, (StreamHandle stream, EventHandle event, unsigned flags))                         \
  X(cuStreamGetCaptureInfo, 11030,                                                                             \
    (StreamHandle stream, int* status, std::uint64_t* id, GraphHandle* graph, const NodeHandle** dependencies, \
     std::size_t* num_dependencies))                                                                           \
  X(cuThreadExchangeStreamCaptureMode, 10010, (int* mode))                                                     \
  X(cuEventCreate, 2000, (EventHandle * event, unsigned flags))                                                \
  X(cuEventDestroy, 4000, (EventHandle event))                                                                 \
  X(cuEventRecordWithFlags, 11010, (EventHandle event, StreamHandle stream, unsigned flags))                   \
  X(cuEventQuery, 2000, (EventHandle event))                                                                   \
  X(cuEventElapsedTime, 2000, (float* milliseconds, EventHandle begin, EventHandle end))                       \
  X(cuMemcpyPeerAsync, 4000,                                                                                   \
    (Address to, Context to_context, Address from, Context from_context, std::size_t nbytes,                   \
     StreamHandle stream))                                                                                     \
  X(cuGraphGetNodes, 10000, (GraphHandle graph, NodeHandle * nodes, std::size_t* count))                       \
  X(cuGraphNodeGetType, 10000, (NodeHandle node, int* type))                                                   \
  X(cuGraphKernelNodeSetAttribute, 11000, (NodeHandle node, int attribute, const AttributeValue* value))

// The oldest driver that has all these functions and runs the torch versions that we support.
inline constexpr int kOldestVersion = 12000;

}  // namespace pe::cuda
