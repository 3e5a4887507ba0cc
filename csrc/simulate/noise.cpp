#include "simulate/noise.hpp"

#include <cmath>
#include <numbers>

namespace pe {
namespace {

// The finalizer of SplitMix64 (Steele et al., Fast Splittable Pseudorandom Number Generators, OOPSLA 2014).
std::uint64_t mix(std::uint64_t bits) {
  bits += 0x9e3779b97f4a7c15u;
  bits = (bits ^ (bits >> 30)) * 0xbf58476d1ce4e5b9u;
  bits = (bits ^ (bits >> 27)) * 0x94d049bb133111ebu;
  return bits ^ (bits >> 31);
}

// Uniform in (0, 1).
double uniform(std::uint64_t bits) { return (static_cast<double>(bits >> 11) + 0.5) * 0x1p-53; }

}  // namespace

double Noise::factor(const Action& action) const {
  std::uint64_t bits = mix(seed);
  for (const std::int32_t part : {action.stage, action.microbatch, static_cast<std::int32_t>(action.kind)}) {
    bits = mix(bits ^ static_cast<std::uint32_t>(part));
  }
  // A normal random number by Box and Muller's method.
  const double normal =
      std::sqrt(-2.0 * std::log(uniform(bits))) * std::cos(2.0 * std::numbers::pi * uniform(mix(bits)));
  const double variance = std::log1p(cv * cv);
  return std::exp(std::sqrt(variance) * normal - variance / 2);
}

}  // namespace pe
