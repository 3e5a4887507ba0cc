// Streams and events of a device. Any thread may create, query and destroy them. To record or wait, the
// device's context must be current.
#pragma once

#include <memory>
#include <utility>

#include "cuda/context.hpp"
#include "cuda/driver.hpp"

namespace pe::cuda {

// Lets the calling thread make calls that a capture of another thread would otherwise forbid: an event query
// would fail, and end that capture.
class RelaxedCapture {
 public:
  RelaxedCapture() : driver_(Driver::get()) { exchange(); }
  ~RelaxedCapture() { exchange(); }
  RelaxedCapture(const RelaxedCapture&) = delete;
  RelaxedCapture& operator=(const RelaxedCapture&) = delete;

 private:
  void exchange() { driver_.cuThreadExchangeStreamCaptureMode(&mode_); }

  const Driver& driver_;
  int mode_ = kCaptureModeRelaxed;  // then the thread's own
};

class Event {
 public:
  Event() = default;
  Event(std::shared_ptr<const PrimaryContext> context, unsigned flags) : context_(std::move(context)) {
    const CurrentContext current(*context_);
    PE_CUDA(Driver::get(), cuEventCreate, &handle_, flags);
  }
  ~Event() {
    if (handle_ == nullptr) return;
    const CurrentContext current(*context_, kQuietly);
    Driver::get().cuEventDestroy(handle_);
  }
  Event(Event&& other) noexcept
      : context_(std::move(other.context_)), handle_(std::exchange(other.handle_, nullptr)) {}
  Event& operator=(Event&& other) noexcept {
    std::swap(context_, other.context_);
    std::swap(handle_, other.handle_);
    return *this;
  }

  EventHandle handle() const { return handle_; }

  void record(StreamHandle stream, unsigned flags = kEventRecordDefault) const {
    PE_CUDA(Driver::get(), cuEventRecordWithFlags, handle_, stream, flags);
  }

  // Whether all work enqueued before the latest record is done.
  bool done() const {
    const CurrentContext current(*context_);
    const RelaxedCapture relaxed;
    const Result result = Driver::get().cuEventQuery(handle_);
    if (result != kNotReady) Driver::get().check(result, "cuEventQuery");
    return result == kSuccess;
  }

  // Both events must be recorded, on streams of one device, and done.
  double milliseconds_since(const Event& begin) const {
    const CurrentContext current(*context_);
    float milliseconds = 0;
    PE_CUDA(Driver::get(), cuEventElapsedTime, &milliseconds, begin.handle_, handle_);
    return milliseconds;
  }

 private:
  std::shared_ptr<const PrimaryContext> context_;
  EventHandle handle_ = nullptr;
};

inline void wait(StreamHandle stream, const Event& event) {
  PE_CUDA(Driver::get(), cuStreamWaitEvent, stream, event.handle(), 0);
}

class Stream {
 public:
  Stream(std::shared_ptr<const PrimaryContext> context, int priority) : context_(std::move(context)) {
    const CurrentContext current(*context_);
    PE_CUDA(Driver::get(), cuStreamCreateWithPriority, &handle_, kStreamNonBlocking, priority);
  }
  ~Stream() {
    if (handle_ == nullptr) return;
    const CurrentContext current(*context_, kQuietly);
    Driver::get().cuStreamDestroy(handle_);
  }
  Stream(Stream&& other) noexcept
      : context_(std::move(other.context_)), handle_(std::exchange(other.handle_, nullptr)) {}
  Stream& operator=(Stream&&) = delete;

  StreamHandle handle() const { return handle_; }

 private:
  std::shared_ptr<const PrimaryContext> context_;
  StreamHandle handle_ = nullptr;
};

}  // namespace pe::cuda
