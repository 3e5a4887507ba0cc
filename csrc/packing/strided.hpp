// A tensor in memory, whatever its strides, walked in blocks that fit the first-level cache.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>
#include <string>

#include "packing/dtype.hpp"

namespace pe {

std::string describe(DType dtype, std::span<const std::int64_t> shape);  // as in float32[4, 8]

// What one tensor's memory looks like; strides are in elements.
struct Strided {
  std::byte* data;
  DType dtype;
  std::span<const std::int64_t> shape;
  std::span<const std::int64_t> strides;

  std::int64_t size() const;  // elements
  bool is_contiguous() const;
  bool is_expanded() const;  // one element is seen at several places
};

// Rows of elements; `data` is the first. In row-major order that one is number `first`, the elements of a
// row follow one another, and rows begin `pitch` apart. In memory rows and elements are so many bytes apart.
struct Block {
  std::byte* data;
  std::int64_t first, pitch;
  std::int64_t rows, columns;
  std::int64_t row_stride, column_stride;

  std::int64_t size() const { return rows * columns; }
};

// Visits every element once, in blocks of at most `limit`. A contiguous tensor's blocks are one row each.
void for_each_block(const Strided& tensor, std::int64_t limit, const std::function<void(const Block&)>& visit);

// Copies a block's elements, of 1, 2, 4 or 8 bytes, to `out`, row after row, or from `in` into the block.
void gather(const Block& block, std::size_t element, std::byte* out);
void scatter(const std::byte* in, std::size_t element, const Block& block);

}  // namespace pe
