// What all operators of the software GPU share.
#pragma once

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/cuda/CUDAGeneratorImpl.h>
#include <c10/core/DeviceGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <functional>
#include <optional>
#include <string>
#include <vector>

namespace softgpu {

using at::Tensor;

// Below autograd and autocast, as kernels are.
struct BelowAutograd {
  at::AutoDispatchBelowADInplaceOrView below;
  c10::impl::ExcludeDispatchKeyGuard no_autocast{c10::autocast_dispatch_keyset};
};

// The same memory, as the CPU takes it. It does not keep the memory: the stream's order has to.
Tensor on_host(const Tensor& tensor);

// What the CUDA generator stands at, in or out of a capture; read where the closure runs.
struct Randomness {
  at::PhiloxCudaState state;
  at::Generator generator() const;
};
Randomness draw(const std::optional<at::Generator>& given);

// Enqueues a kernel that runs `body` on the current stream of the current device.
void submit(const std::string& name, std::function<void()> body);

// Makes operators that have kernels of their own here take the place of CUDA's; returns their names.
std::vector<std::string> install_own(torch::Library& library);

// Makes `made` a number that takes part in type promotion as `tensor` does.
void mark_like(const Tensor& made, const Tensor& tensor);

}  // namespace softgpu
