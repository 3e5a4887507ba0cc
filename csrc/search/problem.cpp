#include "search/problem.hpp"

#include <algorithm>
#include <limits>
#include <numeric>
#include <string>

#include "plan/size.hpp"
#include "simulate/lower_bound.hpp"

namespace pe {
namespace {

constexpr double kRounding = 1e-9;  // of sums of memory

Placement checked(const Placement& placement, int microbatches) {
  check_size(placement.num_stages(), placement.num_ranks, microbatches);
  check_ranks(placement.rank_of_stage, placement.num_ranks);
  return placement;
}

}  // namespace

Problem::Problem(const Placement& placement, int microbatches, const Costs& costs, Objective objective)
    : placement_(checked(placement, microbatches)),
      costs_(costs),
      microbatches_(microbatches),
      objective_(objective),
      rank_of_(placement.rank_of_stage),
      chunk_of_(placement.rank_of_stage.size()),
      stages_of_(placement.num_ranks),
      times_{costs.forward, costs.input_grad, costs.weight_grad},
      varies_(costs.microbatch.given()),
      taken_(costs.taken),
      freed_by_input_(costs.freed_by_input_grad),
      limit_(costs.memory_limit),
      latency_(costs.latency),
      transfer_(costs.transfer) {
  costs.validate(num_stages(), placement.num_ranks, microbatches);
  if (constexpr int kMost = std::numeric_limits<decltype(Token::stage)>::max(); num_stages() > kMost) {
    throw PlanError("an order is searched for at most " + std::to_string(kMost) + " stages, got " +
                    std::to_string(num_stages()) + "; name another schedule");
  }
  if (taken_.empty()) taken_.assign(num_stages(), 1.0);
  if (freed_by_input_.empty()) freed_by_input_.assign(num_stages(), 0.0);
  if (limit_.empty()) limit_.assign(placement.num_ranks, std::numeric_limits<double>::infinity());
  if (transfer_.empty()) transfer_.assign(num_stages(), 0.0);
  for (auto& by_stage : sending_) by_stage.assign(num_stages(), 0.0);
  for (int s = 0; s < num_stages(); ++s) {
    std::vector<int>& stages = stages_of_[rank_of_[s]];
    chunk_of_[s] = static_cast<int>(stages.size());
    stages.push_back(s);
    if (costs.overhead.empty()) continue;
    if (s + 1 < num_stages() && crosses(s)) sending_[static_cast<int>(Pass::F)][s] = costs.overhead[s];
    if (s > 0 && crosses(s - 1)) sending_[static_cast<int>(Pass::I)][s] = costs.overhead[s - 1];
  }
  for (int p = 0; p < kNumPasses; ++p) {
    for (int s = 0; s < num_stages(); ++s) times_[p][s] += sending_[p][s];
  }
  for (int rank = 0; rank < num_ranks(); ++rank) {
    if (stages_of_[rank].empty()) throw PlanError("rank " + std::to_string(rank) + " holds no stage");
    double needed = 0;
    for (const int s : stages_of_[rank]) needed += taken_[s];
    limit_[rank] *= 1 + kRounding;
    if (!fits(rank, needed)) {
      throw PlanError("rank " + std::to_string(rank) + " may hold " + std::to_string(costs.memory_limit[rank]) +
                      ", and one microbatch at each of its stages takes " + std::to_string(needed) +
                      "; raise memory_limit, or cut the model or the batch into more parts");
    }
  }
  // `B` never runs here, so its own cost must not lower the bound.
  for (int s = 0; s < num_stages(); ++s) costs_.backward[s] = costs.input_grad[s] + costs.weight_grad[s];
  const LowerBound bound = pe::lower_bound(rank_of_, num_ranks(), microbatches_, costs_);
  lower_bound_ = objective_ == Objective::Span ? bound.span : bound.makespan;
}

Problem Problem::with_first(int microbatches) const {
  Costs costs = costs_;
  std::vector<int> first(microbatches);
  std::iota(first.begin(), first.end(), 0);
  costs.microbatch = costs_.microbatch.reordered(first);
  return Problem(placement_, microbatches, costs, objective_);
}

double Problem::time_of(Pass pass, int stage, int m) const {
  const int p = static_cast<int>(pass);
  return costs_.of({stage, m, kKindOf[p]}) + sending_[p][stage];
}

Score Problem::score(const std::vector<double>& begin, const std::vector<double>& end) const {
  Score score;
  for (int rank = 0; rank < num_ranks(); ++rank) {
    const double time = share(begin[rank], end[rank]);
    score.time = std::max(score.time, time);
    score.mean += time / num_ranks();
  }
  return score;
}

Order Problem::to_order(const Tokens& tokens) const {
  Order order;
  std::vector<int> next(std::size_t{kNumPasses} * num_stages(), 0);
  for (const auto& of_rank : tokens) {
    auto& actions = order.emplace_back();
    actions.reserve(of_rank.size());
    for (const Token& token : of_rank) {
      const int pass = static_cast<int>(token.pass);
      actions.push_back({token.stage, next[kNumPasses * token.stage + pass]++, kKindOf[pass]});
    }
  }
  return order;
}

Tokens Problem::to_tokens(const Order& order) const {
  std::vector<int> listed(std::size_t{kNumPasses} * num_stages(), 0);
  Tokens tokens;
  for (const auto& actions : order) {
    const int rank = static_cast<int>(tokens.size());
    auto& of_rank = tokens.emplace_back();
    const auto list = [&](const Action& a, Pass pass) {
      of_rank.push_back({static_cast<std::int16_t>(a.stage), pass});
      ++listed[kNumPasses * a.stage + static_cast<int>(pass)];
    };
    for (const Action& a : actions) {
      if (!is_compute(a.kind) || a.stage >= num_stages() || rank_of(a.stage) != rank) {
        throw PlanError("an order to start from lists " + to_text(a) + " on rank " + std::to_string(rank) +
                        ", where the search runs no such action");
      }
      if (a.kind == Kind::F) list(a, Pass::F);
      if (a.kind == Kind::I || a.kind == Kind::B) list(a, Pass::I);
      if (a.kind == Kind::W || a.kind == Kind::B) list(a, Pass::W);
    }
  }
  if (std::ranges::any_of(listed, [&](int count) { return count != microbatches_; })) {
    throw PlanError("an order to start from does not list each of the " + std::to_string(microbatches_) +
                    " microbatches at each stage");
  }
  return tokens;
}

}  // namespace pe
