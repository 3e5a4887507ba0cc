// Casts and sums of contiguous elements, compiled for several instruction sets; the best one for the processor
// runs.
//
// Casts round to nearest even, like torch's. Values too large for float8_e4m3fn, infinity included, become its
// largest value; values too large for another type become infinity. NaN stays NaN, perhaps with other bits.
#pragma once

#include <cstddef>
#include <cstdint>

#include "packing/dtype.hpp"

namespace pe {

// Casts n elements into `values`, which has room for n. Returns `values`, or `in` if no cast is needed.
const float* decode(DType from, const void* in, float* values, std::size_t n);
const double* decode(DType from, const void* in, double* values, std::size_t n);

// out = values * scale, cast to `to`. `out` and `values` do not overlap.
void encode(const float* values, float scale, DType to, void* out, std::size_t n);
void encode(const double* values, double scale, DType to, void* out, std::size_t n);

void multiply(float* values, float scale, std::size_t n);
void multiply(double* values, double scale, std::size_t n);

void add(const float* values, float* sums, std::size_t n);
void add(const double* values, double* sums, std::size_t n);

// The maximum of `most` (at least 0) and all |value|; NaN if any value is NaN.
float largest(float most, const float* values, std::size_t n);
double largest(double most, const double* values, std::size_t n);

}  // namespace pe
