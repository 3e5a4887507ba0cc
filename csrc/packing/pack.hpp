// Many tensors to and from one buffer, each at its place and in its type, in one pass over the memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "packing/strided.hpp"

namespace pe {

// Where one tensor lies in the buffer, row-major, and the type it travels as.
struct Slot {
  std::int64_t offset;  // bytes
  DType dtype, wire;
  std::vector<std::int64_t> shape;
};

struct Scale {
  double of_all = 1.0;
  const float* of_slot = nullptr;  // one for each slot, which multiplies the other

  bool is_one() const { return of_all == 1.0 && of_slot == nullptr; }
};

// What packing tells about the tensors, before scaling. Not told where null.
struct Watch {
  float* largest = nullptr;           // |value|, one for each slot: NaN if any is, 0 where not arithmetic
  std::int32_t* nonfinite = nullptr;  // set to 1 if any value is infinite or NaN
};

// Arithmetic is in float32, or in float64 for a tensor of that type; other types than the floating-point ones
// are copied bit for bit. Throws PackingError before anything is written.
class Packer {
 public:
  static constexpr std::size_t kAlignment = 16;  // of the buffer and of every slot, bytes

  Packer(std::vector<Slot> slots, std::int64_t nbytes);

  const std::vector<Slot>& slots() const { return slots_; }
  std::int64_t nbytes() const { return nbytes_; }

  // slot = tensor * scale; what lies between the slots is left as it is.
  void pack(std::span<const Strided> tensors, const Strided& buffer, const Scale& scale,
            const Watch& watch) const;
  // tensor = slot * scale, or tensor += slot * scale.
  void unpack(std::span<const Strided> tensors, const Strided& buffer, const Scale& scale,
              bool accumulate) const;

 private:
  void check(std::span<const Strided> tensors, const Strided& buffer) const;
  void check_arithmetic(const char* done) const;

  std::vector<Slot> slots_;
  std::int64_t nbytes_;
};

}  // namespace pe
