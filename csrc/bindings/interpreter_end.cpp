#include "bindings/interpreter_end.hpp"

#include <pybind11/pybind11.h>

#include <exception>
#include <mutex>

#include "runtime/process_end.hpp"

// glibc exports it, as the Linux Standard Base asks, but does not declare it any more.
extern "C" void _pthread_cleanup_push(_pthread_cleanup_buffer* buffer, void (*routine)(void*), void* argument);

namespace pe {
namespace {

bool finalizing() {
#if PY_VERSION_HEX >= 0x030D0000
  return Py_IsFinalizing() != 0;
#else
  return _Py_IsFinalizing() != 0;
#endif
}

void sleep_if_finalizing() {
  if (!finalizing()) return;
  thread_may_not_end();
  sleep_until_process_ends();
}

}  // namespace

void survive_unwinding() {
  static std::once_flag installed;
  static std::terminate_handler before;
  std::call_once(installed, [] {
    before = std::set_terminate([] {
      if (std::current_exception() == nullptr) sleep_if_finalizing();
      before();
    });
  });
}

void NoUnwinding::begin() {
  // glibc runs the handlers of the frames that a thread has left, by their addresses. This one lies on no
  // stack: it has been left before the first frame is.
  _pthread_cleanup_push(&handler_, [](void*) { sleep_if_finalizing(); }, nullptr);
}

}  // namespace pe
