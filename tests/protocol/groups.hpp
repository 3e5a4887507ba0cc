// Explores the order that one process decides for others: two ranks, each of them a group of processes that
// hold the same stages and meet in every task.
#pragma once

#include "plan/plan.hpp"
#include "protocol/explore.hpp"

namespace pe {

enum class Fault {
  None,
  DecidesItself,  // followers take what is ready, as a process that is alone
  TellsLate,      // a leader tells of a task once that has ended
};

// Every order in which the processes of a step, and the messages between them, can take turns. The processes
// are the core's own ListScheduler and DecidedOrder. A task meets its partners: it ends only after it has begun
// in all members of its group. Messages of one kind, between two processes, keep their order and take any time.
world::Explored explore_groups(const Plan& plan, int members, Fault fault);

}  // namespace pe
