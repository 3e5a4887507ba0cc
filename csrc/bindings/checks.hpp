// Checks the numbers by which Python names a part of an object of the core, which checks none itself.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

#include "plan/plan.hpp"

namespace pe {

// Returns `index`. Raises IndexError unless it is the number of one of `count` things called `what`.
template <class Index>
Index checked(const char* what, Index index, std::size_t count) {
  if (static_cast<std::int64_t>(index) >= 0 && static_cast<std::size_t>(index) < count) return index;
  throw pybind11::index_error(
      std::string(what) + " is " + std::to_string(index) +
      (count == 0 ? "; there are none" : "; give a number from 0 to " + std::to_string(count - 1)));
}

inline TaskId checked_task(const Plan& plan, TaskId task) { return checked("task", task, plan.size()); }

}  // namespace pe
