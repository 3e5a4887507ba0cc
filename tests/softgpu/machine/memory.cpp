// Memory of devices, and pinned memory: both are the host's.
#include <sys/mman.h>

#include <algorithm>
#include <cstring>

#include "machine.hpp"

namespace softgpu {
namespace {

std::size_t pages(std::size_t nbytes) { return (std::max<std::size_t>(nbytes, 1) + 4095) / 4096 * 4096; }

}  // namespace

std::size_t Machine::free_memory(int device) const {
  const auto limit = allowed.find(device), taken = used.find(device);
  const std::size_t all = limit == allowed.end() ? kTotal : limit->second;
  const std::size_t gone = taken == used.end() ? 0 : taken->second;
  return all > gone ? all - gone : 0;
}

void* Machine::allocate(Guard& lock, std::size_t nbytes, bool on_device, int device) {
  need(!on_device || nbytes <= free_memory(device), kOutOfMemory);
  void* const memory = mmap(nullptr, pages(nbytes), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  need(memory != MAP_FAILED, kOutOfMemory);
  allocations[reinterpret_cast<std::uintptr_t>(memory)] = {nbytes, on_device, device, true};
  if (on_device) {
    used[device] += nbytes;
    lock.unlock();
    std::memset(memory, 0xff, nbytes);  // not a number, for whoever reads it unwritten
    lock.lock();
  }
  return memory;
}

void Machine::release(Guard& lock, void* pointer) {
  if (!pointer) return;
  const auto found = allocations.find(reinterpret_cast<std::uintptr_t>(pointer));
  need(found != allocations.end(), kInvalidValue);
  const Allocation allocation = found->second;
  if (allocation.on_device) synchronize_device(lock, allocation.device);
  allocations.erase(reinterpret_cast<std::uintptr_t>(pointer));
  if (allocation.on_device) used[allocation.device] -= allocation.nbytes;
  if (allocation.owned) munmap(pointer, pages(allocation.nbytes));
}

const Allocation* Machine::find(const void* pointer, std::uintptr_t* begin) const {
  const auto address = reinterpret_cast<std::uintptr_t>(pointer);
  auto found = allocations.upper_bound(address);
  if (found == allocations.begin()) return nullptr;
  --found;
  if (begin) *begin = found->first;
  return address < found->first + std::max<std::size_t>(found->second.nbytes, 1) ? &found->second : nullptr;
}

}  // namespace softgpu
