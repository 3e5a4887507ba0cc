#include "packing/transfer.hpp"

#include <algorithm>
#include <cstring>
#include <functional>

#include "packing/casts.hpp"
#include "packing/stream.hpp"

namespace pe {
namespace {

constexpr std::int64_t kBlock = 2048;  // elements
constexpr std::size_t kLargestElement = 8;

// Like for_each_block, but faster for contiguous tensors.
template <class Visit>
void visit_blocks(const Strided& tensor, const Visit& visit) {
  if (!tensor.is_contiguous()) return for_each_block(tensor, kBlock, std::cref(visit));
  const auto element = static_cast<std::int64_t>(tensor.dtype.size());
  const std::int64_t size = tensor.size();
  for (std::int64_t first = 0; first < size; first += kBlock) {
    const std::int64_t columns = std::min(kBlock, size - first);
    visit(Block{tensor.data + first * element, first, 0, 1, columns, 0, element});
  }
}

// Calls visit(offset in the packed tensor, offset in the block, length), in elements, for each row of a block;
// once for all rows if they are adjacent in the packed tensor.
template <class Visit>
void visit_rows(const Block& block, const Visit& visit) {
  if (block.rows == 1 || block.pitch == block.columns) return visit(block.first, 0, block.size());
  for (std::int64_t row = 0; row < block.rows; ++row) {
    visit(block.first + row * block.pitch, row * block.columns, block.columns);
  }
}

}  // namespace

void copy_to(std::byte* packed, const Strided& tensor, bool streams) {
  const std::size_t element = tensor.dtype.size();
  if (tensor.is_contiguous()) {
    const std::size_t bytes = tensor.size() * element;
    if (streams) return stream(tensor.data, packed, bytes);
    std::memcpy(packed, tensor.data, bytes);
    return;
  }
  std::byte gathered[kBlock * kLargestElement];
  visit_blocks(tensor, [&](const Block& block) {
    gather(block, element, gathered);
    visit_rows(block, [&](std::int64_t to, std::int64_t from, std::int64_t n) {
      std::memcpy(packed + to * element, gathered + from * element, n * element);
    });
  });
}

void copy_from(const std::byte* packed, const Strided& tensor) {
  const std::size_t element = tensor.dtype.size();
  if (tensor.is_contiguous()) {
    std::memcpy(tensor.data, packed, tensor.size() * element);
    return;
  }
  std::byte gathered[kBlock * kLargestElement];
  visit_blocks(tensor, [&](const Block& block) {
    visit_rows(block, [&](std::int64_t from, std::int64_t to, std::int64_t n) {
      std::memcpy(gathered + to * element, packed + from * element, n * element);
    });
    scatter(gathered, element, block);
  });
}

template <class Real>
Real cast_to(std::byte* packed, DType wire, const Strided& tensor, Real scale, bool watches, bool streams) {
  alignas(64) std::byte gathered[kBlock * sizeof(Real)];
  alignas(64) std::byte cast[kBlock * sizeof(double)];
  alignas(64) Real decoded[kBlock];
  const bool plain = tensor.dtype == wire && scale == Real{1};  // a NaN then keeps its bits
  const bool contiguous = tensor.is_contiguous();
  Real most = 0;
  visit_blocks(tensor, [&](const Block& block) {
    const std::byte* in = block.data;
    if (!contiguous) {
      gather(block, tensor.dtype.size(), gathered);
      in = gathered;
    }
    const Real* values = decode(tensor.dtype, in, decoded, block.size());
    if (watches) most = largest(most, values, block.size());
    visit_rows(block, [&](std::int64_t to, std::int64_t from, std::int64_t n) {
      std::byte* const out = packed + to * wire.size();
      if (plain) {
        std::memcpy(out, in + from * wire.size(), n * wire.size());
      } else if (streams && contiguous) {
        encode(values + from, scale, wire, cast, n);
        stream(cast, out, n * wire.size());
      } else {
        encode(values + from, scale, wire, out, n);
      }
    });
  });
  return most;
}

template <class Real>
void cast_from(const std::byte* packed, DType wire, const Strided& tensor, Real scale, bool accumulates) {
  alignas(64) std::byte gathered[kBlock * sizeof(Real)];
  alignas(64) Real decoded[kBlock], before[kBlock];
  const std::size_t element = tensor.dtype.size();
  const bool contiguous = tensor.is_contiguous();
  visit_blocks(tensor, [&](const Block& block) {
    const std::int64_t n = block.size();
    visit_rows(block, [&](std::int64_t from, std::int64_t to, std::int64_t length) {
      const Real* values = decode(wire, packed + from * wire.size(), decoded + to, length);
      if (values != decoded + to) std::memcpy(decoded + to, values, length * sizeof(Real));
    });
    std::byte* const out = contiguous ? block.data : gathered;
    if (!accumulates) {
      encode(decoded, scale, tensor.dtype, out, n);
    } else {
      if (!contiguous) gather(block, element, gathered);
      if (scale != Real{1}) multiply(decoded, scale, n);
      // Where the tensor's values are Reals, `sums` is the tensor itself.
      Real* const sums = const_cast<Real*>(decode(tensor.dtype, out, before, n));
      add(decoded, sums, n);
      if (sums == before) encode(sums, Real{1}, tensor.dtype, out, n);
    }
    if (!contiguous) scatter(gathered, element, block);
  });
}

template float cast_to(std::byte*, DType, const Strided&, float, bool, bool);
template double cast_to(std::byte*, DType, const Strided&, double, bool, bool);
template void cast_from(const std::byte*, DType, const Strided&, float, bool);
template void cast_from(const std::byte*, DType, const Strided&, double, bool);

}  // namespace pe
