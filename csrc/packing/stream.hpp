// Copies with non-temporal stores: for more bytes than the caches hold, this saves reading lines that are
// overwritten.
#pragma once

#include <cstddef>
#include <cstring>

#ifdef __SSE2__
#include <emmintrin.h>
#endif

namespace pe {

// `to` is aligned to 16 bytes. Other threads may read the result after finish_streaming().
inline void stream(const std::byte* from, std::byte* to, std::size_t n) {
#ifdef __SSE2__
  constexpr std::size_t kLine = 64;
  for (; n >= kLine; n -= kLine, from += kLine, to += kLine) {
    const auto* in = reinterpret_cast<const __m128i*>(from);
    auto* out = reinterpret_cast<__m128i*>(to);
    const __m128i line[] = {_mm_loadu_si128(in), _mm_loadu_si128(in + 1), _mm_loadu_si128(in + 2),
                            _mm_loadu_si128(in + 3)};
    for (int i = 0; i < 4; ++i) _mm_stream_si128(out + i, line[i]);
  }
#endif
  std::memcpy(to, from, n);
}

inline void finish_streaming() {
#ifdef __SSE2__
  _mm_sfence();
#endif
}

}  // namespace pe
