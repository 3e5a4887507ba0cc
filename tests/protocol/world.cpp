#include "protocol/world.hpp"

#include <pthread.h>
#include <sched.h>
#include <setjmp.h>
#include <time.h>
#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <cstring>
#include <utility>

namespace world {

void (*taken)(int thread) = nullptr;
void (*given_back)(int thread) = nullptr;

namespace {

// No padding, which would tell states apart.
enum class Call : long { Start, Lock, Wait, TimedWait, Notify, NotifyAll, Join, Choose, Pause, Await, Ended };

constexpr const char* kNames[] = {"starts", "locks",   "waits",  "waits 50 ms", "notifies one", "notifies all",
                                  "joins",  "chooses", "pauses", "awaits",      "has ended"};
constexpr int kMostThreads = 12;
constexpr std::size_t kStack = 64 << 10;
constexpr std::size_t kHeap = 256 << 10;
constexpr std::size_t kFrame = 192;        // bytes of a frame at most
constexpr std::size_t kCleared = 2 << 10;  // below the frame of a thread that goes on
constexpr long kHour = 3600;
constexpr int kTimedOut = 1, kLate = 2, kSpurious = 3;  // outcomes of waits; 0: notified

// What a thread is about to do.
struct Pending {
  Call call = Call::Start;
  void* object = nullptr;           // mutex, condition, or what an await looks at
  pthread_mutex_t* lock = nullptr;  // of a wait
  long notified = 0;
  long count = 0;  // of outcomes, or the thread to join; 1: nobody else can tell when an await goes on
  timespec until{};
  bool (*open)(void*) = nullptr;
  const char* name = nullptr;
};

struct Thread {
  jmp_buf place;
  std::byte* low;  // what it needs of its stack begins here
  void* (*start)(void*);
  void* argument;
  Pending pending;
  int outcome;
  timespec once;  // what the next look at the clock shows
  bool looks_once;
};

// Everything that a thread in the world can change, at one address for good.
struct Memory {
  alignas(64) std::array<std::array<std::byte, kStack>, kMostThreads> stacks;
  alignas(64) std::array<std::byte, kHeap> heap;
};

struct Small {
  int count;  // of threads
  bool was_late;
  long seconds;  // of the clock
  std::size_t heap_end;
};

Memory memory;
std::array<Thread, kMostThreads> threads;
Small small;
int current = -1;  // the thread that runs; -1: the explorer runs
Rules rules;
std::function<void()> first_body;
std::span<std::byte> watched;
jmp_buf explorer;
std::string violated;

bool in_world() { return current >= 0; }

// The explorer's own memory must not come from the world's heap, although a thread in the world asks for it.
class Outside {
 public:
  Outside() : was_(std::exchange(current, -1)) {}
  ~Outside() { current = was_; }
  Outside(const Outside&) = delete;
  Outside& operator=(const Outside&) = delete;

