#include "bindings/program.hpp"

#include "bindings/module.hpp"
#include "cuda/driver.hpp"

namespace pe {

const char* outcome_name(Outcome outcome) {
  switch (outcome) {
    case Outcome::Done:
      return "done";
    case Outcome::Failed:
      return "failed";
    case Outcome::Interrupted:
      return "interrupted";
    case Outcome::TimedOut:
      return "timed out";
    case Outcome::Closed:
      return "closed";
  }
  return "";
}

py::object python_error(const std::exception_ptr& error) {
  if (!error) return py::none();
  try {
    std::rethrow_exception(error);
  } catch (py::error_already_set& raised) {
    return raised.value();
  } catch (const cuda::CudaError& failed) {
    return error_class("DeviceError")(failed.what());
  } catch (const std::exception& failed) {
    return py::module_::import("builtins").attr("RuntimeError")(failed.what());
  }
}

}  // namespace pe
