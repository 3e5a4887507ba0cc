// What torch takes from libcuda.so.1 by name.
#include <cuda_runtime_api.h>

#include "machine/machine.hpp"
#include "machine/script.hpp"

using namespace softgpu;

namespace {

Machine& machine = Machine::get();

Result call(const std::function<void()>& body) {
  const Guard lock(machine.mutex);
  try {
    body();
    return kSuccess;
  } catch (const Failed& failed) {
    return failed.code;
  }
}

enum PointerAttribute { kMemoryType = 2, kDevicePointer = 3, kRangeStart = 11 };
enum MemoryType { kHost = 1, kDevice = 2 };

}  // namespace

extern "C" {

Result cuGetErrorString(Result error, const char** text) {
  const Error* const found = find_error(error);
  *text = found ? found->text : "unknown";
  return kSuccess;
}

Result cuDeviceGet(int* device, int ordinal) {
  return call([&] {
    machine.need_device(ordinal);
    *device = ordinal;
  });
}

Result cuDeviceGetAttribute(int* value, int attribute, int device) {
  return cudaDeviceGetAttribute(value, static_cast<cudaDeviceAttr>(attribute), device);
}

Result cuDevicePrimaryCtxRetain(Context* context, int device) {
  return call([&] {
    machine.need_device(device);
    machine.in_use.insert(device);
    *context = as_context(device);
  });
}

Result cuDevicePrimaryCtxGetState(int device, unsigned* flags, int* active) {
  return call([&] {
    machine.need_device(device);
    *flags = 0;
    *active = machine.in_use.contains(device) || machine.retained.contains(device);
  });
}

Result cuCtxGetCurrent(Context* context) {
  *context = context_stack().empty() ? nullptr : as_context(context_stack().back());
  return kSuccess;
}

Result cuCtxSetCurrent(Context context) {
  return call([&] {
    machine.need_device(number(context));
    if (context_stack().empty()) context_stack().push_back(0);
    context_stack().back() = number(context);
  });
}

Result cuPointerGetAttribute(void* data, int attribute, unsigned long long pointer) {
  return call([&] {
    std::uintptr_t begin = 0;
    const Allocation* const found = machine.find(reinterpret_cast<void*>(pointer), &begin);
    need(found != nullptr, kInvalidValue);
    switch (attribute) {
      case kMemoryType:
        *static_cast<unsigned*>(data) = found->on_device ? kDevice : kHost;
        break;
      case kDevicePointer:
        *static_cast<unsigned long long*>(data) = pointer;
        break;
      case kRangeStart:
        *static_cast<unsigned long long*>(data) = begin;
        break;
      default:
        throw Failed{kNotSupported};
    }
  });
}

}  // extern "C"
