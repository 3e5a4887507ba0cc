#include "runtime/device_times.hpp"

#include <algorithm>

namespace pe {

bool DeviceTimes::done() const {
  return std::all_of(finish_.begin(), finish_.end(), [](const cuda::Event& event) { return event.done(); });
}

MeasuredTimes DeviceTimes::read() const {
  MeasuredTimes times;
  for (std::size_t device = 0; device < origin_.size(); ++device) {
    times.step = std::max(times.step, finish_[device].milliseconds_since(origin_[device]) * 1e-3);
  }
  for (std::size_t op = 0; op < begin_.size(); ++op) {
    const cuda::Event& origin = origin_[device_[op]];
    times.begin.push_back(begin_[op].milliseconds_since(origin) * 1e-3);
    times.end.push_back(end_[op].milliseconds_since(origin) * 1e-3);
  }
  return times;
}

}  // namespace pe
