// What tests make the driver do, and what they see of it: scripted failures, and the log of its calls.
#pragma once

#include <climits>
#include <initializer_list>
#include <map>
#include <set>
#include <string>

#include "machine.hpp"

namespace softgpu {

// Guarded by the machine's mutex.
struct Script {
  static Script& get();  // never destroyed, like the machine

  long num_calls = 0;
  std::map<long, Result> failures;
  long sticky_from = LONG_MAX;
  Result sticky = kSuccess;
  std::map<std::string, std::pair<long, Result>, std::less<>> of_runtime;  // calls that go well before, error
  int version = 13000;
  std::set<std::string, std::less<>> hidden;
  std::string log;
  std::string shown;  // what standin_log returned

  Result scripted_failure(long call) const;
  Result scripted_failure(const char* runtime_function);
};

struct Field {
  const char* name;
  long value;
};
inline constexpr long kGivenOut = LONG_MIN;  // stands for the number of the handle that the call returns

// A call to the driver: counts it, runs the body unless a failure is scripted, and logs it.
Result driver_call(const char* name, std::initializer_list<Field> fields,
                   const std::function<void(Guard&)>& body);

// A call to the runtime, which is not logged: runs the body unless a failure is scripted. An error stays this
// thread's last one.
Result runtime_call(const char* name, const std::function<void(Guard&)>& body);
Result& last_error();

// Whether the waits of the engine's streams are to be left out in part; see standin_drop_waits.
bool drops_wait(const Stream& stream);

}  // namespace softgpu
