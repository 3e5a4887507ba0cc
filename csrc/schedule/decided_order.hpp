// The order in which a rank runs its tasks where another process decides it.
//
// Several processes may hold the same stages of one replica and communicate inside tasks (tensor parallelism).
// Then all of them must run their tasks in one order. One of them, the leader, takes tasks as it always does,
// and tells the others, the followers, of each task before it runs it; they run exactly its order, each task
// once its own inputs are there.
//
// This does not deadlock if a pipeline of the leaders alone does not. Proof: order all tasks of all groups by
// the moment in which their leaders took them. Suppose that some member never ends some task, and take the
// first such task T. Its leader took it when the tasks that T needs had ended in processes of other ranks, or
// in the leader itself. So their leaders had taken them earlier, and every member of their groups ends them:
// the inputs of T reach every member of its own group. Each member has ended what its rank took before T,
// because a rank runs one task at a time; so T finds the same free slots and the same memory as in the leader.
// A follower is told of T whatever its threads and those of the leader do: the message leaves before T begins,
// and a thread that does nothing else receives it. So all members begin T, and what they do together in it
// ends. Hence T ends in every member, and so does every task that is taken. When all of those have ended, each
// leader is where it could be in a pipeline of its own, which goes on.
//
// A stage's last backward may also wait for other replicas (fully_shard, DistributedDataParallel). A rank
// reduces its stages in descending order, so one that waits in the reduction of stage s has run all `F`, and
// all of the stages from s on; it withholds backwards of earlier stages only, which no reduction of stage s or
// of a later one needs. So among the reductions that wait, those of the highest stage find their partners.
#pragma once

#include <cstddef>
#include <vector>

#include "schedule/list_scheduler.hpp"

namespace pe {

class DecidedOrder {
 public:
  // The rank's one worker takes `task` after all tasks given before.
  void decide(TaskId task) { tasks_.push_back(task); }

  // The task that was decided next and has not been taken, or kNoTask.
  TaskId next() const { return taken_ < tasks_.size() ? tasks_[taken_] : kNoTask; }

  // The same if it may start now; else kNoTask.
  TaskId take(ListScheduler& scheduler, int worker) {
    const TaskId decided = next();
    if (decided == kNoTask) return kNoTask;
    const TaskId task = scheduler.take(worker, [decided](TaskId head) { return head == decided; });
    if (task != kNoTask) ++taken_;
    return task;
  }

 private:
  std::vector<TaskId> tasks_;
  std::size_t taken_ = 0;
};

}  // namespace pe
