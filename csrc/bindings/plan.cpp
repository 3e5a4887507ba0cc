#include <pybind11/stl.h>

#include <optional>

#include "bindings/checks.hpp"
#include "bindings/module.hpp"
#include "bindings/poll.hpp"
#include "plan/plan.hpp"
#include "plan/size.hpp"
#include "schedule/schedule.hpp"
#include "simulate/make_plan.hpp"

namespace py = pybind11;

namespace pe {
namespace {

using SharedPlan = std::shared_ptr<Plan>;

template <class Make>
SharedPlan make_shared_plan(Make&& make) {
  return interruptible([&] { return std::make_shared<Plan>(make()); });
}

py::dict order_by_rank(const Plan& plan) {
  py::dict order;
  int rank = 0;
  for (auto& cells : to_cells(plan.order())) order[py::int_(rank++)] = cells;
  return order;
}

// By boundary; 1 if both stages are on one rank.
std::vector<int> packs_by_boundary(const Plan& plan, Kind kind) {
  std::vector<int> packs;
  for (int b = 0; b + 1 < plan.num_stages(); ++b) {
    const bool crosses = plan.rank_of_stage(b) != plan.rank_of_stage(b + 1);
    packs.push_back(crosses ? plan.options().packs.of(kind, b) : 1);
  }
  return packs;
}

const char* stream_name(Stream stream) { return stream == Stream::Forward ? "forward" : "backward"; }

}  // namespace

void bind_plan(py::module_& m) {
  translate<PlanError>("InvalidSchedule");
  m.attr("most_stages") = kMostStages;
  m.attr("most_tasks") = kMostTasks;

  py::class_<Skip>(m, "Skip", "A tensor that goes from a stage directly to a later one, and its gradient back.")
      .def(py::init<int, int, int, int>(), py::arg("source"), py::arg("target"), py::kw_only(),
           py::arg("pack_forward") = 1, py::arg("pack") = 1)
      .def_readonly("source", &Skip::source)
      .def_readonly("target", &Skip::target)
      .def_readonly("pack", &Skip::backward, "How many microbatches' gradients leave in one message.")
      .def_readonly("pack_forward", &Skip::forward, "How many microbatches' tensors leave in one message.");

  py::class_<Plan, SharedPlan>(m, "Plan", R"(The immutable task graph of one step.

Tasks are numbered rank by rank in their planned order. Read the order with ``order()`` or ``print``.)")
      .def_property_readonly("num_ranks", &Plan::num_ranks)
      .def_property_readonly("num_stages", &Plan::num_stages)
      .def_property_readonly("num_microbatches", &Plan::num_microbatches)
      .def_property_readonly("num_workers", &Plan::num_workers)
      .def_property_readonly("num_messages", py::overload_cast<>(&Plan::num_messages, py::const_),
                             "Messages between ranks in one step.")
      .def_property_readonly("has_backward", &Plan::has_backward)
      .def_property_readonly(
          "overlap", [](const Plan& p) { return p.options().overlap; },
          "Whether a rank's forward and backward stream may run at the same time.")
      .def_property_readonly(
          "reactive", [](const Plan& p) { return p.options().reactive; },
          "Whether a rank whose next planned task is not ready takes another that is.")
      .def_property_readonly(
          "looks_ahead", [](const Plan& p) { return p.options().looks_ahead; },
          "Whether such a rank first asks if the planned task is expected before the other would end.")
      .def_property_readonly("rank_of_stage", [](const Plan& p) { return p.shape().rank_of_stage; })
      .def_property_readonly(
          "rank_of_copy", [](const Plan& p) { return p.shape().rank_of_copy; },
          "By stage, the rank of the second copy of its parameters; empty if there is none.")
      .def_property_readonly(
          "packs", [](const Plan& p) { return packs_by_boundary(p, Kind::B); },
          "By boundary, how many microbatches' gradients leave in one message.")
      .def_property_readonly(
          "packs_forward", [](const Plan& p) { return packs_by_boundary(p, Kind::F); },
          "By boundary, how many microbatches' activations leave in one message.")
      .def_property_readonly(
          "skips", [](const Plan& p) { return p.options().packs.skips; },
          "The skips; between stages on one rank each result is handed over alone.")
      .def_property_readonly("limits", &Plan::limits, "The most microbatches each stage may have in flight.")
      .def_property_readonly("nbytes", &Plan::nbytes, "Memory the plan holds.")
      .def("order", &order_by_rank, "Rank -> its actions as text, from first to last.")
      .def(
          "to_csv", [](const Plan& p) { return to_csv(p.order()); },
          "One line a rank, in the action text of torch.distributed.pipelining.")
      .def(
          "kinds",
          [](const Plan& p) {
            std::vector<bool> seen(kNumKinds, false);
            for (TaskId t = 0; t < p.size(); ++t) seen[static_cast<int>(p.action(t).kind)] = true;
            std::vector<std::string> kinds;
            for (int k = 0; k < kNumKinds; ++k) {
              if (seen[k]) kinds.emplace_back(kind_name(static_cast<Kind>(k)));
            }
            return kinds;
          },
          "The kinds of action in the plan.")
      .def(
          "action", [](const Plan& p, TaskId t) { return to_text(p.action(checked_task(p, t))); },
          py::arg("task"))
      .def(
          "describe",
          [](const Plan& p, TaskId t) {
            const Action& a = p.action(checked_task(p, t));
            return py::make_tuple(std::string(kind_name(a.kind)), a.stage, a.microbatch, p.rank_of(t),
                                  stream_name(stream_of(a.kind)));
          },
          py::arg("task"), "(kind, stage, microbatch, rank, stream) of a task.")
      .def(
          "dependencies", [](const Plan& p, TaskId t) { return p.dependencies_of(checked_task(p, t)); },
          py::arg("task"),
          "The tasks that a task waits for. Slow, it looks at all tasks: for many tasks use successors.")
      .def(
          "successors",
          [](const Plan& p, TaskId t) {
            const auto after = p.successors(checked_task(p, t));
            return std::vector<TaskId>(after.begin(), after.end());
          },
          py::arg("task"), "The tasks that wait for a task.")
      .def(
          "num_sent", [](const Plan& p, TaskId t) { return p.num_sent(checked_task(p, t)); }, py::arg("task"),
          "How many results are sent to other ranks when the task ends.")
      .def(
          "num_messages_of", [](const Plan& p, TaskId t) { return p.num_messages(checked_task(p, t)); },
          py::arg("task"), "How many messages carry them: one, and one for each skip.")
      .def("__len__", &Plan::size)
      .def("__str__", [](const Plan& p) { return to_table(p.order()); })
      .def("__repr__", [](const Plan& p) {
        return "<Plan: " + std::to_string(p.size()) + " tasks, " + std::to_string(p.num_stages()) +
               " stages on " + std::to_string(p.num_ranks()) + " ranks, " +
               std::to_string(p.num_microbatches()) + " microbatches>";
      });

  // NOLINTNEXTLINE(bugprone-unused-raii): making it registers the type.
  py::class_<Memory>(m, "Memory", "The memory that microbatches take, and the limit of each rank.");

  m.def("schedule_names", [] {
    std::vector<std::string> names;
    for (const auto& schedule : schedules()) names.push_back(schedule.name);
    return names;
  });
  m.def(
      "layout_of", [](const std::string& name) { return std::string(layout_name(find_schedule(name).layout)); },
      py::arg("schedule"), "How the schedule places stages: linear, looped, v or bidirectional.");
  const auto options = [](bool overlap, bool reactive, std::vector<int> packs, std::vector<int> packs_forward,
                          const std::optional<Memory>& memory, std::vector<Skip> skips) {
    return PlanOptions{overlap,
                       reactive,
                       {std::move(packs_forward), std::move(packs), std::move(skips)},
                       memory.value_or(Memory{})};
  };
  m.def(
      "make_plan",
      [options](const std::string& name, int num_stages, int num_ranks, int microbatches, bool overlap,
                bool reactive, std::vector<int> packs, std::vector<int> packs_forward,
                std::vector<int> in_flight, std::vector<int> room, const std::optional<Memory>& memory,
                std::vector<Skip> skips) {
        return make_shared_plan([&] {
          return make_plan(find_schedule(name), num_stages, num_ranks, microbatches,
                           options(overlap, reactive, packs, packs_forward, memory, skips),
                           Slots{in_flight, room});
        });
      },
      py::arg("schedule"), py::arg("num_stages"), py::arg("num_ranks"), py::arg("microbatches"), py::kw_only(),
      py::arg("overlap") = false, py::arg("reactive") = false, py::arg("packs") = py::list(),
      py::arg("packs_forward") = py::list(), py::arg("in_flight") = py::list(), py::arg("room") = py::list(),
      py::arg("memory") = py::none(), py::arg("skips") = py::list());
  m.def(
      "rank_of_stage",
      [](const std::string& layout, int num_stages, int num_ranks) {
        return place({layout, layout_of_name(layout), {}}, num_stages, num_ranks).rank_of_stage;
      },
      py::arg("placement"), py::arg("num_stages"), py::arg("num_ranks"));
  m.def(
      "plan_of_rule",
      [options](const std::string& layout, const std::vector<std::string>& preference,
                const std::vector<int>& limits, int num_ranks, int microbatches, bool overlap, bool reactive,
                std::vector<int> packs, std::vector<int> packs_forward, std::vector<int> in_flight,
                std::vector<int> room, const std::optional<Memory>& memory, std::vector<Skip> skips) {
        return make_shared_plan([&] {
          Rule rule{{}, [&](const Placement&, int stage, int m) { return std::min(limits[stage], m); }};
          for (const std::string& kind : preference) rule.preference.push_back(kind_of(kind));
          const int num_stages = static_cast<int>(limits.size());
          return make_plan({layout, layout_of_name(layout), rule}, num_stages, num_ranks, microbatches,
                           options(overlap, reactive, packs, packs_forward, memory, skips),
                           Slots{in_flight, room});
        });
      },
      py::arg("placement"), py::arg("preference"), py::arg("limits"), py::arg("num_ranks"),
      py::arg("microbatches"), py::kw_only(), py::arg("overlap") = false, py::arg("reactive") = false,
      py::arg("packs") = py::list(), py::arg("packs_forward") = py::list(), py::arg("in_flight") = py::list(),
      py::arg("room") = py::list(), py::arg("memory") = py::none(), py::arg("skips") = py::list(),
      "The plan of a rule. limits: slots by stage.");
  m.def(
      "plan_of_cells",
      [options](const Cells& cells, bool overlap, bool reactive, std::vector<int> packs,
                std::vector<int> packs_forward, std::vector<int> in_flight, std::vector<int> room,
                const std::optional<Memory>& memory, std::vector<Skip> skips) {
        return make_shared_plan([&] {
          return make_plan(parse_order(cells), options(overlap, reactive, packs, packs_forward, memory, skips),
                           Slots{in_flight, room});
        });
      },
      py::arg("cells"), py::kw_only(), py::arg("overlap") = false, py::arg("reactive") = false,
      py::arg("packs") = py::list(), py::arg("packs_forward") = py::list(), py::arg("in_flight") = py::list(),
      py::arg("room") = py::list(), py::arg("memory") = py::none(), py::arg("skips") = py::list());
  m.def(
      "cells_of_csv",
      [](const std::string& text) { return interruptible([&] { return to_cells(order_from_csv(text)); }); },
      py::arg("text"), "The cells of a CSV file, by rank, without empty ones.");
  m.def(
      "make_forward_plan",
      [](const std::vector<int>& rank_of_stage, int num_ranks, int microbatches, bool overlap,
         std::vector<Skip> skips, bool reactive) {
        return make_shared_plan([&] {
          return make_forward_plan(rank_of_stage, num_ranks, microbatches, overlap, skips, reactive);
        });
      },
      py::arg("rank_of_stage"), py::arg("num_ranks"), py::arg("microbatches"), py::kw_only(),
      py::arg("overlap") = false, py::arg("skips") = py::list(), py::arg("reactive") = true);
}

}  // namespace pe
