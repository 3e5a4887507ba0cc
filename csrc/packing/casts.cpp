#include "packing/casts.hpp"

#include <algorithm>
#include <bit>
#include <limits>

#if defined(__x86_64__) && __GNUC__ >= 12 && !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define PE_VECTORIZED __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define PE_VECTORIZED
#endif
#define PE_INLINE [[gnu::always_inline]] inline

namespace pe {
namespace {

constexpr std::uint32_t kSign = 0x80000000u;
constexpr std::uint32_t kInfinity = 0x7f800000u;
constexpr std::int32_t kMagnitude32 = std::numeric_limits<std::int32_t>::max();  // all bits but the sign
constexpr std::int64_t kMagnitude64 = std::numeric_limits<std::int64_t>::max();
constexpr int kMantissa = 23;  // of float32
constexpr int kBias = 127;

// A format with fewer bits than float32. Magnitudes from `special` on are infinity or NaN.
struct Float16 {
  using Bits = std::uint16_t;
  static constexpr int exponent = 5, mantissa = 10;
  static constexpr std::uint32_t largest = 0x7c00, special = 0x7c00, nan = 0x7e00;
};
struct Bfloat16 {
  using Bits = std::uint16_t;
  static constexpr int exponent = 8, mantissa = 7;
  static constexpr std::uint32_t largest = 0x7f80, special = 0x7f80, nan = 0x7fc0;
};
struct E4m3fn {
  using Bits = std::uint8_t;
  static constexpr int exponent = 4, mantissa = 3;
  static constexpr std::uint32_t largest = 0x7e, special = 0x7f, nan = 0x7f;
};
struct E5m2 {
  using Bits = std::uint8_t;
  static constexpr int exponent = 5, mantissa = 2;
  static constexpr std::uint32_t largest = 0x7c, special = 0x7c, nan = 0x7f;
};

template <class F>
constexpr int kDropped = kMantissa - F::mantissa;
template <class F>
constexpr std::uint32_t kRebias = (kBias - ((1u << (F::exponent - 1)) - 1)) << kMantissa;

template <class F>
PE_INLINE typename F::Bits encoded(float value) {
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(value);
  const std::uint32_t magnitude = bits & ~kSign;
  constexpr std::uint32_t just_below_half = (1u << (kDropped<F> - 1)) - 1;
  const std::uint32_t odd = (magnitude >> kDropped<F>) % 2;
  if constexpr (kRebias<F> == 0) {  // the upper half of a float32
    const std::uint32_t rounded = (bits + just_below_half + odd) >> kDropped<F>;
    return static_cast<typename F::Bits>(magnitude > kInfinity ? F::nan : rounded);
  } else {
    std::uint32_t out = (magnitude - kRebias<F> + just_below_half + odd) >> kDropped<F>;
    // The last bit of the sum is worth the format's smallest value, so the addition rounds to a subnormal.
    constexpr std::uint32_t shifter = kRebias<F> + ((kDropped<F> + 1u) << kMantissa);
    const float sum = std::bit_cast<float>(magnitude) + std::bit_cast<float>(shifter);
    const std::uint32_t subnormal = std::bit_cast<std::uint32_t>(sum) - shifter;
    constexpr std::uint32_t least_normal = kRebias<F> + (1u << kMantissa);
    out = magnitude < least_normal ? subnormal : out;
    out = std::min(out, F::largest);
    out = magnitude > kInfinity ? F::nan : out;
    return static_cast<typename F::Bits>(out | (bits >> 31) << (F::exponent + F::mantissa));
  }
}

template <class F>
PE_INLINE float decoded(std::uint32_t bits) {
  constexpr std::uint32_t sign = 1u << (F::exponent + F::mantissa);
  const std::uint32_t magnitude = (bits & (sign - 1)) << kDropped<F>;
  std::uint32_t out = magnitude + kRebias<F>;
  if constexpr (kRebias<F> != 0) {
    constexpr std::uint32_t least_normal = kRebias<F> + (1u << kMantissa);
    const float subnormal = std::bit_cast<float>(magnitude + least_normal) - std::bit_cast<float>(least_normal);
    out = magnitude < (1u << kMantissa) ? std::bit_cast<std::uint32_t>(subnormal) : out;
    out = magnitude >= F::special << kDropped<F> ? magnitude | kInfinity : out;
  }
  return std::bit_cast<float>(out | (bits & sign) << (31 - F::exponent - F::mantissa));
}

#define PE_FORMAT(F)                                                                                     \
  PE_VECTORIZED void encode_row(const float* __restrict in, float scale, F::Bits* __restrict out,        \
                                std::size_t n, F) {                                                      \
    for (std::size_t i = 0; i < n; ++i) out[i] = encoded<F>(in[i] * scale);                              \
  }                                                                                                      \
  PE_VECTORIZED void decode_row(const F::Bits* __restrict in, float* __restrict out, std::size_t n, F) { \
    for (std::size_t i = 0; i < n; ++i) out[i] = decoded<F>(in[i]);                                      \
  }
PE_FORMAT(Float16)
PE_FORMAT(Bfloat16)
PE_FORMAT(E4m3fn)
PE_FORMAT(E5m2)

PE_VECTORIZED void multiply_row(const float* in, float scale, float* out, std::size_t n) {
  for (std::size_t i = 0; i < n; ++i) out[i] = in[i] * scale;
}
PE_VECTORIZED void multiply_row(const double* in, double scale, double* out, std::size_t n) {
  for (std::size_t i = 0; i < n; ++i) out[i] = in[i] * scale;
}

PE_VECTORIZED void widen(const float* __restrict in, float scale, double* __restrict out, std::size_t n) {
  for (std::size_t i = 0; i < n; ++i) out[i] = in[i] * scale;
}
PE_VECTORIZED void narrow(const double* __restrict in, double scale, float* __restrict out, std::size_t n) {
  for (std::size_t i = 0; i < n; ++i) out[i] = static_cast<float>(in[i] * scale);
}

PE_VECTORIZED void add_row(const float* __restrict in, float* __restrict out, std::size_t n) {
  for (std::size_t i = 0; i < n; ++i) out[i] += in[i];
}
PE_VECTORIZED void add_row(const double* __restrict in, double* __restrict out, std::size_t n) {
  for (std::size_t i = 0; i < n; ++i) out[i] += in[i];
}

// Magnitudes have the order of their bits, with NaN above all; the loop vectorizes for integers but not for
// floats.
PE_VECTORIZED std::int32_t largest_bits(std::int32_t most, const float* in, std::size_t n) {
  for (std::size_t i = 0; i < n; ++i) {
    most = std::max(most, std::bit_cast<std::int32_t>(in[i]) & kMagnitude32);
  }
  return most;
}
PE_VECTORIZED std::int64_t largest_bits(std::int64_t most, const double* in, std::size_t n) {
  for (std::size_t i = 0; i < n; ++i) {
    most = std::max(most, std::bit_cast<std::int64_t>(in[i]) & kMagnitude64);
  }
  return most;
}

// Calls `use` with the small format of `dtype`.
template <class Use>
void with_format(DType dtype, Use&& use) {
  if (dtype == kBfloat16) return use(Bfloat16{});
  if (dtype == kFloat16) return use(Float16{});
  if (dtype == kFloat8E4m3fn) return use(E4m3fn{});
  use(E5m2{});
}

constexpr std::size_t kPiece = 512;  // elements whose float32 values go through the stack

}  // namespace

const float* decode(DType from, const void* in, float* values, std::size_t n) {
  if (from == kFloat32) return static_cast<const float*>(in);
  if (from == kFloat64) {
    narrow(static_cast<const double*>(in), 1.0, values, n);
    return values;
  }
  with_format(from, [&]<class F>(F format) {
    decode_row(static_cast<const typename F::Bits*>(in), values, n, format);
  });
  return values;
}

const double* decode(DType from, const void* in, double* values, std::size_t n) {
  if (from == kFloat64) return static_cast<const double*>(in);
  float piece[kPiece];
  for (std::size_t at = 0; at < n; at += kPiece) {
    const std::size_t length = std::min(kPiece, n - at);
    const char* bytes = static_cast<const char*>(in) + at * from.size();
    widen(decode(from, bytes, piece, length), 1.0f, values + at, length);
  }
  return values;
}

void encode(const float* values, float scale, DType to, void* out, std::size_t n) {
  if (to == kFloat32) return multiply_row(values, scale, static_cast<float*>(out), n);
  if (to == kFloat64) return widen(values, scale, static_cast<double*>(out), n);
  with_format(to, [&]<class F>(F format) {
    encode_row(values, scale, static_cast<typename F::Bits*>(out), n, format);
  });
}

void encode(const double* values, double scale, DType to, void* out, std::size_t n) {
  if (to == kFloat64) return multiply_row(values, scale, static_cast<double*>(out), n);
  float piece[kPiece];
  for (std::size_t at = 0; at < n; at += kPiece) {
    const std::size_t length = std::min(kPiece, n - at);
    narrow(values + at, scale, piece, length);
    encode(piece, 1.0f, to, static_cast<char*>(out) + at * to.size(), length);
  }
}

void multiply(float* values, float scale, std::size_t n) { multiply_row(values, scale, values, n); }
void multiply(double* values, double scale, std::size_t n) { multiply_row(values, scale, values, n); }

void add(const float* values, float* sums, std::size_t n) { add_row(values, sums, n); }
void add(const double* values, double* sums, std::size_t n) { add_row(values, sums, n); }

float largest(float most, const float* values, std::size_t n) {
  return std::bit_cast<float>(largest_bits(std::bit_cast<std::int32_t>(most), values, n));
}
double largest(double most, const double* values, std::size_t n) {
  return std::bit_cast<double>(largest_bits(std::bit_cast<std::int64_t>(most), values, n));
}

}  // namespace pe
