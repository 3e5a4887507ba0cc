// One tensor to and from its packed in a buffer, which is row-major and of the type it travels as.
#pragma once

#include "packing/strided.hpp"

namespace pe {

// Bit for bit. `streams`: past the caches.
void copy_to(std::byte* packed, const Strided& tensor, bool streams);
void copy_from(const std::byte* packed, const Strided& tensor);

// packed = tensor * scale, cast to `wire`. Real, the type of the arithmetic, is double for a float64 tensor,
// else float. Returns the greatest |value| of the tensor (NaN if any is) where it `watches`, else 0.
template <class Real>
Real cast_to(std::byte* packed, DType wire, const Strided& tensor, Real scale, bool watches, bool streams);

// tensor = packed * scale, cast; or tensor += packed * scale.
template <class Real>
void cast_from(const std::byte* packed, DType wire, const Strided& tensor, Real scale, bool accumulates);

}  // namespace pe
