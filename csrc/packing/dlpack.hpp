// The part of DLPack 1.x that tells where a tensor's memory is. Names and layout are DLPack's.
#pragma once

#include <cstdint>

namespace pe::dlpack {

inline constexpr std::uint32_t kMajorVersion = 1;
inline constexpr std::int32_t kCPU = 1;
inline constexpr std::int32_t kCUDAHost = 3;  // pinned memory

struct DLVersion {
  std::uint32_t major, minor;
};

struct DLDevice {
  std::int32_t device_type, device_id;
};

struct DLDataType {
  std::uint8_t code, bits;
  std::uint16_t lanes;
};

struct DLTensor {
  void* data;
  DLDevice device;
  std::int32_t ndim;
  DLDataType dtype;
  std::int64_t* shape;
  std::int64_t* strides;  // in elements; before 1.2 null meant contiguous
  std::uint64_t byte_offset;
};

// The content of the capsule "dltensor" that a tensor's __dlpack__() returns.
struct DLManagedTensor {
  DLTensor dl_tensor;
  void* manager_ctx;
  void (*deleter)(DLManagedTensor*);
};

// The content of the capsule "dlpack_exchange_api", a type's __dlpack_c_exchange_api__.
struct DLPackExchangeAPI {
  DLVersion version;
  DLPackExchangeAPI* previous;  // of an older major version, or null
  void* managed_tensor_allocator;
  void* managed_tensor_from_py_object_no_sync;
  void* managed_tensor_to_py_object_no_sync;
  int (*dltensor_from_py_object_no_sync)(void* object, DLTensor* out);  // may be null; borrows, owns nothing
  void* current_work_stream;
};

}  // namespace pe::dlpack
