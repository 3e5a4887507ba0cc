// Streams that are created once and reused for the life of the process.
#pragma once

#include <cstddef>
#include <memory>

#include "cuda/stream.hpp"

namespace pe::cuda {

// torch's caching allocator keeps memory, and cuBLAS a workspace, for each stream they have seen, even after it
// is destroyed. So streams are returned to a pool for the next pipeline instead. A stream that an error or an
// unfinished capture may have spoilt is destroyed.
class PooledStream {
 public:
  // Takes a stream of the device, of greatest (`urgent`) or least priority, from the pool, or creates one.
  PooledStream(std::shared_ptr<const PrimaryContext> context, bool urgent);
  ~PooledStream();
  PooledStream(PooledStream&&) noexcept = default;
  PooledStream& operator=(PooledStream&&) = delete;

  StreamHandle handle() const { return stream_->handle(); }

  // Destroys the stream at the end instead of returning it.
  void spoil() { spoilt_ = true; }

 private:
  std::shared_ptr<const PrimaryContext> context_;
  bool urgent_;
  bool spoilt_ = false;
  std::unique_ptr<Stream> stream_;
};

// Streams in the pool.
std::size_t num_pooled_streams();
// Destroys the streams in the pool; for tests.
void empty_stream_pool();

}  // namespace pe::cuda
