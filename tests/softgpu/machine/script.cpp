#include "script.hpp"

#include <cstdlib>
#include <string_view>

namespace softgpu {
namespace {

Machine& machine = Machine::get();
Script& script = Script::get();

void write_log(const char* name, std::initializer_list<Field> fields, Result result) {
  script.log += name;
  for (const Field& field : fields) {
    const long value = field.value == kGivenOut ? machine.given_out : field.value;
    script.log += std::string(" ") + field.name + "=" + std::to_string(value);
  }
  if (result != kSuccess) script.log += " result=" + std::to_string(result);
  script.log += '\n';
}

// Which waits a mutation leaves out: the nth of every m, of all the engine's or of the callers' streams.
struct Mutation {
  long n = -1, m = 1;
  bool of_callers = false;
  long seen = 0;
};

Mutation read_mutation() {
  Mutation found;
  const char* const waits = std::getenv("SOFTGPU_DROP_WAIT");
  const char* const joins = std::getenv("SOFTGPU_DROP_JOIN");
  found.of_callers = joins != nullptr;
  if (const char* const text = joins ? joins : waits) {
    char* slash = nullptr;
    found.n = std::strtol(text, &slash, 10);
    found.m = std::strtol(slash + 1, nullptr, 10);
  }
  return found;
}

}  // namespace

Script& Script::get() {
  static Script& script = *new Script;
  return script;
}

Result Script::scripted_failure(long call) const {
  if (call >= sticky_from) return sticky;
  const auto found = failures.find(call);
  return found == failures.end() ? kSuccess : found->second;
}

Result Script::scripted_failure(const char* runtime_function) {
  const auto found = of_runtime.find(std::string_view(runtime_function));
  if (found == of_runtime.end() || found->second.first-- > 0) return kSuccess;
  const Result code = found->second.second;
  of_runtime.erase(found);
  return code;
}

Result driver_call(const char* name, std::initializer_list<Field> fields,
                   const std::function<void(Guard&)>& body) {
  Guard lock(machine.mutex);
  Result result = script.scripted_failure(script.num_calls++);
  machine.given_out = 0;
  if (result == kSuccess) {
    try {
      body(lock);
    } catch (const Failed& failed) {
      result = failed.code;
    }
  }
  write_log(name, fields, result);
  return result;
}

Result& last_error() {
  static thread_local Result error = kSuccess;
  return error;
}

Result runtime_call(const char* name, const std::function<void(Guard&)>& body) {
  Guard lock(machine.mutex);
  Result result = script.scripted_failure(name);
  if (result == kSuccess) {
    try {
      body(lock);
    } catch (const Failed& failed) {
      result = failed.code;
    }
  }
  if (result != kSuccess && result != kNotReady) last_error() = result;
  return result;
}

bool drops_wait(const Stream& stream) {
  static Mutation mutation = read_mutation();
  if (mutation.n < 0 || (mutation.of_callers && stream.is_engines)) return false;
  return mutation.seen++ % mutation.m == mutation.n;
}

}  // namespace softgpu

using softgpu::machine;
using softgpu::script;

extern "C" {

// Back to the state after loading, with this number of devices. What is alive stays alive, and handles stay
// unique.
void standin_reset(int num_devices) {
  const std::lock_guard lock(machine.mutex);
  script = {};
  machine.num_devices = num_devices;
  machine.captures.clear();
  machine.fault = softgpu::kSuccess;
  machine.paused = false;
  machine.wake_all();
}

// Makes the driver's call with this number, counted from 0 since the last reset, fail with this code and do
// nothing else.
void standin_fail_at(long call, int code) {
  const std::lock_guard lock(machine.mutex);
  script.failures[call] = code;
}

// The same for all calls from this one on, as on a device that has faulted.
void standin_fail_sticky(long call, int code) {
  const std::lock_guard lock(machine.mutex);
  script.sticky_from = call;
  script.sticky = code;
}

// Makes a function of the runtime fail once with this code, after `well` calls that go well.
void standin_fail_runtime(const char* function, long well, int code) {
  const std::lock_guard lock(machine.mutex);
  script.of_runtime[function] = {well, code};
}

// Limits the memory of a device; 0 takes the limit away.
void standin_limit_memory(int device, std::size_t nbytes) {
  const std::lock_guard lock(machine.mutex);
  machine.allowed.erase(device);
  if (nbytes > 0) machine.allowed[device] = nbytes;
}

// Tasks begin later, by this measure in microseconds, as SOFTGPU_DELAY_US says from the start.
void standin_delay(long measure_us) {
  const std::lock_guard lock(machine.mutex);
  machine.delay_us = measure_us;
}

// Random delays and orders go on from this seed, as SOFTGPU_SEED says from the start.
void standin_seed(unsigned seed) {
  const std::lock_guard lock(machine.mutex);
  machine.random.seed(seed);
}

long standin_num_calls() {
  const std::lock_guard lock(machine.mutex);
  return script.num_calls;
}

// One line per call of the driver, "name key=value ...", with " result=CODE" if it failed. Valid until the next
// call of this function or of standin_reset.
const char* standin_log() {
  const std::lock_guard lock(machine.mutex);
  script.shown = script.log;
  return script.shown.c_str();
}

// Adds a line of the test to the log.
void standin_note(const char* text) {
  const std::lock_guard lock(machine.mutex);
  script.log += std::string(text) + "\n";
}

// How many of a kind are alive: stream, event, graph, graph_exec; or context, the retains that are not
// released. -1 for an unknown kind.
long standin_live(const char* kind) {
  const std::lock_guard lock(machine.mutex);
  long retains = 0;
  for (const auto& [_, count] : machine.retained) retains += count;
  const std::map<std::string_view, long> counts = {
      {"stream", machine.streams.size()},
      {"event", machine.events.size()},
      {"graph", machine.graphs.size()},
      {"graph_exec", machine.execs.size()},
      {"context", retains},
  };
  const auto found = counts.find(kind);
  return found == counts.end() ? -1 : found->second;
}

// Destroys all that is alive, and the calling thread's context stack, like the end of a process: cleans up
// after scripted failures to destroy.
void standin_discard() {
  const std::lock_guard lock(machine.mutex);
  for (const auto& [_, stream] : machine.streams) {
    stream->destroyed = true;
    stream->woken.notify_all();
  }
  machine.streams.clear();
  machine.events.clear();
  machine.graphs.clear();
  machine.execs.clear();
  machine.captures.clear();
  machine.retained.clear();
  machine.peers.clear();
  softgpu::context_stack().clear();
}

// A handle's number in the log.
int standin_number(void* handle) { return softgpu::number(handle); }

// Sets what cuDriverGetVersion returns; initially 13000.
void standin_set_version(int version) {
  const std::lock_guard lock(machine.mutex);
  script.version = version;
}

// Makes cuGetProcAddress not find this function, as in a driver that is too old.
void standin_hide(const char* function) {
  const std::lock_guard lock(machine.mutex);
  script.hidden.insert(function);
}

// While paused, streams begin no new work.
void standin_pause(int paused) {
  const std::lock_guard lock(machine.mutex);
  machine.paused = paused != 0;
  for (const auto& stream : machine.started) stream->woken.notify_all();
}

// Waits until all streams are idle; never returns while work is pending and streams are paused.
void standin_drain() {
  std::unique_lock lock(machine.mutex);
  machine.changed.wait(lock, [] { return machine.num_pending == 0; });
}

}  // extern "C"
