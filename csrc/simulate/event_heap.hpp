// A priority queue of events, earliest first. A node has four children, so it is half as deep as a binary heap.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace pe {

struct Event {
  double time;
  std::uint32_t worker;
  std::uint32_t generation;

  friend bool operator<(const Event& a, const Event& b) {
    return a.time != b.time ? a.time < b.time : a.worker < b.worker;
  }
};

class EventHeap {
 public:
  bool empty() const { return events_.empty(); }
  const Event& top() const { return events_.front(); }
  std::size_t nbytes() const { return events_.capacity() * sizeof(Event); }

  void push(Event event) {
    std::size_t at = events_.size();
    events_.push_back(event);
    while (at > 0) {
      const std::size_t parent = (at - 1) / kChildren;
      if (!(event < events_[parent])) break;
      events_[at] = events_[parent];
      at = parent;
    }
    events_[at] = event;
  }

  void pop() {
    const Event last = events_.back();
    events_.pop_back();
    if (!events_.empty()) sink(last);
  }

 private:
  static constexpr std::size_t kChildren = 4;

  // Puts `event` into the free top of the heap and moves it down.
  void sink(Event event) {
    const std::size_t size = events_.size();
    std::size_t at = 0;
    for (;;) {
      const std::size_t first = at * kChildren + 1;
      if (first >= size) break;
      std::size_t least = first;
      for (std::size_t c = first + 1; c < std::min(first + kChildren, size); ++c) {
        if (events_[c] < events_[least]) least = c;
      }
      if (!(events_[least] < event)) break;
      events_[at] = events_[least];
      at = least;
    }
    events_[at] = event;
  }

  std::vector<Event> events_;
};

}  // namespace pe
