// Streams that are made once and lent again and again, for the life of the process.
#pragma once

#include <cstddef>
#include <memory>

#include "cuda/stream.hpp"

namespace pe::cuda {

// torch keeps memory, and cuBLAS its workspaces, for each stream that they have seen, and never asks whether it
// still exists. So streams are not destroyed, but given back, to be the next pipeline's.
class PooledStream {
 public:
  // Takes one of the device, of its greatest or least priority, or makes it.
  PooledStream(std::shared_ptr<const PrimaryContext> context, bool urgent);
  ~PooledStream();
  PooledStream(PooledStream&&) noexcept = default;
  PooledStream& operator=(PooledStream&&) = delete;

  StreamHandle handle() const { return stream_->handle(); }

 private:
  std::shared_ptr<const PrimaryContext> context_;
  bool urgent_;
  std::unique_ptr<Stream> stream_;
};

// Those that nobody has; for tests.
std::size_t num_pooled_streams();

}  // namespace pe::cuda
