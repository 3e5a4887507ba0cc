// Streams that are made once and lent again and again, for the life of the process.
#pragma once

#include <cstddef>
#include <memory>

#include "cuda/stream.hpp"

namespace pe::cuda {

// torch keeps memory, and cuBLAS its workspaces, for each stream that they have seen, and never asks whether it
// still exists. So streams are not destroyed, but given back, to be the next pipeline's; but for those that an
// error or a capture that never ended may have spoilt.
class PooledStream {
 public:
  // Takes one of the device, of its greatest or least priority, or makes it.
  PooledStream(std::shared_ptr<const PrimaryContext> context, bool urgent);
  ~PooledStream();
  PooledStream(PooledStream&&) noexcept = default;
  PooledStream& operator=(PooledStream&&) = delete;

  StreamHandle handle() const { return stream_->handle(); }

  // It is to be destroyed at the end.
  void spoil() { spoilt_ = true; }

 private:
  std::shared_ptr<const PrimaryContext> context_;
  bool urgent_;
  bool spoilt_ = false;
  std::unique_ptr<Stream> stream_;
};

// Those that nobody has.
std::size_t num_pooled_streams();
// Destroys them after all; for tests.
void empty_stream_pool();

}  // namespace pe::cuda
