#include "bindings/module.hpp"

PYBIND11_MODULE(_C, m) {
  m.doc() =
      "The native core of pipeline_ext: plans, schedules, the simulator, the search, the executors, packing.";
  m.attr("compiler") = "g++ " __VERSION__;
  pe::bind_plan(m);
  pe::bind_simulate(m);
  pe::bind_search(m);
  pe::bind_runtime(m);
  pe::bind_cuda(m);
  pe::bind_packing(m);
  pe::bind_message_template(m);
}
