// When the ops of a step ran on their devices: events in the streams, read once they are done.
#pragma once

#include <memory>
#include <utility>
#include <vector>

#include "cuda/stream.hpp"

namespace pe {

// Seconds since the step's begin.
struct MeasuredTimes {
  double step = 0;
  std::vector<double> begin;  // by op of the StreamPlan
  std::vector<double> end;
};

class DeviceTimes {
 public:
  using Contexts = std::vector<std::shared_ptr<const cuda::PrimaryContext>>;

  // For a step of `num_ops` ops on these devices. The functions that record need the device's context to be
  // current.
  DeviceTimes(std::size_t num_ops, Contexts devices)
      : contexts_(std::move(devices)),
        begin_(num_ops),
        end_(num_ops),
        device_(num_ops, 0),
        origin_(contexts_.size()),
        finish_(contexts_.size()) {}

  void record_origin(std::size_t device, cuda::StreamHandle stream, unsigned flags) {
    record(origin_[device], device, stream, flags);
  }
  void record_finish(std::size_t device, cuda::StreamHandle stream, unsigned flags) {
    record(finish_[device], device, stream, flags);
  }
  void record_begin(std::size_t op, std::size_t device, cuda::StreamHandle stream, unsigned flags) {
    device_[op] = device;
    record(begin_[op], device, stream, flags);
  }
  void record_end(std::size_t op, cuda::StreamHandle stream, unsigned flags) {
    record(end_[op], device_[op], stream, flags);
  }

  // Whether the step has ended on all devices.
  bool done() const;

  // Throws CudaError if it has not.
  MeasuredTimes read() const;

 private:
  void record(cuda::Event& event, std::size_t device, cuda::StreamHandle stream, unsigned flags) {
    if (event.handle() == nullptr) event = cuda::Event(contexts_[device], cuda::kEventDefault);
    event.record(stream, flags);
  }

  Contexts contexts_;
  std::vector<cuda::Event> begin_, end_;
  std::vector<std::size_t> device_;
  std::vector<cuda::Event> origin_, finish_;  // by device
};

}  // namespace pe
