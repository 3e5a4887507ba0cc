// Threads that are still at work when the process ends.
#pragma once

namespace pe {

// Says that a thread may be inside torch whenever the process ends, until it has ended itself. exit() destroys
// what libraries hold, which such a thread may use: from now on, and while there is one, exit() ends the
// process at once, with its own status, once Python has run its handlers and flushed its files. Handlers that C
// code registered before are then left out.
void thread_may_not_end();
void thread_has_ended();

// Never returns.
[[noreturn]] void sleep_until_process_ends();

}  // namespace pe
