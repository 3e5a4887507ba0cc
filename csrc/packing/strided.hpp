// A tensor in memory with any strides, visited in blocks that fit the first-level cache.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>
#include <string>

#include "packing/dtype.hpp"

namespace pe {

std::string describe(DType dtype, std::span<const std::int64_t> shape);  // as in "float32[4, 8]"

// The memory of one tensor; strides are in elements.
struct Strided {
  std::byte* data;
  DType dtype;
  std::span<const std::int64_t> shape;
  std::span<const std::int64_t> strides;

  std::int64_t size() const;  // elements
  bool is_contiguous() const;
  bool is_expanded() const;  // several indices share one element
};

// The bytes of all elements of a shape. Throws PackingError for a negative dimension, or more than memory can
// hold.
std::int64_t nbytes_of(std::span<const std::int64_t> shape, DType dtype);

// Rows of elements; `data` is the first one. In row-major order it is element number `first`, a row is
// contiguous, and rows are `pitch` elements apart. In memory, rows are `row_stride` and elements
// `column_stride` bytes apart.
struct Block {
  std::byte* data;
  std::int64_t first, pitch;
  std::int64_t rows, columns;
  std::int64_t row_stride, column_stride;

  std::int64_t size() const { return rows * columns; }
};

// Visits every element once, in blocks of at most `limit` elements. A contiguous tensor's blocks have one row
// each.
void for_each_block(const Strided& tensor, std::int64_t limit, const std::function<void(const Block&)>& visit);

// gather copies a block's elements, of 1, 2, 4 or 8 bytes each, to `out`, row by row; scatter copies them back.
void gather(const Block& block, std::size_t element, std::byte* out);
void scatter(const std::byte* in, std::size_t element, const Block& block);

}  // namespace pe
