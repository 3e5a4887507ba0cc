// Threads that ask for the GIL while the interpreter ends. Before Python 3.14 that unwinds their stacks, which
// C++ code on them, as torch's, does not survive: it reaches functions that must not throw, and frees objects
// without the GIL. So these threads sleep until the process has ended, as in Python 3.14.
#pragma once

#include <pthread.h>

namespace pe {

// For all threads, from now on: instead of std::terminate() where a function must not throw.
void survive_unwinding();

// For one thread, which has to call begin() itself: before anything is unwound.
class NoUnwinding {
 public:
  void begin();

 private:
  _pthread_cleanup_buffer handler_{};
};

}  // namespace pe
