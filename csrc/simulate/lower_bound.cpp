#include "simulate/lower_bound.hpp"

#include <algorithm>

namespace pe {
namespace {

// The least that one microbatch takes at each stage, sending included; pairs may shorten all of it.
struct Least {
  std::vector<double> forward;
  std::vector<double> input_grad;  // until the gradient leaves: by I, or by B
  std::vector<double> backward;    // all of it: B, or I and W
  std::vector<double> way;         // of a message, by boundary
};

Least least_of(const std::vector<int>& rank_of_stage, const Costs& costs) {
  Least least;
  const double share = std::min(1.0, costs.pair);
  const int stages = static_cast<int>(rank_of_stage.size());
  const auto crosses = [&](int b) {
    return b >= 0 && b + 1 < stages && rank_of_stage[b] != rank_of_stage[b + 1];
  };
  const auto sending = [&](int b) { return crosses(b) && !costs.overhead.empty() ? costs.overhead[b] : 0.0; };
  for (int s = 0; s < stages; ++s) {
    const double whole = costs.backward[s];
    const double part = costs.input_grad[s];
    least.forward.push_back(share * (costs.forward[s] + sending(s)));
    least.input_grad.push_back(share * (std::min(whole, part) + sending(s - 1)));
    least.backward.push_back(share * (std::min(whole, part + costs.weight_grad[s]) + sending(s - 1)));
    const double occupied = costs.transfer.empty() || !crosses(s) ? 0.0 : costs.transfer[s];
    if (s + 1 < stages) least.way.push_back(crosses(s) ? costs.latency[s] + occupied : 0.0);
  }
  return least;
}

}  // namespace

LowerBound lower_bound(const std::vector<int>& rank_of_stage, int num_ranks, int microbatches,
                       const Costs& costs) {
  const int stages = static_cast<int>(rank_of_stage.size());
  costs.validate(stages, num_ranks);
  const Least least = least_of(rank_of_stage, costs);

  // Of one microbatch alone: when its F and its gradients begin, and what follows the gradient of a stage.
  std::vector<double> forward(stages, 0.0);
  std::vector<double> backward(stages, 0.0);
  std::vector<double> tail(stages, 0.0);
  for (int s = 1; s < stages; ++s) forward[s] = forward[s - 1] + least.forward[s - 1] + least.way[s - 1];
  backward[stages - 1] = forward[stages - 1] + least.forward[stages - 1];
  for (int s = stages - 2; s >= 0; --s) backward[s] = backward[s + 1] + least.input_grad[s + 1] + least.way[s];
  tail[0] = least.backward[0] - least.input_grad[0];
  for (int s = 1; s < stages; ++s) tail[s] = least.way[s - 1] + least.input_grad[s - 1] + tail[s - 1];

  LowerBound bound;
  bound.makespan = backward[0] + least.backward[0];
  for (int rank = 0; rank < num_ranks; ++rank) {
    // Every microbatch passes the rank's first stage before its others, and comes back to it last.
    const auto home = [&](int of) { return of == rank; };
    const auto found = std::find_if(rank_of_stage.begin(), rank_of_stage.end(), home);
    if (found == rank_of_stage.end()) continue;
    const int first = static_cast<int>(found - rank_of_stage.begin());
    const auto rfound = std::find_if(rank_of_stage.rbegin(), rank_of_stage.rend(), home);
    const int last = stages - 1 - static_cast<int>(rfound - rank_of_stage.rbegin());
    double forwards = 0;
    double gradients = 0;
    double backwards = 0;
    for (int s = first; s <= last; ++s) {
      if (rank_of_stage[s] != rank) continue;
      forwards += microbatches * least.forward[s];
      gradients += microbatches * least.input_grad[s];
      backwards += microbatches * least.backward[s];
    }
    // No gradient comes before the first microbatch's; the W may all come when the last gradient has left.
    const double wait = backward[last] - forward[first];
    const double alone = backward[first] + least.backward[first] - forward[first];
    const double span = std::max({forwards + backwards, wait + backwards, alone});
    bound.span = std::max(bound.span, span);
    bound.makespan = std::max({bound.makespan, forward[first] + span,
                               forward[first] + std::max(forwards, wait) + gradients + tail[first]});
  }
  return bound;
}

}  // namespace pe