 private:
  int was_;
};

// Precedes each block of the heap.
struct alignas(16) Block {
  std::size_t size;  // with this
  std::size_t used;
};

// The lowest free block of the size, so that the same contents have the same addresses.
void* take(std::size_t size) {
  size = ((size + 15) & ~std::size_t{15}) + sizeof(Block);
  std::size_t at = 0;
  for (; at < small.heap_end; at += reinterpret_cast<Block*>(&memory.heap[at])->size) {
    const auto* block = reinterpret_cast<Block*>(&memory.heap[at]);
    if (block->size == size && block->used == 0) break;
  }
  if (at == small.heap_end) small.heap_end += size;
  if (small.heap_end > kHeap) std::abort();
  auto* block = reinterpret_cast<Block*>(&memory.heap[at]);
  *block = {size, 1};
  return block + 1;
}

bool give_back(void* given) {
  const auto* byte = static_cast<std::byte*>(given);
  if (byte < memory.heap.data() || byte >= memory.heap.data() + kHeap) return false;
  Block* block = static_cast<Block*>(given) - 1;
  if (block->used == 0) std::abort();  // freed twice
  block->used = 0;
  std::memset(given, 0, block->size - sizeof(Block));
  return true;
}

// What the thread needs lies above this frame; a little below is this function's own.
[[gnu::noinline]] void leave(Thread& thread) {
  thread.low = static_cast<std::byte*>(__builtin_frame_address(0));
  if (_setjmp(thread.place) == 0) _longjmp(explorer, 1);
}

// What earlier calls have left below must not tell states apart.
[[gnu::noinline]] void clear_below(const std::byte* bottom) {
  std::byte* const here = static_cast<std::byte*>(__builtin_frame_address(0)) - kFrame;
  const std::size_t cleared = std::min(static_cast<std::size_t>(here - bottom), kCleared);
  std::memset(here - cleared, 0, cleared);
}

// Stops the running thread until the explorer lets it do `pending`; returns the outcome.
[[gnu::noinline]] int stop_before(const Pending& pending) {
  Thread& thread = threads[current];
  const char* const name = thread.pending.name;
  thread.pending = pending;
  thread.pending.name = name;
  __builtin_unwind_init();  // registers that calls preserve are on the stack now
  leave(thread);
  clear_below(memory.stacks[current].data());
  thread.pending.name = nullptr;
  return thread.outcome;
}

void run_thread(int number) {
  Thread& thread = threads[number];
  leave(thread);  // parked
  if (thread.start == nullptr) {
    first_body();
  } else {
    thread.start(thread.argument);
  }
  stop_before({.call = Call::Ended});
  std::abort();
}

// Threads that wait for their start, made once: a thread begins with the same registers whenever it begins.
struct Parked {
  jmp_buf place;
  std::byte* low;
  std::vector<std::byte> stack;  // from low - kFrame to its top
};
std::array<Parked, kMostThreads> parked;

std::byte* top_of(int thread) { return memory.stacks[thread].data() + kStack; }

void park(int number) {
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = memory.stacks[number].data();
  context.uc_stack.ss_size = kStack;
  context.uc_link = nullptr;
  makecontext(&context, reinterpret_cast<void (*)()>(run_thread), 1, number);
  if (_setjmp(explorer) == 0) setcontext(&context);
  const Thread& thread = threads[number];
  std::memcpy(&parked[number].place, &thread.place, sizeof(jmp_buf));
  parked[number].low = thread.low;
  parked[number].stack.assign(thread.low - kFrame, top_of(number));
}

int make_thread(void* (*start)(void*), void* argument) {
  const Outside outside;
  if (small.count == kMostThreads) std::abort();
  const int number = small.count++;
  Thread& thread = threads[number];
  thread = {};
  const Parked& from = parked[number];
  std::memcpy(&thread.place, &from.place, sizeof(jmp_buf));
  thread.low = from.low;
  std::memcpy(from.low - kFrame, from.stack.data(), from.stack.size());
  thread.start = start;
  thread.argument = argument;
  return number;
}

int& owner(const void* mutex) { return *static_cast<int*>(const_cast<void*>(mutex)); }  // 0: nobody

void lock(pthread_mutex_t* mutex) {
  stop_before({.call = Call::Lock, .object = mutex});
  owner(mutex) = current + 1;
  if (taken != nullptr) taken(current);
}

void unlock(pthread_mutex_t* mutex) {
  if (owner(mutex) != current + 1) fail("a thread gives back a mutex that it has not taken");
  owner(mutex) = 0;
  if (given_back != nullptr) given_back(current);
}

int wait(Call call, pthread_cond_t* condition, pthread_mutex_t* mutex, timespec until) {
  unlock(mutex);
  const int outcome = stop_before({.call = call, .object = condition, .lock = mutex, .until = until});
  owner(mutex) = current + 1;
  if (taken != nullptr) taken(current);
  if (outcome == kTimedOut || outcome == kLate) {
    threads[current].once = until;  // then the clock stands still again
    threads[current].looks_once = true;
    return ETIMEDOUT;
  }
  return 0;
}

bool waits_at(const Thread& thread, const void* condition) {
  const Pending& p = thread.pending;
  return (p.call == Call::Wait || p.call == Call::TimedWait) && p.object == condition && p.notified == 0;
}

std::vector<int> waiters_at(const void* condition) {
  std::vector<int> found;
  for (int t = 0; t < small.count; ++t) {
    if (waits_at(threads[t], condition)) found.push_back(t);
  }
  return found;
}

void notify(pthread_cond_t* condition) {
  const int outcome = stop_before({.call = Call::Notify, .object = condition});
  const Outside outside;
  const std::vector<int> waiters = waiters_at(condition);
  if (!waiters.empty()) threads[waiters[outcome]].pending.notified = 1;
}

void notify_all(pthread_cond_t* condition) {
  stop_before({.call = Call::NotifyAll, .object = condition});
  const Outside outside;
  for (const int waiter : waiters_at(condition)) threads[waiter].pending.notified = 1;
}

class Digest {
 public:
  void add(const void* data, std::size_t size) {
    const auto* bytes = static_cast<const std::byte*>(data);
    for (; size >= 8; bytes += 8, size -= 8) {
      std::uint64_t word;
      std::memcpy(&word, bytes, 8);
      mix(word);
    }
    std::uint64_t rest = size;
    std::memcpy(&rest, bytes, size);
    mix(rest);
  }
  State state() const { return {high_, low_}; }

