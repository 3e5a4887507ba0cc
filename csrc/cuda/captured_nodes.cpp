#include "cuda/captured_nodes.hpp"

namespace pe::cuda {

CapturedNodes::CapturedNodes(StreamHandle stream) : driver_(Driver::get()) {
  int status = 0;
  PE_CUDA(driver_, cuStreamGetCaptureInfo, stream, &status, nullptr, &graph_, nullptr, nullptr);
  if (status != kCaptureActive) {
    throw CudaError("cuStreamGetCaptureInfo: the stream is not being captured", kSuccess);
  }
}

std::vector<NodeHandle> CapturedNodes::take_new() {
  std::size_t count = 0;
  PE_CUDA(driver_, cuGraphGetNodes, graph_, nullptr, &count);
  std::vector<NodeHandle> nodes(count);
  if (count > 0) PE_CUDA(driver_, cuGraphGetNodes, graph_, nodes.data(), &count);
  nodes.resize(count);
  std::erase_if(nodes, [&](NodeHandle node) { return !seen_.insert(node).second; });
  return nodes;
}

void set_priority(const std::vector<NodeHandle>& nodes, int priority) {
  const Driver& driver = Driver::get();
  AttributeValue value{};
  value.priority = priority;
  for (const NodeHandle node : nodes) {
    int type = 0;
    PE_CUDA(driver, cuGraphNodeGetType, node, &type);
    if (type == kNodeTypeKernel) {
      PE_CUDA(driver, cuGraphKernelNodeSetAttribute, node, kAttributePriority, &value);
    }
  }
}

}  // namespace pe::cuda
