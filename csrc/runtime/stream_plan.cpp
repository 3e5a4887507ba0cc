#include "runtime/stream_plan.hpp"

#include <algorithm>
#include <functional>
#include <queue>
#include <string>
#include <tuple>
#include <utility>

#include "plan/interrupt.hpp"

namespace pe {
namespace {

constexpr std::size_t kLanes = 4;                        // per rank, unless more tasks run at once
constexpr std::size_t kMostEnds = std::size_t{1} << 28;  // a number for each op and stream: 1 GiB

// Assigns lanes to the microbatches of one rank.
class Lanes {
 public:
  explicit Lanes(int first_stream) : first_stream_(first_stream) {}

  // Takes the stream of a lane that is not among the streams `others`.
  int take(const std::vector<int>& others) {
    const auto free_of_others = [&](std::size_t lane) {
      return std::find(others.begin(), others.end(), first_stream_ + static_cast<int>(lane)) == others.end();
    };
    std::size_t best = lanes_.size();
    for (std::size_t lane = 0; lane < lanes_.size(); ++lane) {
      if (!free_of_others(lane)) continue;
      if (best == lanes_.size() || lanes_[lane] < lanes_[best]) best = lane;
    }
    const bool busy = best == lanes_.size() || lanes_[best].in_flight > 0;
    if (best == lanes_.size() || (busy && lanes_.size() < kLanes)) {
      best = lanes_.size();
      lanes_.emplace_back();
    }
    ++lanes_[best].in_flight;
    return first_stream_ + static_cast<int>(best);
  }

  void give_back(int stream) {
    Lane& lane = lanes_[stream - first_stream_];
    --lane.in_flight;
    lane.last_used = ++uses_;
  }

  int count() const { return static_cast<int>(lanes_.size()); }

 private:
  struct Lane {
    int in_flight = 0;  // microbatches
    int last_used = 0;
    bool operator<(const Lane& other) const {
      return std::pair(in_flight, last_used) < std::pair(other.in_flight, other.last_used);
    }
  };

