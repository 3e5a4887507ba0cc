// Casts and sums of elements in a row, compiled for several instruction sets; the processor's best runs.
//
// Casts round to nearest even, as torch's do. Too large for float8_e4m3fn, infinity included, becomes its
// largest value; too large for another type becomes infinity. A NaN stays one, whichever its bits.
#pragma once

#include <cstddef>
#include <cstdint>

#include "packing/dtype.hpp"

namespace pe {

// `values` has room for n. Returns where the values are: there, or in `in` where nothing needs doing.
const float* decode(DType from, const void* in, float* values, std::size_t n);
const double* decode(DType from, const void* in, double* values, std::size_t n);

// out = values * scale, cast; `out` is other memory.
void encode(const float* values, float scale, DType to, void* out, std::size_t n);
void encode(const double* values, double scale, DType to, void* out, std::size_t n);

void multiply(float* values, float scale, std::size_t n);
void multiply(double* values, double scale, std::size_t n);

void add(const float* values, float* sums, std::size_t n);
void add(const double* values, double* sums, std::size_t n);

// The greater of `most`, which is no less than 0, and every |value|; NaN if any is.
float largest(float most, const float* values, std::size_t n);
double largest(double most, const double* values, std::size_t n);

}  // namespace pe
