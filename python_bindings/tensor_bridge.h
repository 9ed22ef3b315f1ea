// torch.Tensor -> dpn::Tensor without linking torch: through torch's DLPack exchange table where this torch has one
// (about 30 ns), else through the tensor's Python attributes.
#pragma once

#include <pybind11/pybind11.h>

#include "core/tensor.h"

namespace dpn::python {

// The layout of `tensor`; it borrows the memory, so the caller keeps the object alive. Raises TypeError when it is
// not a torch.Tensor.
Tensor to_tensor(pybind11::handle tensor);

}  // namespace dpn::python

namespace pybind11::detail {

template <>
struct type_caster<dpn::Tensor> {
  PYBIND11_TYPE_CASTER(dpn::Tensor, const_name("torch.Tensor"));

  bool load(handle source, bool) {
    if (source.is_none()) return false;
    value = dpn::python::to_tensor(source);
    return true;
  }
};

}  // namespace pybind11::detail