  const int first_stream_;
  std::vector<Lane> lanes_{1};
  int uses_ = 0;
};

Kind send_of(Kind kind) { return stream_of(kind) == Stream::Forward ? Kind::SendF : Kind::SendB; }

}  // namespace

StreamPlan::StreamPlan(std::shared_ptr<const Plan> plan, const TaskTimes& times,
                       std::vector<int> device_of_rank, int rank)
    : plan_(std::move(plan)), device_of_rank_(std::move(device_of_rank)), rank_(rank) {
  if (static_cast<int>(device_of_rank_.size()) != plan_->num_ranks()) {
    throw PlanError("there are " + std::to_string(device_of_rank_.size()) + " devices for " +
                    std::to_string(plan_->num_ranks()) + " ranks");
  }
  for (const int device : device_of_rank_) {
    if (device < 0) throw PlanError("a device is " + std::to_string(device) + "; give ordinals from 0 on");
  }
  if (times.begin.size() != plan_->size() || times.end.size() != plan_->size()) {
    throw PlanError("the times are of another plan");
  }
  if (rank_ != kEveryRank && !plan_->options().packs.skips.empty()) {
    throw PlanError("skips between the GPUs of several processes are not laid out");
  }
  const std::vector<TaskId> order = in_order(times);
  give_lanes(order, times);
  enqueue(order);
  connect();
}

// Sorts the tasks by their begin. Of tasks that begin at the same time, dependencies and earlier tasks of a
// queue come first, then the one that ends first: a task that takes no time must not end up behind another one
// on its lane.
std::vector<TaskId> StreamPlan::in_order(const TaskTimes& times) const {
  std::vector<int> missing(plan_->size(), 0);
  std::vector<TaskId> next_in_queue(plan_->size(), kNoTask);
  for (int worker = 0; worker < plan_->num_workers(); ++worker) {
    for (const Queue& queue : plan_->queues_of(worker)) {
      for (TaskId at = queue.begin; at + 1 < queue.end; ++at) {
        next_in_queue[plan_->queued(at)] = plan_->queued(at + 1);
        ++missing[plan_->queued(at + 1)];
      }
    }
  }
  using Next = std::tuple<double, double, TaskId>;
  std::priority_queue<Next, std::vector<Next>, std::greater<>> ready;
  for (TaskId t = 0; t < plan_->size(); ++t) {
    missing[t] += plan_->num_dependencies(t);
    if (missing[t] == 0) ready.emplace(times.begin[t], times.end[t], t);
  }
  std::vector<TaskId> order;
  order.reserve(plan_->size());
  while (!ready.empty()) {
    check_interrupt(order.size());
    const TaskId t = std::get<TaskId>(ready.top());
    ready.pop();
    order.push_back(t);
    const auto arrive = [&](TaskId after) {
      if (--missing[after] == 0) ready.emplace(times.begin[after], times.end[after], after);
    };
    for (const TaskId after : plan_->successors(t)) arrive(after);
    if (next_in_queue[t] != kNoTask) arrive(next_in_queue[t]);
  }
  return order;
}

void StreamPlan::give_lanes(const std::vector<TaskId>& order, const TaskTimes& times) {
  lane_of_task_.assign(plan_->size(), 0);
  const int microbatches = plan_->num_microbatches();
  const auto key = [&](TaskId t) {
    const Action& a = plan_->action(t);
    return a.microbatch < 0 ? -1 : a.stage * microbatches + a.microbatch;
  };
  const std::size_t keys = static_cast<std::size_t>(plan_->num_stages()) * microbatches;
  std::vector<int> lane_of_key(keys, -1);
  std::vector<int> tasks_left(keys, 0);
  for (const TaskId t : order) {
    if (key(t) >= 0) ++tasks_left[key(t)];
  }
  // By microbatch at a stage, the others that it runs beside.
  std::vector<std::vector<int>> beside(plan_->options().overlap ? keys : 0);
  if (plan_->options().overlap) {
    std::vector<std::vector<TaskId>> recent(plan_->num_workers());
    for (const TaskId t : order) {
      auto& others = recent[plan_->worker_of(t) ^ 1];
      std::erase_if(others, [&](TaskId u) { return times.end[u] <= times.begin[t]; });
      for (const TaskId u : others) {
        if (key(t) < 0 || key(u) < 0 || times.end[t] <= times.begin[u]) continue;
        beside[key(t)].push_back(key(u));
        beside[key(u)].push_back(key(t));
      }
      recent[plan_->worker_of(t)].push_back(t);
    }
  }
  for (int rank = 0; rank < plan_->num_ranks(); ++rank) {
    if (rank_ != kEveryRank && rank != rank_) continue;
    Lanes lanes(static_cast<int>(streams_.size()));
    for (const TaskId t : order) {
      if (plan_->rank_of(t) != rank) continue;
      const int k = key(t);
      if (k < 0 || !plan_->options().overlap) {
        lane_of_task_[t] = static_cast<int>(streams_.size());
        continue;
      }
      if (lane_of_key[k] < 0) {
        std::vector<int> taken;
        for (const int other : beside[k]) taken.push_back(lane_of_key[other]);
        lane_of_key[k] = lanes.take(taken);
      }
      lane_of_task_[t] = lane_of_key[k];
      if (--tasks_left[k] == 0) lanes.give_back(lane_of_key[k]);
    }
    for (int lane = 0; lane < lanes.count(); ++lane) {
      streams_.push_back({device_of_rank_[rank], false});
    }
  }
}

int StreamPlan::copy_stream(int boundary, Stream direction, int device) {
  int& stream = copy_streams_[2 * boundary + static_cast<int>(direction)];
  if (stream < 0) {
    stream = static_cast<int>(streams_.size());
    streams_.push_back({device, true});
  }
  return stream;
}

bool StreamPlan::is_copied(TaskId task, TaskId after) const {
  const int from = plan_->rank_of(task), to = plan_->rank_of(after);
  const bool crosses = rank_ == kEveryRank ? device_of_rank_[from] != device_of_rank_[to] : from != to;
  const int distance = plan_->action(after).stage - plan_->action(task).stage;
  return crosses && (distance == 1 || distance == -1) && plan_->sends_to_neighbor(task);
}

void StreamPlan::enqueue(const std::vector<TaskId>& order) {
  const std::size_t num_channels = std::size_t{2} * std::max(0, plan_->num_stages() - 1);
  copy_streams_.assign(num_channels, -1);
  channels_.assign(num_channels, {});
  freed_.assign(plan_->num_stages(), kNoOp);
  op_of_.assign(plan_->size(), kNoOp);
  sent_by_.assign(plan_->size(), kNoOp);
  for (const TaskId t : order) {
    const Action& action = plan_->action(t);
    const bool here = is_here(t);
    int to = -1;  // the device that the results are copied to
    for (const TaskId after : plan_->successors(t)) {
      if (is_copied(t, after) && (here || is_here(after))) to = device_of_rank_[plan_->rank_of(after)];
    }
    if (here) {
      op_of_[t] = sent_by_[t] = static_cast<std::uint32_t>(ops_.size());
      ops_.push_back({.action = action, .task = t, .stream = lane_of_task_[t]});
      if (plan_->frees_slot(t)) freed_[action.stage] = op_of_[t];
    }
    if (to < 0) continue;
    const Kind send = send_of(action.kind);
    const int boundary = send == Kind::SendF ? action.stage : action.stage - 1;
    if (!here || action.kind != send) {
      sent_by_[t] = static_cast<std::uint32_t>(ops_.size());
      ops_.push_back({.action = {action.stage, action.microbatch, send}, .task = t});
    }
    ops_.back().stream = copy_stream(boundary, pe::stream_of(send), to);
    ops_.back().is_copy = true;
    if (rank_ != kEveryRank) bound_memory(t, boundary, send);
  }
}

// Nothing signals that a peer consumed a send, and a receive waits for nothing. So each send and receive waits
// for an earlier task that bounds buffer memory, one that has ended by then if all goes as planned.
void StreamPlan::bound_memory(TaskId task, int boundary, Kind send) {
  Channel& channel = channels_[2 * boundary + static_cast<int>(pe::stream_of(send))];
  if (is_here(task)) {
    // The earlier stage has no more slots: before it takes another microbatch, one of these has come back.
    const int pack = plan_->options().packs.of(send == Kind::SendF ? Kind::F : Kind::B, boundary);
    const std::size_t room = (plan_->limit(boundary) + pack - 1) / pack + 1;
    channel.sends.push_back(sent_by_[task]);
    if (channel.sends.size() > room) {
      memory_waits_.push_back({op_of_[task], channel.sends[channel.sends.size() - 1 - room]});
    }
    return;
  }
  // Wait only for memory that was free when the previous message was sent, so that the receive is posted early.
  if (channel.freed != kNoOp) memory_waits_.push_back({sent_by_[task], channel.freed});
  channel.freed = freed_[send == Kind::SendF ? boundary + 1 : boundary];
}

void StreamPlan::connect() {
  const std::size_t num_streams = streams_.size();
  const std::size_t num_ops = ops_.size();
  if (num_ops * num_streams > kMostEnds) {
    throw PlanError("a step of " + std::to_string(num_ops) + " tasks and copies on " +
                    std::to_string(num_streams) +
                    " streams cannot be laid out; give fewer microbatches or stages");
  }
  ended_.assign(num_ops * num_streams, 0);
  number_on_stream_.assign(num_ops, 0);
  on_stream_.assign(num_streams, {});
  std::vector<std::vector<std::uint32_t>> before(num_ops);
  for (TaskId t = 0; t < plan_->size(); ++t) {
    for (const TaskId after : plan_->successors(t)) {
      if (!is_here(after)) continue;
      before[op_of_[after]].push_back(is_copied(t, after) ? sent_by_[t] : op_of_[t]);
    }
    if (is_here(t) && sent_by_[t] != op_of_[t]) before[sent_by_[t]].push_back(op_of_[t]);
  }
  for (const MemoryWait& wait : memory_waits_) before[wait.op].push_back(wait.waits_for);
  std::vector<std::int64_t> last_of_worker(plan_->num_workers(), -1);
  for (std::uint32_t i = 0; i < num_ops; ++i) {
    check_interrupt();
    StreamOp& op = ops_[i];
    if (!op.is_copy) {
      std::int64_t& last = last_of_worker[plan_->worker_of(op.task)];
      if (last >= 0) before[i].push_back(static_cast<std::uint32_t>(last));
      last = i;
    }
    std::uint32_t* const mine = &ended_[i * num_streams];
    const auto join = [&](std::uint32_t other) {
      const std::uint32_t* const theirs = &ended_[other * num_streams];
      for (std::size_t s = 0; s < num_streams; ++s) mine[s] = std::max(mine[s], theirs[s]);
      std::uint32_t& ended = mine[ops_[other].stream];
      ended = std::max(ended, number_on_stream_[other] + 1);
    };
    auto& own = on_stream_[op.stream];
    if (!own.empty()) join(own.back());
    // Latest first: once that one has ended, most of the others have too.
    std::sort(before[i].begin(), before[i].end(), std::greater<>());
    op.waits_begin = static_cast<std::uint32_t>(waits_.size());
    for (const std::uint32_t other : before[i]) {
      if (mine[ops_[other].stream] > number_on_stream_[other]) continue;
      join(other);
      ops_[other].awaited = true;
      waits_.push_back(other);
    }
    op.waits_end = static_cast<std::uint32_t>(waits_.size());
    number_on_stream_[i] = static_cast<std::uint32_t>(own.size());
    own.push_back(i);
  }
}

std::uint32_t StreamPlan::first_after(std::uint32_t before, int stream) const {
  const auto& ops = on_stream_[stream];
  const int other = ops_[before].stream;
  const auto has_ended = [&](std::uint32_t op) {
    return ended_[op * streams_.size() + other] > number_on_stream_[before];
  };
  const auto first =
      std::partition_point(ops.begin(), ops.end(), [&](std::uint32_t op) { return !has_ended(op); });
  return first == ops.end() ? static_cast<std::uint32_t>(ops_.size()) : *first;
}

}  // namespace pe
