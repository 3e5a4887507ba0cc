// Element types, numbered as DLPack numbers them and named as torch names them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <string_view>

namespace pe {

// Thrown for an argument that cannot be packed or unpacked, before anything is written.
struct PackingError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct DType {
  std::uint8_t code;
  std::uint8_t bits;

  std::size_t size() const { return bits / 8; }
  friend bool operator==(DType, DType) = default;
};

inline constexpr DType kInt32{0, 32};
inline constexpr DType kUint8{1, 8};
inline constexpr DType kFloat16{2, 16};
inline constexpr DType kFloat32{2, 32};
inline constexpr DType kFloat64{2, 64};
inline constexpr DType kBfloat16{4, 16};
inline constexpr DType kFloat8E4m3fn{10, 8};
inline constexpr DType kFloat8E5m2{12, 8};

DType dtype_of(std::string_view name);  // throws PackingError for what cannot be packed
std::string name_of(DType dtype);

// Whether it is a floating-point type, which is cast, scaled and accumulated. Other types are copied bit for
// bit.
bool is_arithmetic(DType dtype);

}  // namespace pe
