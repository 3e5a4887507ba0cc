// Streams and events: made in the current context, used and destroyed from anywhere.
#pragma once

#include <utility>

#include "cuda/driver.hpp"

namespace pe::cuda {

// Of one owner: moves, and is destroyed once what was enqueued before has run.
class Event {
 public:
  Event() = default;
  explicit Event(unsigned flags) { PE_CUDA(Driver::get(), cuEventCreate, &handle_, flags); }
  ~Event() {
    if (handle_ != nullptr) Driver::get().cuEventDestroy(handle_);
  }
  Event(Event&& other) noexcept : handle_(std::exchange(other.handle_, nullptr)) {}
  Event& operator=(Event&& other) noexcept {
    std::swap(handle_, other.handle_);
    return *this;
  }

  EventHandle handle() const { return handle_; }

  void record(StreamHandle stream, unsigned flags = kEventRecordDefault) const {
    PE_CUDA(Driver::get(), cuEventRecordWithFlags, handle_, stream, flags);
  }

  // Whether all that was enqueued before the latest record has run.
  bool done() const {
    const Result result = Driver::get().cuEventQuery(handle_);
    if (result != kNotReady) Driver::get().check(result, "cuEventQuery");
    return result == kSuccess;
  }

  // Both have been recorded, on streams of one device, and are done.
  double milliseconds_since(const Event& begin) const {
    float milliseconds = 0;
    PE_CUDA(Driver::get(), cuEventElapsedTime, &milliseconds, begin.handle_, handle_);
    return milliseconds;
  }

 private:
  EventHandle handle_ = nullptr;
};

inline void wait(StreamHandle stream, const Event& event) {
  PE_CUDA(Driver::get(), cuStreamWaitEvent, stream, event.handle(), 0);
}

class Stream {
 public:
  explicit Stream(int priority) {
    PE_CUDA(Driver::get(), cuStreamCreateWithPriority, &handle_, kStreamNonBlocking, priority);
  }
  ~Stream() {
    if (handle_ != nullptr) Driver::get().cuStreamDestroy(handle_);
  }
  Stream(Stream&& other) noexcept : handle_(std::exchange(other.handle_, nullptr)) {}
  Stream& operator=(Stream&&) = delete;

  StreamHandle handle() const { return handle_; }

 private:
  StreamHandle handle_ = nullptr;
};

}  // namespace pe::cuda
