#include "kernels.hpp"

#include <stdexcept>
#include <string>

#include "machine.hpp"

namespace softgpu {
namespace {

Machine& machine = Machine::get();

Stream& stream_of(void* stream) { return machine.stream(static_cast<StreamHandle>(stream), current_device()); }

[[noreturn]] void raise(const Failed& failed, const char* name) {
  const Error* const error = find_error(failed.code);
  throw std::runtime_error(std::string("CUDA error: ") + (error ? error->text : "unknown") + ", in " + name);
}

}  // namespace

void submit_kernel(void* stream, const char* name, std::function<void()> body, bool waits) {
  const Guard lock(machine.mutex);
  try {
    machine.submit(stream_of(stream), kNodeTypeKernel, std::move(body), waits);
  } catch (const Failed& failed) {
    raise(failed, name);
  }
}

bool is_capturing(void* stream) {
  const Guard lock(machine.mutex);
  return stream_of(stream).point.capture != nullptr;
}

void synchronize_stream(void* stream) {
  Guard lock(machine.mutex);
  try {
    machine.forbid_unsafe();
    machine.synchronize(lock, stream_of(stream));
  } catch (const Failed& failed) {
    raise(failed, "a synchronization");
  }
}

}  // namespace softgpu

// For callers without our headers, as Python's ctypes.
extern "C" void softgpu_submit(void* stream, void (*function)(void*), void* data) {
  softgpu::submit_kernel(stream, "a Python function", [=] { function(data); });
}
