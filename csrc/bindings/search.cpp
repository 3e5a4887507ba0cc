#include <pybind11/stl.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <future>
#include <tuple>

#include "bindings/module.hpp"
#include "bindings/poll.hpp"
#include "search/microbatch_order.hpp"
#include "search/zero_bubble_search.hpp"

namespace py = pybind11;

namespace pe {
namespace {

constexpr auto kPollPeriod = std::chrono::milliseconds(20);
constexpr long kMostWork = 1'000'000'000'000'000;  // more than a search ever ends
constexpr int kMostThreads = 256;

// Runs the search; stops it with the best order so far after `seconds` or on Ctrl-C. Throws Interrupted if that
// takes long after a Ctrl-C.
Found search_until(const Problem& problem, const std::vector<Order>& templates, Effort effort, double seconds,
                   bool& interrupted, SignalPoll& poll) {
  std::atomic<bool> stop{false}, give_up{false};
  effort.stop = &stop;
  effort.give_up = &give_up;
  int patience = 3;  // periods
  const auto begin = std::chrono::steady_clock::now();
  auto found = std::async(std::launch::async, [&] { return search_zero_bubble(problem, templates, effort); });
  while (found.wait_for(kPollPeriod) != std::future_status::ready) {
    const std::chrono::duration<double> passed = std::chrono::steady_clock::now() - begin;
    interrupted = interrupted || poll();
    if (interrupted || passed.count() > seconds) stop = true;
    if (interrupted && --patience == 0) give_up = true;
  }
  return found.get();
}

std::tuple<Cells, double, long, bool> search(const std::vector<int>& rank_of_stage, int num_ranks,
                                             int microbatches, const Costs& costs, bool span,
                                             const std::vector<Cells>& templates, long work, double seconds,
                                             std::uint64_t seed, int threads) {
  const auto problem = interruptible([&] {
    return Problem({num_ranks, rank_of_stage}, microbatches, costs,
                   span ? Objective::Span : Objective::Makespan);
  });
  const auto orders = interruptible([&] {
    std::vector<Order> parsed;
    parsed.reserve(templates.size());
    for (const Cells& given : templates) parsed.push_back(parse_order(given));
    return parsed;
  });
  Effort effort;
  effort.work = std::clamp(work, 1L, kMostWork);
  effort.seed = seed;
  effort.threads = std::clamp(threads, 1, kMostThreads);
  SignalPoll poll;
  bool interrupted = false;
  try {
    py::gil_scoped_release release;
    const Found found = search_until(problem, orders, effort, seconds, interrupted, poll);
    return {to_cells(problem.to_order(found.tokens)), found.score.time, found.trials, interrupted};
  } catch (const Interrupted&) {
    poll.rethrow();
    throw;
  }
}

}  // namespace

void bind_search(py::module_& m) {
  m.def("search_zero_bubble", &search, py::arg("rank_of_stage"), py::arg("num_ranks"), py::arg("microbatches"),
        py::arg("costs"), py::kw_only(), py::arg("span"), py::arg("templates"), py::arg("work"),
        py::arg("seconds"), py::arg("seed"), py::arg("threads"),
        R"(Searches for an order of ``F``, ``I`` and ``W``; returns (cells by rank, time, trials, interrupted).

``span``: minimise the largest time, over ranks, from a rank's first begin to its end, not the latest end.
``work`` bounds the number of tasks placed; a search that only ``work`` ends is determined by its seed.
``seconds`` and Ctrl-C end it with the best order so far; KeyboardInterrupt if there is none soon.)");
  m.def(
      "order_microbatches",
      [](const Plan& plan, const Costs& costs, int simulations, std::uint64_t seed) {
        const MicrobatchOrder found =
            interruptible([&] { return order_microbatches(plan, costs, simulations, seed); });
        return py::make_tuple(found.order, found.makespan, found.given);
      },
      py::arg("plan"), py::arg("costs"), py::arg("simulations"), py::arg("seed"),
      "(order, makespan, given): which given microbatch takes each position, the makespan with that order, and "
      "with the given one.");
}

}  // namespace pe
