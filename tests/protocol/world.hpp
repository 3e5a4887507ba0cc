// A world of threads that run one at a time, each until its next call of pthread: what goes next is somebody's
// choice. world.cpp defines those functions of pthread that the core calls, so the core's code is as it always
// is. All memory that those threads use is the world's, so it can be kept and put back: a state is that memory.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

namespace world {

// One way to go on: a thread, and what its call does where that is open.
struct Option {
  int thread;
  int outcome;
  bool is_idle;  // a limit of time passes or a wait ends by itself: nothing that the program does
  std::string text() const;
};

struct State {
  std::uint64_t high, low;
  friend bool operator==(const State&, const State&) = default;
};

struct Rules {
  bool polls = false;     // a thread that waits for 50 ms may do so
  bool spurious = false;  // waits may end without a notification
  bool late = false;      // once, an hour passes while a thread waits for 50 ms
};

// Raised by the world or by what runs in it: a property does not hold.
struct Violation : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Begins a world whose first thread runs `body`. `also_watched`: memory outside that belongs to its state.
void begin(const Rules& of_world, std::function<void()> body, std::span<std::byte> also_watched);
// What can happen now. None: all threads have ended, or none can go on.
std::vector<Option> options();
bool ended();
std::string describe();         // where each thread is
State state();                  // of all memory, and of all threads
std::vector<std::byte> keep();  // the whole world
void put_back(std::span<const std::byte> kept);
void go(const Option& option);  // throws Violation

// For threads in the world.
int me();
int choose(int outcomes);  // any number below `outcomes`
void pause();              // others may go first
// Goes on once open(of_what). `is_local`: once open it stays so, and until its next call of pthread this thread
// neither writes what others read nor reads what they write.
void await(bool (*open)(void*), void* of_what, bool is_local);
void name(const char* what);                      // of the next choice or pause, for traces
[[noreturn]] void fail(const std::string& what);  // ends this world; what `go` throws
// Called with the thread that has taken or given back a mutex.
extern void (*taken)(int thread);
extern void (*given_back)(int thread);

}  // namespace world
