// When the tasks of a step ran on their devices: events in the streams, read once they are done.
#pragma once

#include <vector>

#include "cuda/stream.hpp"

namespace pe {

// Seconds since the step's begin.
struct MeasuredTimes {
  double step = 0;
  std::vector<double> begin;  // by step of the StreamPlan
  std::vector<double> end;
};

class DeviceTimes {
 public:
  // Events for a step of `num_steps` things to enqueue, on these devices, whose contexts are current in turn
  // while `make_current(device)` has been called.
  DeviceTimes(std::size_t num_steps, std::size_t num_devices)
      : begin_(num_steps), end_(num_steps), device_(num_steps, 0), origin_(num_devices),
        finish_(num_devices) {}

  void record_origin(std::size_t device, cuda::StreamHandle stream, unsigned flags) {
    record(origin_[device], stream, flags);
  }
  void record_finish(std::size_t device, cuda::StreamHandle stream, unsigned flags) {
    record(finish_[device], stream, flags);
  }
  void record_begin(std::size_t step, std::size_t device, cuda::StreamHandle stream, unsigned flags) {
    device_[step] = device;
    record(begin_[step], stream, flags);
  }
  void record_end(std::size_t step, cuda::StreamHandle stream, unsigned flags) {
    record(end_[step], stream, flags);
  }

  // Whether the step has ended on all devices.
  bool done() const;

  // Throws CudaError if it has not.
  MeasuredTimes read() const;

 private:
  static void record(cuda::Event& event, cuda::StreamHandle stream, unsigned flags) {
    if (event.handle() == nullptr) event = cuda::Event(cuda::kEventDefault);
    event.record(stream, flags);
  }

  std::vector<cuda::Event> begin_, end_;
  std::vector<std::size_t> device_;
  std::vector<cuda::Event> origin_, finish_;  // by device
};

}  // namespace pe
