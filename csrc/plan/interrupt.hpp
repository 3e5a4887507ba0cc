// Lets whoever waits for long work end it. The loops of the work call check_interrupt().
#pragma once

#include <cstddef>
#include <functional>

namespace pe {

// Thrown where work ends early.
struct Interrupted {};

// While it lives, work on this thread asks `poll` about every 20 ms, and ends if that returns true.
class Interruptible {
 public:
  explicit Interruptible(std::function<bool()> poll);
  ~Interruptible();
  Interruptible(const Interruptible&) = delete;

 private:
  std::function<bool()> before_;
};

// Throws Interrupted if the poll says so; does nothing on a thread without one.
void check_interrupt();

// The same for a loop over many short turns, given the number of the turn: looks once in a while.
inline void check_interrupt(std::size_t turn) {
  if (turn % 4096 == 0) check_interrupt();
}

}  // namespace pe
