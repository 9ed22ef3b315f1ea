// One registration function per file of csrc/ops.
#pragma once

#include <pybind11/pybind11.h>

namespace dpn::python {

void bind_activation(pybind11::module_& m);
void bind_advance_layout(pybind11::module_& m);
void bind_attention(pybind11::module_& m);
void bind_linear(pybind11::module_& m);
void bind_norm(pybind11::module_& m);
void bind_pool(pybind11::module_& m);
void bind_rope(pybind11::module_& m);
void bind_route(pybind11::module_& m);
void bind_sample(pybind11::module_& m);

}  // namespace dpn::python
