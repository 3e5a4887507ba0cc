// Packs many tensors into one buffer, and unpacks them, in one pass over the memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "packing/strided.hpp"

namespace pe {

// The place of one tensor in the buffer, where it is row-major, and the type it is sent as.
struct Slot {
  std::int64_t offset;  // bytes
  DType dtype, wire;
  std::vector<std::int64_t> shape;
};

struct Scale {
  double of_all = 1.0;
  const float* of_slot = nullptr;  // one factor per slot, multiplied with of_all
};

// What packing reports about floating-point tensors, before scaling; nothing where null.
struct Watch {
  float* largest = nullptr;           // one per slot, raised to its largest |value|; NaN is above all
  std::int32_t* nonfinite = nullptr;  // set to 1 if any value is infinite or NaN
};

// Computes in float32, or in float64 for float64 tensors; copies integers and booleans bit for bit. Throws
// PackingError before anything is written.
class Packer {
 public:
  static constexpr std::size_t kAlignment = 16;  // of the buffer and of every slot, bytes

  Packer(std::vector<Slot> slots, std::int64_t nbytes);

  const std::vector<Slot>& slots() const { return slots_; }
  std::int64_t nbytes() const { return nbytes_; }

  // Throws unless there is one tensor per slot, of the slot's shape and type.
  void check(std::span<const Strided> tensors) const;

  // For tensors that check() accepts: slot = tensor * scale. Leaves the bytes between slots unchanged.
  void pack(std::span<const Strided> tensors, const Strided& buffer, const Scale& scale,
            const Watch& watch) const;
  // tensor = slot * scale, or tensor += slot * scale.
  void unpack(std::span<const Strided> tensors, const Strided& buffer, const Scale& scale,
              bool accumulate) const;

 private:
  void check_buffer(const Strided& buffer) const;

  std::vector<Slot> slots_;
  std::int64_t nbytes_;
  std::int64_t traffic_ = 0;  // bytes that packing reads and writes
};

}  // namespace pe