 private:
  void mix(std::uint64_t word) {
    high_ = (high_ ^ word) * 0x9e3779b97f4a7c15u;
    high_ ^= high_ >> 29;
    low_ = (low_ + word) * 0xd6e8feb86659fd93u;
    low_ ^= low_ >> 32;
  }

  std::uint64_t high_ = 1, low_ = 2;
};

}  // namespace

std::string Option::text() const {
  const Pending& p = threads[thread].pending;
  std::string text = "thread " + std::to_string(thread) + " ";
  const bool waits = p.call == Call::Wait || p.call == Call::TimedWait;
  if (p.name != nullptr) {
    text += p.name;
  } else if (waits) {
    constexpr const char* kEnds[] = {"is awake", "has waited 50 ms", "has waited an hour", "wakes by itself"};
    text += kEnds[outcome];
  } else {
    text += kNames[static_cast<int>(p.call)];
  }
  return p.call == Call::Choose ? text + " " + std::to_string(outcome) : text;
}

void begin(const Rules& of_world, std::function<void()> body, std::span<std::byte> also_watched) {
  rules = of_world;
  first_body = std::move(body);
  watched = also_watched;
  if (parked[0].low == nullptr) {
    for (int number = 0; number < kMostThreads; ++number) park(number);
  }
  std::memset(&memory, 0, sizeof memory);
  small = {};
  violated.clear();
  make_thread(nullptr, nullptr);
}

namespace {

// Whether the call commutes with all that other threads can do before it: it goes first, alone, because the
// other orders lead to the same states.
bool goes_first(const Pending& p) {
  switch (p.call) {
    case Call::Start:
      return true;
    case Call::Join:
      return threads[p.count].pending.call == Call::Ended;
    case Call::Await:
      return p.count == 1 && p.open(p.object);
    case Call::Notify: {  // the one waiter can do nothing before
      const std::vector<int> waiters = waiters_at(p.object);
      return !rules.spurious && waiters.size() == 1 && threads[waiters[0]].pending.call == Call::Wait;
    }
    default:
      return false;
  }
}

}  // namespace

std::vector<Option> options() {
  for (int t = 0; t < small.count; ++t) {
    if (goes_first(threads[t].pending)) return {{t, 0, false}};
  }
  std::vector<Option> found;
  for (int t = 0; t < small.count; ++t) {
    const Pending& p = threads[t].pending;
    switch (p.call) {
      case Call::Ended:
      case Call::Join:
        break;
      case Call::Lock:
        if (owner(p.object) == 0) found.push_back({t, 0, false});
        break;
      case Call::Wait:
      case Call::TimedWait:
        if (owner(p.lock) != 0) break;
        if (p.notified != 0) {
          found.push_back({t, 0, false});
          break;
        }
        if (p.call == Call::TimedWait && rules.polls) found.push_back({t, kTimedOut, true});
        if (p.call == Call::TimedWait && rules.late && !small.was_late) found.push_back({t, kLate, true});
        if (rules.spurious) found.push_back({t, kSpurious, true});
        break;
      case Call::Notify: {
        const int waiters = static_cast<int>(waiters_at(p.object).size());
        for (int waiter = 0; waiter < std::max(1, waiters); ++waiter) found.push_back({t, waiter, false});
        break;
      }
      case Call::Choose:
        for (int outcome = 0; outcome < p.count; ++outcome) found.push_back({t, outcome, false});
        break;
      case Call::Await:
        if (p.open(p.object)) found.push_back({t, 0, false});
        break;
      case Call::Start:
      case Call::NotifyAll:
      case Call::Pause:
        found.push_back({t, 0, false});
        break;
    }
  }
  return found;
}

bool ended() {
  return std::all_of(threads.begin(), threads.begin() + small.count,
                     [](const Thread& thread) { return thread.pending.call == Call::Ended; });
}

std::string describe() {
  std::string text;
  for (int t = 0; t < small.count; ++t) {
    text += "  thread " + std::to_string(t) + " " + kNames[static_cast<int>(threads[t].pending.call)] + "\n";
  }
  return text;
}

State state() {
  Digest digest;
  for (std::size_t at = 0; at < small.heap_end;) {
    const auto& block = *reinterpret_cast<Block*>(&memory.heap[at]);
    if (block.used != 0) {
      digest.add(&at, sizeof at);
      digest.add(&block, block.size);
    }
    at += block.size;
  }
  for (int t = 0; t < small.count; ++t) {
    const Thread& thread = threads[t];
    const bool has_ended = thread.pending.call == Call::Ended;
    if (!has_ended) digest.add(thread.low, static_cast<std::size_t>(top_of(t) - thread.low));
    digest.add(&thread.pending, sizeof thread.pending);
    digest.add(&thread.looks_once, sizeof thread.looks_once);
  }
  const long rest[] = {small.count, small.seconds, small.was_late};
  digest.add(rest, sizeof rest);
  digest.add(watched.data(), watched.size());
  return digest.state();
}

namespace {

// Calls on each part of the world.
template <class Visit>
void for_each_part(Visit&& visit) {
  visit(std::as_writable_bytes(std::span(&small, 1)));
  visit(std::as_writable_bytes(std::span(threads.data(), small.count)));
  for (int t = 0; t < small.count; ++t) {
    if (threads[t].pending.call != Call::Ended) visit(std::span(threads[t].low - kFrame, top_of(t)));
  }
  visit(std::span(memory.heap.data(), small.heap_end));
  visit(watched);
}

}  // namespace

std::vector<std::byte> keep() {
  std::vector<std::byte> kept;
  for_each_part([&](std::span<std::byte> part) { kept.insert(kept.end(), part.begin(), part.end()); });
  return kept;
}

void put_back(std::span<const std::byte> kept) {
  for_each_part([&](std::span<std::byte> part) {
    std::memcpy(part.data(), kept.data(), part.size());
    kept = kept.subspan(part.size());
  });
}

void go(const Option& option) {
  Thread& thread = threads[option.thread];
  thread.outcome = option.outcome;
  if (option.outcome == kLate && thread.pending.call == Call::TimedWait) {
    small.seconds += kHour;
    small.was_late = true;
  }
  current = option.thread;
  if (_setjmp(explorer) == 0) _longjmp(thread.place, 1);
  current = -1;
  if (!violated.empty()) throw Violation(violated);
}

int me() { return current; }

int choose(int outcomes) { return stop_before({.call = Call::Choose, .count = outcomes}); }

void pause() { stop_before({.call = Call::Pause}); }

void await(bool (*open)(void*), void* of_what, bool is_local) {
  stop_before({.call = Call::Await, .object = of_what, .count = is_local, .open = open});
}

void name(const char* what) { threads[current].pending.name = what; }

void fail(const std::string& what) {
  {
    const Outside outside;
    violated = what;
  }
  stop_before({.call = Call::Ended});
  std::abort();
}

}  // namespace world

