#include "plan/interrupt.hpp"

#include <chrono>
#include <utility>

namespace pe {
namespace {

using Clock = std::chrono::steady_clock;
constexpr auto kPollPeriod = std::chrono::milliseconds(20);

thread_local std::function<bool()> poll_of_thread;
constinit thread_local Clock::rep next_poll = 0;  // ticks of the clock

Clock::rep ticks(Clock::time_point time) { return time.time_since_epoch().count(); }

}  // namespace

Interruptible::Interruptible(std::function<bool()> poll)
    : before_(std::exchange(poll_of_thread, std::move(poll))) {
  next_poll = ticks(Clock::now() + kPollPeriod);
}

Interruptible::~Interruptible() { poll_of_thread = std::move(before_); }

void check_interrupt() {
  if (!poll_of_thread || ticks(Clock::now()) < next_poll) return;
  next_poll = ticks(Clock::now() + kPollPeriod);
  if (poll_of_thread())
    throw Interrupted();  // NOLINT(bugprone-std-exception-baseclass): no handler of errors takes it
}

}  // namespace pe
