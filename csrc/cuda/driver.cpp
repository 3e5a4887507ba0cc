#include "cuda/driver.hpp"

#include <dlfcn.h>

#include <cstdlib>
#include <memory>
#include <mutex>

namespace pe::cuda {
namespace {

std::string version_text(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

std::string too_old(const std::string& path, const std::string& found) {
  return path + " " + found + "; pipeline_ext needs one for CUDA " + version_text(kOldestVersion) +
         " or newer (driver 525 or newer): update the NVIDIA driver, or run on the CPU";
}

}  // namespace

Driver::Driver(const std::string& path) {
  void* const library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    const char* const reason = dlerror();
    throw NoDriver("there is no CUDA driver: " + std::string(reason ? reason : path));
  }
  // Version 2 of the function came with CUDA 12.0.
  const auto look_up = reinterpret_cast<GetProcAddress>(dlsym(library, "cuGetProcAddress_v2"));
  if (look_up == nullptr) {
    throw NoDriver(too_old(path, "is a driver older than CUDA " + version_text(kOldestVersion)));
  }
  const auto find = [&](const char* name, int version, auto& function) {
    void* found = nullptr;
    int status = 0;
    if (look_up(name, &found, version, 0, &status) != kSuccess || found == nullptr) {
      throw NoDriver(too_old(path, std::string("has no ") + name));
    }
    function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(found);
  };
#define PE_CUDA_FIND(name, version, parameters) find(#name, version, name);
  PE_CUDA_FUNCTIONS(PE_CUDA_FIND)
#undef PE_CUDA_FIND
  int version = 0;
  PE_CUDA(*this, cuDriverGetVersion, &version);
  if (version < kOldestVersion) {
    throw NoDriver(too_old(path, "is a driver for CUDA " + version_text(version)));
  }
  PE_CUDA(*this, cuInit, 0);
  PE_CUDA(*this, cuDeviceGetCount, &num_devices);
}

const Driver& Driver::get() {
  static std::mutex mutex;
  static std::unique_ptr<const Driver> opened;  // never closed: torch uses the driver until the process ends
  const std::lock_guard lock(mutex);
  if (!opened) {
    const char* const given = std::getenv("PIPELINE_EXT_LIBCUDA");
    const std::string path = given && *given ? given : "libcuda.so.1";
    try {
      opened.reset(new Driver(path));
    } catch (const CudaError& error) {
      throw NoDriver(path + " cannot be used: " + error.what());
    }
  }
  return *opened;
}

void Driver::fail(Result result, const char* function) const {
  const char* name = nullptr;
  const char* text = nullptr;
  if (cuGetErrorName(result, &name) != kSuccess || name == nullptr) name = "an unknown error";
  if (cuGetErrorString(result, &text) != kSuccess || text == nullptr) text = "it has no text";
  throw CudaError(std::string(function) + " failed: " + name + " (" + std::to_string(result) + "), " + text,
                  result);
}

}  // namespace pe::cuda
