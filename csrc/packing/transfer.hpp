// Copies one tensor into its part `packed` of a buffer, and back. There it is row-major, in the type it is sent
// as.
#pragma once

#include "packing/strided.hpp"

namespace pe {

// Bit for bit. `streams`: with non-temporal stores.
void copy_to(std::byte* packed, const Strided& tensor, bool streams);
void copy_from(const std::byte* packed, const Strided& tensor);

// packed = tensor * scale, cast to `wire`. Real is the type of the arithmetic: double for a float64 tensor,
// else float. Returns the largest |value| of the tensor (NaN if any is NaN) if it `watches`, else 0.
template <class Real>
Real cast_to(std::byte* packed, DType wire, const Strided& tensor, Real scale, bool watches, bool streams);

// tensor = packed * scale, cast; if it `accumulates`, tensor += packed * scale.
template <class Real>
void cast_from(const std::byte* packed, DType wire, const Strided& tensor, Real scale, bool accumulates);

}  // namespace pe
