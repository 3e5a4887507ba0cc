#include "protocol/watch.hpp"

#include <algorithm>
#include <cstring>
#include <string>
#include <utility>

#include "protocol/world.hpp"

namespace pe {

void Watch::step_begins(int process, int rank) {
  now_.rank[process] = static_cast<std::int16_t>(rank);
  now_.in_step[process] = true;
  now_.asks[process] = now_.stopped[process] = 0;
  for (int thread = 0; thread < State::kThreads; ++thread) {
    if (now_.process_of[thread] == process) now_.took_since[thread] = false;
  }
  for (TaskId task = 0; task < plan_.size(); ++task) {
    if (is_of(task, process)) now_.running[task] = now_.ended[task] = false;
  }
  for (int stage = 0; stage < plan_.num_stages(); ++stage) {
    if (rank != kEveryRank && plan_.rank_of_stage(stage) != rank) continue;
    now_.in_flight[stage] = 0;
    std::fill_n(now_.last[stage], 2, -1);
  }
}

void Watch::step_ended(int process, bool done, bool dead) {
  now_.in_step[process] = false;
  now_.dead[process] = dead;
  now_.stopped[process] |= dead;
  if (apart_) std::memset(now_.arrived[1 - process], 0, sizeof now_.arrived[0]);
  for (TaskId task = 0; task < plan_.size(); ++task) {
    if (!is_of(task, process)) continue;
    const std::string name = to_text(plan_.action(task));
    if (now_.running[task] && !dead) world::fail("the step has returned while " + name + " runs");
    if (done && !now_.ended[task]) world::fail("the step is done without " + name);
  }
}

void Watch::begins(int thread, TaskId task) {
  const Action& a = plan_.action(task);
  const int process = now_.process_of[thread];
  const std::string name = to_text(a);
  if (!now_.in_step[process] && !now_.dead[process]) world::fail(name + " begins outside of a step");
  if (now_.running[task] || now_.ended[task]) world::fail(name + " begins twice");
  if (now_.stopped[process] && now_.took_since[thread]) {
    world::fail(name + " begins although its thread has seen that the step is stopped");
  }
  if (a.kind == Kind::F) {
    if (a.stage > 0) needs_group(task, a.stage - 1, true);
    if (++now_.in_flight[a.stage] > plan_.limit(a.stage)) world::fail(name + " is one too many in flight");
  } else if (a.kind == Kind::W) {
    needs(task, a.stage, Kind::I, a.microbatch);
  } else {
    needs(task, a.stage, Kind::F, a.microbatch);
    if (a.stage + 1 < plan_.num_stages()) needs_group(task, a.stage + 1, false);
  }
  const auto in_order = [&](int what, const char* text) {
    std::int16_t& last = now_.last[a.stage][what];
    if (static_cast<int>(task) < last) world::fail(name + " " + text + " out of order");
    last = static_cast<std::int16_t>(task);
  };
  if (a.kind == Kind::B || a.kind == Kind::I) in_order(0, "computes gradients to send");
  if (a.kind == Kind::B || a.kind == Kind::W) in_order(1, "accumulates");
  now_.running[task] = true;
  now_.runs[thread] = static_cast<std::int16_t>(task + 1);
}

void Watch::raises(int thread) { now_.running[std::exchange(now_.runs[thread], 0) - 1] = false; }

void Watch::ends(TaskId task) {
  const Action& a = plan_.action(task);
  now_.running[task] = false;
  now_.ended[task] = true;
  if (a.kind == Kind::B || a.kind == Kind::W) --now_.in_flight[a.stage];
}

void Watch::gave_back(int thread) {
  const int process = now_.process_of[thread];
  if (now_.asks[process] != thread + 1) return;
  now_.asks[process] = 0;
  now_.stopped[process] = true;
}

void Watch::took(int thread) {
  const int ran = std::exchange(now_.runs[thread], 0);
  if (ran > 0 && now_.in_step[now_.process_of[thread]]) ends(ran - 1);  // or else it was abandoned
  const Delivery delivery = std::exchange(now_.delivers[thread], {});
  if (delivery.pending) now_.arrived[delivery.stage][delivery.group] = true;
  if (now_.stopped[now_.process_of[thread]]) now_.took_since[thread] = true;
}

TaskId Watch::find(int stage, Kind kind, int microbatch) const {
  for (TaskId task = 0; task < plan_.size(); ++task) {
    const Action& a = plan_.action(task);
    if (a.stage == stage && a.kind == kind && a.microbatch == microbatch) return task;
  }
  return kNoTask;
}

void Watch::needs(TaskId task, int stage, Kind kind, int microbatch) {
  const TaskId before = find(stage, kind, microbatch);
  if (before != kNoTask && now_.ended[before]) return;
  world::fail(to_text(plan_.action(task)) + " begins before " + to_text({stage, microbatch, kind}) +
              " has ended");
}

// The results of a whole group: the stages are on different ranks.
void Watch::needs_group(TaskId task, int stage, bool forward) {
  const int group = plan_.action(task).microbatch / pack_;
  const Kind kind = forward ? Kind::F : find(stage, Kind::B, 0) == kNoTask ? Kind::I : Kind::B;
  if (apart_) {
    if (now_.arrived[stage][group]) return;
    world::fail(to_text(plan_.action(task)) + " begins before the message of group " + std::to_string(group));
  }
  const int end = std::min((group + 1) * pack_, plan_.num_microbatches());
  for (int m = group * pack_; m < end; ++m) needs(task, stage, kind, m);
}

bool Watch::completes_group(TaskId task) const {
  const Action& a = plan_.action(task);
  const int group = a.microbatch / pack_;
  const int end = std::min((group + 1) * pack_, plan_.num_microbatches());
  for (int m = group * pack_; m < end; ++m) {
    if (m != a.microbatch && !now_.ended[find(a.stage, a.kind, m)]) return false;
  }
  return true;
}

}  // namespace pe
