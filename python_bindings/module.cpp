// Registrations of the compiled kernels. Shapes and errors are documented in dpn_rt/ops, the only importer.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings.h"
#include "core/check.h"
#include "core/cpu_isa.h"
#include "core/cuda_dispatch.h"
#include "core/parallel.h"

namespace py = pybind11;

PYBIND11_MODULE(_kernels, m, py::mod_gil_not_used()) {
  py::register_exception_translator([](std::exception_ptr error) {
    try {
      if (error) std::rethrow_exception(error);
    } catch (const dpn::ArgumentError& e) {
      py::set_error(py::module_::import("dpn_rt.errors").attr("KernelArgumentError"), e.what());
    }
  });

  m.def("cpu_isa", [] { return dpn::name(dpn::cpu_isa()); });
  m.def("available_cpu_isas", [] {
    std::vector<std::string> names;
    for (auto isa : {dpn::CpuIsa::portable, dpn::CpuIsa::avx2, dpn::CpuIsa::avx512, dpn::CpuIsa::avx512_bf16}) {
      if (dpn::is_available(isa)) names.emplace_back(dpn::name(isa));
    }
    return names;
  });
  m.def("max_threads", &dpn::max_threads);
  m.attr("has_cuda") = dpn::kHasCuda;

  dpn::python::bind_activation(m);
  dpn::python::bind_advance_layout(m);
  dpn::python::bind_attention(m);
  dpn::python::bind_linear(m);
  dpn::python::bind_norm(m);
  dpn::python::bind_pool(m);
  dpn::python::bind_rope(m);
  dpn::python::bind_route(m);
  dpn::python::bind_sample(m);
}
