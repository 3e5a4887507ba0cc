// The C library's allocator, as a training step needs it.
#pragma once

namespace pe {

// Tells glibc, once and for the whole process, to keep what is freed. By default it gives blocks of a
// gradient's size back to the kernel at every free and faults them in again, and every other thread pays
// for the change of the address space. Does nothing where the user has tuned the allocator through
// MALLOC_TRIM_THRESHOLD_, MALLOC_MMAP_THRESHOLD_, MALLOC_TOP_PAD_ or GLIBC_TUNABLES, or without glibc.
// Returns whether it did.
bool keep_freed_memory();

}  // namespace pe
