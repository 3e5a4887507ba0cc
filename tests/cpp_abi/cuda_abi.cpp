// Checks csrc/cuda/abi.hpp against a real cuda.h, at compile time only.
// cuda.h maps a function's name to its newest version; cudaTypedefs.h has the types of all versions.
#include <cuda.h>
#include <cudaTypedefs.h>

#include <type_traits>

#include "cuda/abi.hpp"
#include "softgpu/machine/errors.hpp"

namespace pe::cuda {
namespace {

// Whether A and B are passed to a function in the same way.
template <class A, class B>
constexpr bool same_to_call = sizeof(A) == sizeof(B) && std::is_pointer_v<A> == std::is_pointer_v<B> &&
                              std::is_floating_point_v<A> == std::is_floating_point_v<B>;

// If both point to complete types, these must have the same size too.
template <class A, class B>
constexpr bool same_behind = true;
template <class A, class B>
  requires requires { sizeof(A) + sizeof(B); }
constexpr bool same_behind<A*, B*> = same_to_call<A, B>;

template <class Ours, class Theirs>
constexpr bool same_function = false;
template <class R, class... A, class S, class... B>
  requires(sizeof...(A) == sizeof...(B))
constexpr bool same_function<R (*)(A...), S (*)(B...)> =
    same_to_call<R, S> && (... && (same_to_call<A, B> && same_behind<A, B>));

static_assert(same_function<int (*)(float*, int), CUresult (*)(float*, CUdevice)>);
static_assert(!same_function<int (*)(float*), CUresult (*)(float*, CUdevice)>);
static_assert(!same_function<int (*)(float*), CUresult (*)(double*)>);
static_assert(!same_function<int (*)(std::size_t), CUresult (*)(CUstream)>);

#define SAME_FUNCTION(name, version, parameters)                              \
  static_assert(same_function<Result(*) parameters, PFN_##name##_v##version>, \
                #name " of version " #version " has other parameters");
PE_CUDA_FUNCTIONS(SAME_FUNCTION)

static_assert(same_function<GetProcAddress, PFN_cuGetProcAddress_v12000>);

static_assert(sizeof(AttributeValue) == sizeof(CUlaunchAttributeValue));
static_assert(offsetof(AttributeValue, priority) == offsetof(CUlaunchAttributeValue, priority));
static_assert(same_to_call<decltype(AttributeValue::priority), decltype(CUlaunchAttributeValue::priority)>);

#define SAME_VALUE(ours, theirs) \
  static_assert(static_cast<long>(ours) == static_cast<long>(theirs), #ours " is not " #theirs)
SAME_VALUE(kSuccess, CUDA_SUCCESS);
SAME_VALUE(kNotReady, CUDA_ERROR_NOT_READY);
SAME_VALUE(kPeerAccessAlreadyEnabled, CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED);
SAME_VALUE(kFirstCaptureError, CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
SAME_VALUE(kLastCaptureError, CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD);
SAME_VALUE(kStreamNonBlocking, CU_STREAM_NON_BLOCKING);
SAME_VALUE(kEventDefault, CU_EVENT_DEFAULT);
SAME_VALUE(kEventDisableTiming, CU_EVENT_DISABLE_TIMING);
SAME_VALUE(kEventRecordDefault, CU_EVENT_RECORD_DEFAULT);
SAME_VALUE(kEventRecordExternal, CU_EVENT_RECORD_EXTERNAL);
SAME_VALUE(kNodeTypeKernel, CU_GRAPH_NODE_TYPE_KERNEL);
SAME_VALUE(kAttributePriority, CU_LAUNCH_ATTRIBUTE_PRIORITY);
SAME_VALUE(kCaptureNone, CU_STREAM_CAPTURE_STATUS_NONE);
SAME_VALUE(kCaptureActive, CU_STREAM_CAPTURE_STATUS_ACTIVE);
SAME_VALUE(kCaptureModeRelaxed, CU_STREAM_CAPTURE_MODE_RELAXED);

// The constants of the stand-in driver.
SAME_VALUE(softgpu::kInvalidValue, CUDA_ERROR_INVALID_VALUE);
SAME_VALUE(softgpu::kNoDevice, CUDA_ERROR_NO_DEVICE);
SAME_VALUE(softgpu::kInvalidDevice, CUDA_ERROR_INVALID_DEVICE);
SAME_VALUE(softgpu::kInvalidContext, CUDA_ERROR_INVALID_CONTEXT);
SAME_VALUE(softgpu::kInvalidHandle, CUDA_ERROR_INVALID_HANDLE);
SAME_VALUE(softgpu::kIllegalState, CUDA_ERROR_ILLEGAL_STATE);
SAME_VALUE(softgpu::kNotFound, CUDA_ERROR_NOT_FOUND);
SAME_VALUE(softgpu::kCaptureUnsupported, CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
SAME_VALUE(softgpu::kCaptureInvalidated, CUDA_ERROR_STREAM_CAPTURE_INVALIDATED);
SAME_VALUE(softgpu::kCaptureUnmatched, CUDA_ERROR_STREAM_CAPTURE_UNMATCHED);
SAME_VALUE(softgpu::kCaptureMerge, CUDA_ERROR_STREAM_CAPTURE_MERGE);
SAME_VALUE(softgpu::kCaptureUnjoined, CUDA_ERROR_STREAM_CAPTURE_UNJOINED);
SAME_VALUE(softgpu::kCaptureIsolation, CUDA_ERROR_STREAM_CAPTURE_ISOLATION);
SAME_VALUE(softgpu::kCaptureImplicit, CUDA_ERROR_STREAM_CAPTURE_IMPLICIT);
SAME_VALUE(softgpu::kCapturedEvent, CUDA_ERROR_CAPTURED_EVENT);

}  // namespace
}  // namespace pe::cuda
