// A device's primary context, which torch uses too.
#pragma once

#include "cuda/driver.hpp"

namespace pe::cuda {

// Keeps the context alive. Throws NoDriver, or CudaError for a device that does not exist.
class PrimaryContext {
 public:
  explicit PrimaryContext(int ordinal);
  ~PrimaryContext();
  PrimaryContext(const PrimaryContext&) = delete;
  PrimaryContext& operator=(const PrimaryContext&) = delete;

  int ordinal() const { return ordinal_; }
  Context handle() const { return context_; }

  // Lets this device's copy engines access `peer`'s memory directly if the hardware can. Otherwise the driver
  // copies through host memory.
  void reach(const PrimaryContext& peer) const;

 private:
  const Driver& driver_;
  const int ordinal_;
  Device device_ = 0;
  Context context_ = nullptr;
};

// Makes a CurrentContext ignore errors, for destructors.
struct Quietly {};
inline constexpr Quietly kQuietly;

// Makes a context current for the calling thread, and restores the previous one at the end of the scope.
class CurrentContext {
 public:
  explicit CurrentContext(const PrimaryContext& context);
  CurrentContext(const PrimaryContext& context, Quietly);
  ~CurrentContext();
  CurrentContext(const CurrentContext&) = delete;
  CurrentContext& operator=(const CurrentContext&) = delete;

 private:
  const Driver& driver_;
  bool pushed_;
};

// The greatest (`urgent`) or the least priority of a device's streams and kernels.
int priority(const PrimaryContext& context, bool urgent);

}  // namespace pe::cuda
