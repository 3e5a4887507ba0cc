#include "cuda/context.hpp"

namespace pe::cuda {

PrimaryContext::PrimaryContext(int ordinal) : driver_(Driver::get()), ordinal_(ordinal) {
  PE_CUDA(driver_, cuDeviceGet, &device_, ordinal);
  PE_CUDA(driver_, cuDevicePrimaryCtxRetain, &context_, device_);
}

PrimaryContext::~PrimaryContext() { driver_.cuDevicePrimaryCtxRelease(device_); }

void PrimaryContext::reach(const PrimaryContext& peer) const {
  int can = 0;
  PE_CUDA(driver_, cuDeviceCanAccessPeer, &can, device_, peer.device_);
  if (!can) return;
  const CurrentContext current(*this);
  const Result result = driver_.cuCtxEnablePeerAccess(peer.context_, 0);
  if (result != kPeerAccessAlreadyEnabled) driver_.check(result, "cuCtxEnablePeerAccess");
}

CurrentContext::CurrentContext(const PrimaryContext& context) : driver_(Driver::get()), pushed_(true) {
  PE_CUDA(driver_, cuCtxPushCurrent, context.handle());
}

CurrentContext::CurrentContext(const PrimaryContext& context, Quietly)
    : driver_(Driver::get()), pushed_(driver_.cuCtxPushCurrent(context.handle()) == kSuccess) {}

CurrentContext::~CurrentContext() {
  Context context = nullptr;
  if (pushed_) driver_.cuCtxPopCurrent(&context);
}

int priority(const PrimaryContext& context, bool urgent) {
  const CurrentContext current(context);
  int least = 0;
  int greatest = 0;
  PE_CUDA(Driver::get(), cuCtxGetStreamPriorityRange, &least, &greatest);
  return urgent ? greatest : least;
}

}  // namespace pe::cuda
