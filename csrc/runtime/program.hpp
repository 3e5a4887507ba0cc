// A plan, and the function that each of its tasks runs.
#pragma once

#include <functional>
#include <memory>
#include <vector>

#include "plan/plan.hpp"

namespace pe {

// May throw; the exception stops the step. An empty body does nothing and succeeds.
using Body = std::function<void(const Action&)>;

class Program {
 public:
  explicit Program(std::shared_ptr<const Plan> plan)
      : plan_(std::move(plan)), bodies_(static_cast<std::size_t>(plan_->num_stages()) * kNumKinds) {}

  void set_body(int stage, Kind kind, Body body) { bodies_[index(stage, kind)] = std::move(body); }

  void run(TaskId task) const { run(plan_->action(task)); }
  void run(const Action& action) const {
    const Body& body = bodies_[index(action.stage, action.kind)];
    if (body) body(action);
  }

  const Plan& plan() const { return *plan_; }
  const std::shared_ptr<const Plan>& shared_plan() const { return plan_; }

 private:
  static std::size_t index(int stage, Kind kind) {
    return static_cast<std::size_t>(stage) * kNumKinds + static_cast<std::size_t>(kind);
  }

  std::shared_ptr<const Plan> plan_;
  std::vector<Body> bodies_;  // by stage and kind
};

}  // namespace pe
