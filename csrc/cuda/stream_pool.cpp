#include "cuda/stream_pool.hpp"

#include <map>
#include <mutex>
#include <utility>
#include <vector>

namespace pe::cuda {
namespace {

struct Pool {
  std::mutex mutex;
  std::map<std::pair<int, bool>, std::vector<std::unique_ptr<Stream>>> free;  // by device and urgency
};

// Never destroyed: the driver may be unloaded first.
Pool& pool() {
  static Pool* const only = new Pool;
  return *only;
}

bool is_captured(const PrimaryContext& context, StreamHandle stream) {
  const CurrentContext current(context, kQuietly);
  int status = 0;
  const Result result =
      Driver::get().cuStreamGetCaptureInfo(stream, &status, nullptr, nullptr, nullptr, nullptr);
  return result != kSuccess || status != kCaptureNone;
}

}  // namespace

PooledStream::PooledStream(std::shared_ptr<const PrimaryContext> context, bool urgent)
    : context_(std::move(context)), urgent_(urgent) {
  {
    const std::lock_guard lock(pool().mutex);
    auto& free = pool().free[{context_->ordinal(), urgent_}];
    if (!free.empty()) {
      stream_ = std::move(free.back());
      free.pop_back();
      return;
    }
  }
  stream_ = std::make_unique<Stream>(context_, priority(*context_, urgent_));
}

PooledStream::~PooledStream() {
  if (!stream_ || spoilt_ || is_captured(*context_, stream_->handle())) return;
  const std::lock_guard lock(pool().mutex);
  pool().free[{context_->ordinal(), urgent_}].push_back(std::move(stream_));
}

std::size_t num_pooled_streams() {
  const std::lock_guard lock(pool().mutex);
  std::size_t count = 0;
  for (const auto& [of, streams] : pool().free) count += streams.size();
  return count;
}

void empty_stream_pool() {
  const std::lock_guard lock(pool().mutex);
  pool().free.clear();
}

}  // namespace pe::cuda
