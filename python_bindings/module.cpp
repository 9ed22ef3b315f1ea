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
#include "ops/embedding/embedding.h"
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
  py::class_<dpn::Recording, std::shared_ptr<dpn::Recording>>(m, "Recording")
      .def(py::init<>())
      .def("begin", &dpn::Recording::begin)
      .def("end", &dpn::Recording::end)
      .def("replay", &dpn::Recording::replay, release_gil())
      .def("__len__", &dpn::Recording::size);
}

template <class Op>
void def_op(py::module_& m, const char* name, Op* op) {
  m.def(name, dpn::python::recorded(op), release_gil());
}

// Sizes that Python asks for before it calls an op are not recorded: shapes decide them, or they are refused.
void bind_ops(py::module_& m) {
  def_op(m, "activation", &dpn::activation);
  def_op(m, "add_layer_norm", &dpn::add_layer_norm);
  def_op(m, "add_rms_norm", &dpn::add_rms_norm);
  def_op(m, "advance_layout", &dpn::advance_layout);
  def_op(m, "attention", &dpn::attention);
  def_op(m, "attention_decode", &dpn::attention_decode);
  m.def("attention_decode_workspace_size", &dpn::attention_decode_workspace_size, release_gil());
  def_op(m, "attention_extend", &dpn::attention_extend);
  def_op(m, "depthwise_conv", &dpn::depthwise_conv);
  def_op(m, "dequantize", &dpn::dequantize);
  def_op(m, "embedding", &dpn::embedding);
  def_op(m, "kept_rows", &dpn::kept_rows);
  def_op(m, "last_row_scores", &dpn::last_row_scores);
  def_op(m, "last_row_scores_paged", &dpn::last_row_scores_paged);
  m.def("last_row_scores_workspace_size", &dpn::last_row_scores_workspace_size);
  def_op(m, "layer_norm", &dpn::layer_norm);
  def_op(m, "linear", &dpn::linear);
  def_op(m, "linear_int4", &dpn::linear_int4);
  def_op(m, "linear_int8", &dpn::linear_int8);
  m.def("packed_size", dpn::python::not_recorded("packed_size", &dpn::packed_size));
  def_op(m, "pool", &dpn::pool);
  def_op(m, "quantize", &dpn::quantize);
  def_op(m, "rms_norm", &dpn::rms_norm);
  def_op(m, "rope_store", &dpn::rope_store);
  def_op(m, "route", &dpn::route);
  m.def("route_workspace_size", &dpn::route_workspace_size);
  def_op(m, "sample", &dpn::sample);
  def_op(m, "sample_greedy", &dpn::sample_greedy);
  def_op(m, "segmented_top_k", &dpn::segmented_top_k);
  def_op(m, "silu_mul", &dpn::silu_mul);
}

}  // namespace

PYBIND11_MODULE(_kernels, m, py::mod_gil_not_used()) {
  register_errors();
  bind_machine(m);
  bind_recording(m);
  bind_ops(m);
}