// What the core calls. Memory first: that of a thread in the world is the world's. The names of parameters are
// ours, those of functions glibc's.
// NOLINTBEGIN(readability-inconsistent-declaration-parameter-name,bugprone-reserved-identifier)

extern "C" {

void* __libc_malloc(std::size_t size);
void __libc_free(void* block);

void* malloc(std::size_t size) { return world::in_world() ? world::take(size) : __libc_malloc(size); }
void free(void* block) {
  if (block != nullptr && !world::give_back(block)) __libc_free(block);
}

int pthread_mutex_lock(pthread_mutex_t* mutex) noexcept {
  if (world::in_world()) world::lock(mutex);
  return 0;
}
int pthread_mutex_unlock(pthread_mutex_t* mutex) noexcept {
  if (world::in_world()) world::unlock(mutex);
  return 0;
}
int pthread_cond_wait(pthread_cond_t* condition, pthread_mutex_t* mutex) {
  return world::wait(world::Call::Wait, condition, mutex, {});
}
int pthread_cond_clockwait(pthread_cond_t* condition, pthread_mutex_t* mutex, clockid_t,
                           const timespec* until) {
  return world::wait(world::Call::TimedWait, condition, mutex, *until);
}
int pthread_cond_signal(pthread_cond_t* condition) noexcept {
  world::notify(condition);
  return 0;
}
int pthread_cond_broadcast(pthread_cond_t* condition) noexcept {
  world::notify_all(condition);
  return 0;
}
int pthread_cond_destroy(pthread_cond_t*) noexcept { return 0; }
int pthread_create(pthread_t* thread, const pthread_attr_t*, void* (*start)(void*), void* argument) noexcept {
  *thread = static_cast<pthread_t>(world::make_thread(start, argument)) + 1;
  return 0;
}
int pthread_join(pthread_t thread, void**) {
  world::stop_before({.call = world::Call::Join, .count = static_cast<long>(thread) - 1});
  return 0;
}
int pthread_detach(pthread_t) noexcept { return 0; }
int pthread_setname_np(pthread_t, const char*) noexcept { return 0; }
pthread_t pthread_self() noexcept { return static_cast<pthread_t>(world::current) + 1; }
int sched_yield() noexcept { return 0; }
int clock_gettime(clockid_t, timespec* time) noexcept {
  *time = {.tv_sec = world::small.seconds + 1, .tv_nsec = 0};
  if (!world::in_world()) return 0;
  world::Thread& thread = world::threads[world::current];
  if (thread.looks_once) {
    *time = thread.once;
    thread.looks_once = false;
  }
  return 0;
}
}
// NOLINTEND(readability-inconsistent-declaration-parameter-name,bugprone-reserved-identifier)
