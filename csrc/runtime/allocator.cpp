#include "runtime/allocator.hpp"

#include <cstdlib>
#include <initializer_list>

#ifdef __GLIBC__
#include <malloc.h>
#endif

namespace pe {
namespace {

bool keep_freed_memory_once() {
#ifdef __GLIBC__
  for (const char* name :
       {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_", "GLIBC_TUNABLES"}) {
    if (std::getenv(name) != nullptr) return false;
  }
  constexpr int kLargestMmapThreshold = 32 << 20;  // glibc refuses more
  constexpr int kTopPad = 64 << 20;
  constexpr int kNeverTrim = 0x7fffffff;
  return mallopt(M_TRIM_THRESHOLD, kNeverTrim) == 1 && mallopt(M_MMAP_THRESHOLD, kLargestMmapThreshold) == 1 &&
         mallopt(M_TOP_PAD, kTopPad) == 1;
#else
  return false;
#endif
}

}  // namespace

bool keep_freed_memory() {
  static const bool kept = keep_freed_memory_once();
  return kept;
}

}  // namespace pe
