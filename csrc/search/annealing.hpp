// Simulated annealing (Kirkpatrick et al., Optimization by Simulated Annealing, Science 1983): the part that
// does not depend on what is varied.
#pragma once

#include <cmath>
#include <cstdint>
#include <random>

namespace pe {

// Random numbers that a seed determines on every platform.
class Random {
 public:
  explicit Random(std::uint64_t seed) : engine_(seed) {}

  int below(int n) { return static_cast<int>(engine_() % static_cast<std::uint64_t>(n)); }
  bool one_in(int n) { return below(n) == 0; }
  double share() { return static_cast<double>(engine_() >> 11) * 0x1.0p-53; }  // in [0, 1)

 private:
  std::mt19937_64 engine_;
};

// Whether to accept a change of cost, at a temperature that falls to zero over the run.
class Cooling {
 public:
  Cooling(double warmest, long rounds) : warmest_(warmest), rounds_(rounds) {}

  bool takes(double from, double to, long round, Random& random) const {
    if (to <= from) return true;
    const double temperature = warmest_ * (1.0 - static_cast<double>(round) / static_cast<double>(rounds_));
    return temperature > 0 && std::exp((from - to) / temperature) > random.share();
  }

 private:
  double warmest_;
  long rounds_;
};

}  // namespace pe
