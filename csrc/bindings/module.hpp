// The parts of pipeline_ext._C, one function each.
#pragma once

#include <pybind11/pybind11.h>

namespace pe {

// A class of pipeline_ext.errors, the only module of ours that the bindings know.
inline pybind11::object error_class(const char* name) {
  return pybind11::module_::import("pipeline_ext.errors").attr(name);
}

// From now on a C++ `Error` becomes the Python exception `name`.
template <class Error>
void translate(const char* name) {
  // Leaked on purpose: needed until the interpreter ends.
  static auto* const raised = new pybind11::object(error_class(name));
  pybind11::register_exception_translator(
      [](std::exception_ptr error) {  // NOLINT(performance-unnecessary-value-param): pybind11's type
        try {
          if (error) std::rethrow_exception(error);
        } catch (const Error& refused) {
          pybind11::set_error(*raised, refused.what());
        }
      });
}

void bind_plan(pybind11::module_& m);
void bind_simulate(pybind11::module_& m);
void bind_search(pybind11::module_& m);
void bind_runtime(pybind11::module_& m);
void bind_cuda(pybind11::module_& m);
void bind_packing(pybind11::module_& m);
void bind_message_template(pybind11::module_& m);
void bind_model_state(pybind11::module_& m);
void bind_turn(pybind11::module_& m);

}  // namespace pe
