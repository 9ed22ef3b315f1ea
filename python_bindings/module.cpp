// Registrations of the compiled kernels, one direct registration each. Shapes and errors are documented in dpn_rt/ops,
// the only importer.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "core/check.h"
#include "core/cpu_isa.h"
#include "core/cuda_dispatch.h"
#include "core/parallel.h"
#include "core/recording.h"
#include "ops/activation/activation.h"
#include "ops/attention/attention.h"
#include "ops/convolution/depthwise_conv.h"
#include "ops/linear/linear.h"
#include "ops/norm/norm.h"
#include "ops/quantized/dequantize.h"
#include "ops/quantized/linear_int4.h"
#include "ops/quantized/linear_int8.h"
#include "ops/quantized/quantize.h"
#include "ops/reduction/advance_layout.h"
#include "ops/reduction/kept_rows.h"
#include "ops/reduction/last_row_scores.h"
#include "ops/reduction/pool.h"
#include "ops/reduction/route.h"
#include "ops/reduction/segmented_top_k.h"
#include "ops/rope/rope.h"
#include "ops/sampling/sample.h"
#include "recorded.h"
#include "tensor_bridge.h"

namespace py = pybind11;

namespace {

void register_errors() {
  py::register_exception_translator([](std::exception_ptr error) {
    try {
      if (error) std::rethrow_exception(error);
    } catch (const dpn::ArgumentError& e) {
      py::set_error(py::module_::import("dpn_rt.errors").attr("KernelArgumentError"), e.what());
    }
  });
}

// The value of an enumeration by its name. Throws ValueError, which lists the names.
template <class Value, std::size_t kSize>
Value by_name(const Value (&values)[kSize], const std::string& name) {
  std::string names;
  for (const Value value : values) {
    if (name == dpn::name(value)) return value;
    names += std::string(names.empty() ? "" : ", ") + dpn::name(value);
  }
  throw py::value_error(dpn::quoted(name) + " is unknown, expected one of: " + names);
}

void bind_machine(py::module_& m) {
  m.def("cpu_isa", [] { return dpn::name(dpn::cpu_isa()); });
  m.def("tuned_cpu_isa", [](const std::string& op) { return dpn::name(dpn::cpu_isa(by_name(dpn::kTunedOps, op))); });
  m.def("tune_cpu_isa", [](const std::string& op, const std::string& isa) {
    dpn::set_cpu_isa(by_name(dpn::kTunedOps, op), by_name(dpn::kCpuIsas, isa));
  });
  m.def("available_cpu_isas", [] {
    std::vector<std::string> names;
    for (const dpn::CpuIsa isa : dpn::kCpuIsas) {
      if (dpn::is_available(isa)) names.emplace_back(dpn::name(isa));
    }
    return names;
  });
  m.def("max_threads", &dpn::max_threads);
  m.attr("has_cuda") = dpn::kHasCuda;
  m.attr("cuda_head_dims") = py::make_tuple(DPN_CUDA_HEAD_DIMS);
}

using release_gil = py::call_guard<py::gil_scoped_release>;

void bind_recording(py::module_& m) {
  py::class_<dpn::Recording>(m, "Recording")
      .def(py::init<>())
      .def("begin", &dpn::Recording::begin)
      .def("end", &dpn::Recording::end)
      .def("replay", &dpn::Recording::replay, release_gil())
      .def("__len__", &dpn::Recording::size);
}

// Those that return a size are asked before an op. A size that shapes alone decide needs no recording.
void bind_ops(py::module_& m) {
  using dpn::python::not_recorded, dpn::python::recorded;
  m.def("activation", recorded(&dpn::activation), release_gil());
  m.def("add_layer_norm", recorded(&dpn::add_layer_norm), release_gil());
  m.def("add_rms_norm", recorded(&dpn::add_rms_norm), release_gil());
  m.def("advance_layout", recorded(&dpn::advance_layout), release_gil());
  m.def("attention", recorded(&dpn::attention), release_gil());
  m.def("attention_decode", recorded(&dpn::attention_decode), release_gil());
  m.def("attention_decode_workspace_size", &dpn::attention_decode_workspace_size, release_gil());
  m.def("attention_extend", recorded(&dpn::attention_extend), release_gil());
  m.def("depthwise_conv", recorded(&dpn::depthwise_conv), release_gil());
  m.def("dequantize", recorded(&dpn::dequantize), release_gil());
  m.def("kept_rows", recorded(&dpn::kept_rows), release_gil());
  m.def("last_row_scores", recorded(&dpn::last_row_scores), release_gil());
  m.def("last_row_scores_paged", recorded(&dpn::last_row_scores_paged), release_gil());
  m.def("last_row_scores_workspace_size", &dpn::last_row_scores_workspace_size);
  m.def("layer_norm", recorded(&dpn::layer_norm), release_gil());
  m.def("linear", recorded(&dpn::linear), release_gil());
  m.def("linear_int4", recorded(&dpn::linear_int4), release_gil());
  m.def("linear_int8", recorded(&dpn::linear_int8), release_gil());
  m.def("packed_size", not_recorded("packed_size", &dpn::packed_size));
  m.def("pool", recorded(&dpn::pool), release_gil());
  m.def("quantize", recorded(&dpn::quantize), release_gil());
  m.def("rms_norm", recorded(&dpn::rms_norm), release_gil());
  m.def("rope_store", recorded(&dpn::rope_store), release_gil());
  m.def("route", recorded(&dpn::route), release_gil());
  m.def("route_workspace_size", &dpn::route_workspace_size);
  m.def("sample", recorded(&dpn::sample), release_gil());
  m.def("sample_greedy", recorded(&dpn::sample_greedy), release_gil());
  m.def("segmented_top_k", recorded(&dpn::segmented_top_k), release_gil());
  m.def("silu_mul", recorded(&dpn::silu_mul), release_gil());
}

}  // namespace

PYBIND11_MODULE(_kernels, m, py::mod_gil_not_used()) {
  register_errors();
  bind_machine(m);
  bind_recording(m);
  bind_ops(m);
}
