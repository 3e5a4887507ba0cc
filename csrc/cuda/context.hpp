// A device's primary context: the one that torch uses, too.
#pragma once

#include "cuda/driver.hpp"

namespace pe::cuda {

// Keeps the context alive. Throws NoDriver, or CudaError for a device that is not there.
class PrimaryContext {
 public:
  explicit PrimaryContext(int ordinal);
  ~PrimaryContext();
  PrimaryContext(const PrimaryContext&) = delete;
  PrimaryContext& operator=(const PrimaryContext&) = delete;

  int ordinal() const { return ordinal_; }
  Context handle() const { return context_; }

  // Lets this device's copy engines reach `peer`'s memory directly where the hardware can; elsewhere copies go
  // through the host's, driven by the driver.
  void reach(const PrimaryContext& peer) const;

 private:
  const Driver& driver_;
  const int ordinal_;
  Device device_ = 0;
  Context context_ = nullptr;
};

// For a CurrentContext in a destructor: where a device has failed there is nobody to tell.
struct Quietly {};
inline constexpr Quietly kQuietly;

// Makes a context the calling thread's, and at the end of the scope that which was there before.
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

// The priority of a device's streams and kernels: the greatest there is, or the least.
int priority(const PrimaryContext& context, bool urgent);

}  // namespace pe::cuda
