// Tunes the C library's allocator for training steps.
#pragma once

namespace pe {

// Tells glibc, once for the whole process, to keep freed memory. By default glibc returns blocks of a
// gradient's size to the kernel at every free and faults them in again, and each change of the address space
// slows down all other threads. Does nothing without glibc, or if the user has set MALLOC_TRIM_THRESHOLD_,
// MALLOC_MMAP_THRESHOLD_, MALLOC_TOP_PAD_ or GLIBC_TUNABLES. Returns whether it changed the settings.
bool keep_freed_memory();

}  // namespace pe
