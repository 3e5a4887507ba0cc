// The nodes of a graph during its capture.
#pragma once

#include <unordered_set>
#include <vector>

#include "cuda/driver.hpp"

namespace pe::cuda {

class CapturedNodes {
 public:
  // Throws CudaError unless `stream` is being captured.
  explicit CapturedNodes(StreamHandle stream);

  // The nodes captured since the last call.
  std::vector<NodeHandle> take_new();

  std::size_t count() const { return seen_.size(); }

 private:
  const Driver& driver_;
  GraphHandle graph_ = nullptr;
  std::unordered_set<NodeHandle> seen_;
};

// Sets the priority of the kernels among `nodes`: kernels of higher priority get free multiprocessors first, in
// a graph instantiated with CUDA_GRAPH_INSTANTIATE_FLAG_USE_NODE_PRIORITY, as torch does.
void set_priority(const std::vector<NodeHandle>& nodes, int priority);

}  // namespace pe::cuda
