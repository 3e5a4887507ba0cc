#include "bindings/module.hpp"

namespace {

// A value of another type inside a list, a dict or an attribute, as pybind11 does for an argument itself.
void raise_type_errors() {
  pybind11::register_exception_translator(
      [](std::exception_ptr error) {  // NOLINT(performance-unnecessary-value-param): pybind11's type
        try {
          if (error) std::rethrow_exception(error);
        } catch (const pybind11::cast_error& failed) {
          pybind11::set_error(PyExc_TypeError, failed.what());
        }
      });
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() =
      "The native core of pipeline_ext: plans, schedules, the simulator, the search, the executors, packing.";
  m.attr("compiler") = "g++ " __VERSION__;
  raise_type_errors();
  pe::bind_plan(m);
  pe::bind_simulate(m);
  pe::bind_search(m);
  pe::bind_runtime(m);
  pe::bind_cuda(m);
  pe::bind_packing(m);
  pe::bind_message_template(m);
  pe::bind_model_state(m);
  pe::bind_turn(m);
}
