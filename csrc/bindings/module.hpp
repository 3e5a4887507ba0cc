// The parts of pipeline_ext._C, one function each.
#pragma once

#include <pybind11/pybind11.h>

namespace pe {

void bind_plan(pybind11::module_& m);
void bind_simulate(pybind11::module_& m);
void bind_runtime(pybind11::module_& m);
void bind_packing(pybind11::module_& m);

}  // namespace pe
