#include "packing/pack.hpp"

#include <algorithm>
#include <cmath>
#include <string>
#include <utility>

#include "packing/stream.hpp"
#include "packing/transfer.hpp"

namespace pe {
namespace {

// From this many bytes on, read and written, a message no longer stays in the caches until it is read again.
constexpr std::int64_t kStreamed = 24 << 20;

bool is_aligned(const std::byte* address, std::size_t bytes) {
  return reinterpret_cast<std::uintptr_t>(address) % bytes == 0;
}

template <class Real>
Real scale_of(const Scale& scale, std::size_t slot) {
  const Real all = static_cast<Real>(scale.of_all);
  return scale.of_slot == nullptr ? all : all * static_cast<Real>(scale.of_slot[slot]);
}

bool is_copied(const Slot& slot, const Scale& scale, std::size_t i) {
  if (!is_arithmetic(slot.dtype)) return true;
  if (slot.dtype != slot.wire) return false;
  return slot.dtype == kFloat64 ? scale_of<double>(scale, i) == 1.0 : scale_of<float>(scale, i) == 1.0f;
}

// NaN is above all numbers.
void raise(float& largest, float to) {
  if (std::isnan(to) || to > largest) largest = to;
}

}  // namespace

Packer::Packer(std::vector<Slot> slots, std::int64_t nbytes) : slots_(std::move(slots)), nbytes_(nbytes) {
  for (std::size_t i = 0; i < slots_.size(); ++i) {
    const Slot& slot = slots_[i];
    const std::string named = "slot " + std::to_string(i);
    if (slot.wire != slot.dtype && !(is_arithmetic(slot.dtype) && is_arithmetic(slot.wire))) {
      throw PackingError(named + " would cast " + name_of(slot.dtype) + " to " + name_of(slot.wire) +
                         "; only floating-point types are cast");
    }
    const std::int64_t bytes = nbytes_of(slot.shape, slot.wire);
    traffic_ += bytes + nbytes_of(slot.shape, slot.dtype);
    if (slot.offset < 0 || slot.offset % static_cast<std::int64_t>(kAlignment) != 0 ||
        bytes > nbytes_ - slot.offset) {
      throw PackingError(named + ", " + std::to_string(bytes) + " bytes at " + std::to_string(slot.offset) +
                         ", must begin at a multiple of " + std::to_string(kAlignment) +
                         " and end within the buffer's " + std::to_string(nbytes_));
    }
  }
}

void Packer::check(std::span<const Strided> tensors) const {
  if (tensors.size() != slots_.size()) {
    throw PackingError(std::to_string(tensors.size()) + " tensors; the layout has " +
                       std::to_string(slots_.size()) + " slots");
  }
  for (std::size_t i = 0; i < slots_.size(); ++i) {
    const Strided& tensor = tensors[i];
    const Slot& slot = slots_[i];
    if (tensor.dtype != slot.dtype || !std::ranges::equal(tensor.shape, slot.shape)) {
      throw PackingError("tensor " + std::to_string(i) + " is " + describe(tensor.dtype, tensor.shape) +
                         "; its slot is for " + describe(slot.dtype, slot.shape));
    }
    if (tensor.size() == 0) continue;
    if (tensor.data == nullptr) throw PackingError("tensor " + std::to_string(i) + " has no memory");
    if (is_arithmetic(tensor.dtype) && !is_aligned(tensor.data, tensor.dtype.size())) {
      throw PackingError("tensor " + std::to_string(i) + " is not aligned to its " + name_of(tensor.dtype) +
                         " elements; give a copy");
    }
  }
}

void Packer::check_buffer(const Strided& buffer) const {
  if (buffer.dtype != kUint8 || buffer.shape.size() != 1 || !buffer.is_contiguous()) {
    throw PackingError("the buffer is " + describe(buffer.dtype, buffer.shape) + "; give contiguous uint8[" +
                       std::to_string(nbytes_) + "]");
  }
  if (buffer.size() < nbytes_) {
    throw PackingError("the buffer has " + std::to_string(buffer.size()) + " bytes; the layout needs " +
                       std::to_string(nbytes_));
  }
  if (!is_aligned(buffer.data, kAlignment)) {
    throw PackingError("the buffer's address is not a multiple of " + std::to_string(kAlignment) +
                       "; give one torch allocated");
  }
}

void Packer::pack(std::span<const Strided> tensors, const Strided& buffer, const Scale& scale,
                  const Watch& watch) const {
  check_buffer(buffer);
  const bool watches = watch.largest != nullptr || watch.nonfinite != nullptr;
  const bool streams = traffic_ >= kStreamed;
  for (std::size_t i = 0; i < slots_.size(); ++i) {
    const Slot& slot = slots_[i];
    std::byte* const packed = buffer.data + slot.offset;
    const bool watched = watches && is_arithmetic(slot.dtype);
    double most = 0.0;
    if (tensors[i].size() == 0) continue;  // may have no memory
    if (is_copied(slot, scale, i) && !watched) {
      copy_to(packed, tensors[i], streams);
    } else if (slot.dtype == kFloat64) {
      most = cast_to(packed, slot.wire, tensors[i], scale_of<double>(scale, i), watched, streams);
    } else {
      most = cast_to(packed, slot.wire, tensors[i], scale_of<float>(scale, i), watched, streams);
    }
    if (!watched) continue;
    if (watch.largest != nullptr) raise(watch.largest[i], static_cast<float>(most));
    if (watch.nonfinite != nullptr && !std::isfinite(most)) *watch.nonfinite = 1;
  }
  if (streams) finish_streaming();
}

void Packer::unpack(std::span<const Strided> tensors, const Strided& buffer, const Scale& scale,
                    bool accumulate) const {
  check_buffer(buffer);
  for (std::size_t i = 0; i < slots_.size(); ++i) {
    if (accumulate && !is_arithmetic(slots_[i].dtype)) {
      throw PackingError("tensor " + std::to_string(i) + " is " + describe(slots_[i].dtype, slots_[i].shape) +
                         "; only floating-point types accumulate");
    }
    if (tensors[i].is_expanded()) {
      throw PackingError("tensor " + std::to_string(i) +
                         " is expanded, so that elements share memory; unpack into a clone");
    }
  }
  for (std::size_t i = 0; i < slots_.size(); ++i) {
    const Slot& slot = slots_[i];
    const std::byte* const packed = buffer.data + slot.offset;
    if (tensors[i].size() == 0) continue;
    if (!accumulate && is_copied(slot, scale, i)) {
      copy_from(packed, tensors[i]);
    } else if (slot.dtype == kFloat64) {
      cast_from(packed, slot.wire, tensors[i], scale_of<double>(scale, i), accumulate);
    } else {
      cast_from(packed, slot.wire, tensors[i], scale_of<float>(scale, i), accumulate);
    }
  }
}

}  // namespace pe
