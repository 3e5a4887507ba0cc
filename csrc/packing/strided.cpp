#include "packing/strided.hpp"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <vector>

namespace pe {
namespace {

struct Dimension {
  std::int64_t size;
  std::int64_t stride;  // in memory, bytes
  std::int64_t pitch;   // in row-major order, elements
};

// The tensor's dimensions, innermost first, without those of size 1, with adjacent ones joined where memory
// allows.
std::vector<Dimension> joined_dimensions(const Strided& tensor) {
  const auto element = static_cast<std::int64_t>(tensor.dtype.size());
  std::vector<Dimension> outward;
  std::int64_t pitch = 1;
  for (std::size_t d = tensor.shape.size(); d-- > 0;) {
    const Dimension one{tensor.shape[d], tensor.strides[d] * element, pitch};
    pitch *= one.size;
    if (one.size == 1) continue;
    if (!outward.empty() && one.stride == outward.back().stride * outward.back().size) {
      outward.back().size *= one.size;
    } else {
      outward.push_back(one);
    }
  }
  if (outward.empty()) outward.push_back({1, element, 1});
  return outward;
}

// Calls use(address of an element, its number in the block), in memory order.
template <class Use>
void visit_elements(const Block& block, const Use& use) {
  if (std::abs(block.row_stride) < std::abs(block.column_stride)) {
    for (std::int64_t column = 0; column < block.columns; ++column) {
      std::byte* const at = block.data + column * block.column_stride;
      for (std::int64_t row = 0; row < block.rows; ++row) {
        use(at + row * block.row_stride, row * block.columns + column);
      }
    }
  } else {
    for (std::int64_t row = 0; row < block.rows; ++row) {
      std::byte* const at = block.data + row * block.row_stride;
      for (std::int64_t column = 0; column < block.columns; ++column) {
        use(at + column * block.column_stride, row * block.columns + column);
      }
    }
  }
}

template <class Bits>
void gather_as(const Block& block, std::byte* out) {
  visit_elements(block, [out](const std::byte* at, std::int64_t number) {
    std::memcpy(out + number * sizeof(Bits), at, sizeof(Bits));
  });
}

template <class Bits>
void scatter_as(const std::byte* in, const Block& block) {
  visit_elements(block, [in](std::byte* at, std::int64_t number) {
    std::memcpy(at, in + number * sizeof(Bits), sizeof(Bits));
  });
}

}  // namespace

std::int64_t nbytes_of(std::span<const std::int64_t> shape, DType dtype) {
  constexpr std::int64_t kMost = std::int64_t{1} << 60;
  std::int64_t nbytes = static_cast<std::int64_t>(dtype.size());
  for (const std::int64_t size : shape) {
    if (size < 0 || (size > 0 && nbytes > kMost / size)) {
      throw PackingError("a tensor of " + describe(dtype, shape) + " does not fit in memory");
    }
    nbytes *= size;
  }
  return nbytes;
}

std::string describe(DType dtype, std::span<const std::int64_t> shape) {
  std::string text = name_of(dtype) + "[";
  for (std::size_t d = 0; d < shape.size(); ++d) {
    if (d > 0) text += ", ";
    text += std::to_string(shape[d]);
  }
  return text + "]";
}

std::int64_t Strided::size() const {
  std::int64_t product = 1;
  for (const std::int64_t length : shape) product *= length;
  return product;
}

bool Strided::is_contiguous() const {
  std::int64_t stride = 1;
  for (std::size_t d = shape.size(); d-- > 0;) {
    if (shape[d] != 1 && strides[d] != stride) return false;
    stride *= shape[d];
  }
  return true;
}

bool Strided::is_expanded() const {
  for (std::size_t d = 0; d < shape.size(); ++d) {
    if (shape[d] > 1 && strides[d] == 0) return size() > 0;
  }
  return false;
}

void for_each_block(const Strided& tensor, std::int64_t limit, const std::function<void(const Block&)>& visit) {
  if (tensor.size() == 0) return;
  std::vector<Dimension> outward = joined_dimensions(tensor);
  // Columns run along the last dimension, rows along the dimension with the smallest stride: then whole cache
  // lines are used, also for a transposed tensor.
  const Dimension columns = outward.front();
  outward.erase(outward.begin());
  Dimension rows{1, 0, 0};
  bool transposed = false;
  if (!outward.empty()) {
    const auto closest = std::min_element(
        outward.begin(), outward.end(),
        [](const Dimension& a, const Dimension& b) { return std::abs(a.stride) < std::abs(b.stride); });
    rows = *closest;
    transposed = std::abs(rows.stride) < std::abs(columns.stride);
    outward.erase(closest);
  }
  std::int64_t width = std::min(columns.size, limit);
  if (transposed) {
    constexpr std::int64_t kTile = 16;  // keeps a block longer along the smallest stride
    width = std::min(width, kTile);
  }
  const std::int64_t height = std::min(rows.size, limit / width);

  std::vector<std::int64_t> at(outward.size(), 0);
  Block block{tensor.data, 0, rows.pitch, 0, 0, rows.stride, columns.stride};
  for (;;) {
    std::byte* const data = block.data;
    const std::int64_t first = block.first;
    for (std::int64_t row = 0; row < rows.size; row += height) {
      for (std::int64_t column = 0; column < columns.size; column += width) {
        block.data = data + row * rows.stride + column * columns.stride;
        block.first = first + row * rows.pitch + column;
        block.rows = std::min(height, rows.size - row);
        block.columns = std::min(width, columns.size - column);
        visit(block);
      }
    }
    block.data = data;
    block.first = first;
    std::size_t d = 0;
    for (; d < outward.size(); ++d) {
      const Dimension& outer = outward[d];
      block.data += outer.stride;
      block.first += outer.pitch;
      if (++at[d] < outer.size) break;
      block.data -= outer.stride * outer.size;
      block.first -= outer.pitch * outer.size;
      at[d] = 0;
    }
    if (d == outward.size()) return;
  }
}

void gather(const Block& block, std::size_t element, std::byte* out) {
  if (block.column_stride == static_cast<std::int64_t>(element)) {
    const std::size_t length = block.columns * element;
    for (std::int64_t row = 0; row < block.rows; ++row) {
      std::memcpy(out + row * length, block.data + row * block.row_stride, length);
    }
    return;
  }
  switch (element) {
    case 1:
      return gather_as<std::uint8_t>(block, out);
    case 2:
      return gather_as<std::uint16_t>(block, out);
    case 4:
      return gather_as<std::uint32_t>(block, out);
    default:
      return gather_as<std::uint64_t>(block, out);
  }
}

void scatter(const std::byte* in, std::size_t element, const Block& block) {
  if (block.column_stride == static_cast<std::int64_t>(element)) {
    const std::size_t length = block.columns * element;
    for (std::int64_t row = 0; row < block.rows; ++row) {
      std::memcpy(block.data + row * block.row_stride, in + row * length, length);
    }
    return;
  }
  switch (element) {
    case 1:
      return scatter_as<std::uint8_t>(in, block);
    case 2:
      return scatter_as<std::uint16_t>(in, block);
    case 4:
      return scatter_as<std::uint32_t>(in, block);
    default:
      return scatter_as<std::uint64_t>(in, block);
  }
}

}  // namespace pe
