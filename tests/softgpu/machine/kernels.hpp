// What operators and NCCL need of the software GPU: closures as kernels.
#pragma once

#include <functional>

namespace softgpu {

// Enqueues a closure as a kernel of this stream, or captures it; `stream` is a handle of CUDA. Throws
// std::runtime_error. `waits`: it waits for other processes, so other kernels of a graph run meanwhile.
void submit_kernel(void* stream, const char* name, std::function<void()> body, bool waits = false);
bool is_capturing(void* stream);
void synchronize_stream(void* stream);

}  // namespace softgpu
