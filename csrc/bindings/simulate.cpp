#include <pybind11/stl.h>

#include <tuple>

#include "bindings/checks.hpp"
#include "bindings/module.hpp"
#include "bindings/poll.hpp"
#include "plan/size.hpp"
#include "simulate/lower_bound.hpp"
#include "simulate/simulator.hpp"

namespace py = pybind11;

namespace pe {
namespace {

Costs make_costs(std::vector<double> forward, std::vector<double> backward, std::vector<double> input_grad,
                 std::vector<double> weight_grad, std::vector<double> latency, std::vector<double> overhead,
                 std::vector<double> transfer, double contention, double pair, std::vector<double> taken,
                 std::vector<double> freed_by_input_grad, std::vector<double> memory_limit,
                 std::vector<double> microbatch, const std::tuple<int, int, int>& microbatch_shape) {
  const auto [stages, microbatches, kinds] = microbatch_shape;
  return {std::move(forward),
          std::move(backward),
          std::move(input_grad),
          std::move(weight_grad),
          std::move(latency),
          std::move(overhead),
          std::move(transfer),
          contention,
          pair,
          std::move(taken),
          std::move(freed_by_input_grad),
          std::move(memory_limit),
          {},
          MicrobatchFactors(std::move(microbatch), {stages, microbatches, kinds})};
}

Costs with_noise(Costs costs, double cv, std::uint64_t seed) {
  costs.noise = {cv, seed};
  return costs;
}

}  // namespace

void bind_simulate(py::module_& m) {
  py::class_<Costs, std::shared_ptr<Costs>>(m, "CostsByStage")
      .def(py::init(&make_costs), py::kw_only(), py::arg("forward"), py::arg("backward"), py::arg("input_grad"),
           py::arg("weight_grad"), py::arg("latency"), py::arg("overhead"), py::arg("transfer"),
           py::arg("contention"), py::arg("pair"), py::arg("taken"), py::arg("freed_by_input_grad"),
           py::arg("memory_limit"), py::arg("microbatch"), py::arg("microbatch_shape"))
      .def(
          "memory",
          [](const Costs& costs, int num_stages) {
            check_size(num_stages, 1, 1);
            return costs.memory(num_stages);
          },
          py::arg("num_stages"))
      .def("with_noise", &with_noise, py::arg("cv"), py::arg("seed"));

  py::class_<Simulation, std::shared_ptr<Simulation>>(m, "SimulatedTimes")
      .def_readonly("makespan", &Simulation::makespan)
      .def_readonly("begin", &Simulation::begin)
      .def_readonly("peak_in_flight", &Simulation::peak_in_flight)
      .def_readonly("peak_in_flight_of_stage", &Simulation::peak_in_flight_of_stage)
      .def_readonly("working_bytes", &Simulation::working_bytes)
      .def_readonly("peak_memory", &Simulation::peak_memory)
      .def_readonly("first_start", &Simulation::first_start)
      .def_readonly("finish", &Simulation::finish)
      .def_property_readonly("bubble", &Simulation::bubble)
      .def_property_readonly("bubble_latest", &Simulation::bubble_latest)
      .def_property_readonly("bubble_from_first_start", &Simulation::bubble_from_first_start)
      .def(
          "bubble_of",
          [](const Simulation& s, int rank) { return s.bubble_of(checked("rank", rank, s.busy.size())); },
          py::arg("rank"));

  m.def(
      "simulate",
      [](const Plan& plan, const Costs& costs, bool by_events, bool apart) {
        return interruptible([&] { return simulate(plan, costs, by_events, apart); });
      },
      py::arg("plan"), py::arg("costs"), py::arg("by_events") = false, py::arg("apart") = false);
  m.def(
      "lower_bound",
      [](const std::vector<int>& rank_of_stage, int num_ranks, int microbatches, const Costs& costs) {
        const LowerBound bound =
            interruptible([&] { return lower_bound(rank_of_stage, num_ranks, microbatches, costs); });
        return py::make_tuple(bound.makespan, bound.span);
      },
      py::arg("rank_of_stage"), py::arg("num_ranks"), py::arg("microbatches"), py::arg("costs"),
      "(makespan, span): lower bounds of any order of a training step on ranks that run one task at a time.");
  m.def("end_times", &end_times, py::arg("plan"), py::arg("costs"), py::arg("times"));
  m.def(
      "simulated_order",
      [](const Plan& plan, const Simulation& times) {
        return interruptible([&] { return to_cells(order_of(plan, times)); });
      },
      py::arg("plan"), py::arg("times"));
}

}  // namespace pe
