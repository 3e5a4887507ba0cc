// The nodes of a graph while streams are captured into it.
#pragma once

#include <unordered_set>
#include <vector>

#include "cuda/driver.hpp"

namespace pe::cuda {

class CapturedNodes {
 public:
  // `stream` is being captured; throws CudaError if it is not.
  explicit CapturedNodes(StreamHandle stream);

  // The nodes that have come in since the last call.
  std::vector<NodeHandle> take_new();

  std::size_t count() const { return seen_.size(); }

 private:
  const Driver& driver_;
  GraphHandle graph_ = nullptr;
  std::unordered_set<NodeHandle> seen_;
};

// Kernels of higher priority get free multiprocessors first, in a graph instantiated with
// CUDA_GRAPH_INSTANTIATE_FLAG_USE_NODE_PRIORITY, as torch does. Leaves what is no kernel alone.
void set_priority(const std::vector<NodeHandle>& nodes, int priority);

}  // namespace pe::cuda
