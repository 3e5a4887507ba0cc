// NVIDIA's driver, opened on first use, so that the package also works on a machine without one.
#pragma once

#include <stdexcept>
#include <string>

#include "cuda/abi.hpp"

namespace pe::cuda {

// There is no usable driver. The text says why, and what to do.
struct NoDriver : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// A call to the driver failed.
struct CudaError : std::runtime_error {
  CudaError(const std::string& text, Result result) : std::runtime_error(text), code(result) {}
  Result code;

  // Whether a capture forbade the call, which harms no device.
  bool of_capture() const { return code >= kFirstCaptureError && code <= kLastCaptureError; }
};

class Driver {
 public:
  // Opens the library that PIPELINE_EXT_LIBCUDA names, or libcuda.so.1, on the first call, and keeps it open.
  // Throws NoDriver, also on later calls, if there is no driver, if it is too old, or if it has no device.
  static const Driver& get();

#define PE_CUDA_MEMBER(name, version, parameters) Result(*name) parameters = nullptr;
  PE_CUDA_FUNCTIONS(PE_CUDA_MEMBER)
#undef PE_CUDA_MEMBER

  int num_devices = 0;

  // Throws CudaError, as in "cuEventRecord failed: CUDA_ERROR_..., 700: ...".
  void check(Result result, const char* function) const {
    if (result != kSuccess) fail(result, function);
  }

 private:
  explicit Driver(const std::string& path);
  [[noreturn]] void fail(Result result, const char* function) const;
};

// Calls a function of the driver by its name and throws CudaError if it fails.
#define PE_CUDA(driver, name, ...) (driver).check((driver).name(__VA_ARGS__), #name)

}  // namespace pe::cuda
