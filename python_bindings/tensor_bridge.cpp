#include "tensor_bridge.h"

#include <stdexcept>
#include <string>

namespace py = pybind11;

namespace dpn::python {

namespace {

// The part of DLPack's stable C ABI (version 1) that is used here.
struct DlTensor {
  void* data;
  std::int32_t device_type;
  std::int32_t device_id;
  std::int32_t ndim;
  std::uint8_t type_code;
  std::uint8_t bits;
  std::uint16_t lanes;
  std::int64_t* shape;
  std::int64_t* strides;
  std::uint64_t byte_offset;
};

struct DlExchangeApi {
  struct {
    std::uint32_t major;
    std::uint32_t minor;
    DlExchangeApi* previous;
  } header;
  void* allocate;
  void* owned_from_object;
  void* owned_to_object;
  int (*view_from_object)(void* object, DlTensor* out);
  void* current_stream;
};

struct Torch {
  py::object tensor_type = py::module_::import("torch").attr("Tensor");
  py::object dtypes[9] = {dtype("float32"), dtype("bfloat16"), dtype("float16"), dtype("int32"),        dtype("int64"),
                          dtype("float64"), dtype("uint8"),    dtype("int8"),    dtype("float8_e4m3fn")};
  const DlExchangeApi* exchange = find_exchange();

  static py::object dtype(const char* dtype_name) { return py::module_::import("torch").attr(dtype_name); }

  const DlExchangeApi* find_exchange() const {
    if (!py::hasattr(tensor_type, "__dlpack_c_exchange_api__")) return nullptr;
    const py::capsule capsule = tensor_type.attr("__dlpack_c_exchange_api__");
    const auto* api = static_cast<const DlExchangeApi*>(PyCapsule_GetPointer(capsule.ptr(), capsule.name()));
    return api && api->header.major == 1 ? api : nullptr;
  }
};

const Torch& torch() {
  static const Torch* found = new Torch();  // never destroyed: Python may be gone by then
  return *found;
}

DType dtype_of(const DlTensor& t) {
  if (t.lanes != 1) return DType::other;
  if (t.type_code == 2 && t.bits == 32) return DType::f32;
  if (t.type_code == 4 && t.bits == 16) return DType::bf16;
  if (t.type_code == 2 && t.bits == 16) return DType::f16;
  if (t.type_code == 2 && t.bits == 64) return DType::f64;
  if (t.type_code == 0 && t.bits == 32) return DType::i32;
  if (t.type_code == 0 && t.bits == 64) return DType::i64;
  if (t.type_code == 1 && t.bits == 8) return DType::u8;
  if (t.type_code == 0 && t.bits == 8) return DType::i8;
  if (t.type_code == 10 && t.bits == 8) return DType::f8e4m3;
  return DType::other;
}

void check_ndim(std::int64_t ndim) {
  if (ndim > kMaxDims) throw py::value_error("tensor has " + std::to_string(ndim) + " dimensions, expected at most 8");
}

// False where DLPack has no word for the tensor (the meta device, for one); the attributes describe it then.
bool from_exchange(py::handle object, const DlExchangeApi& api, Tensor& t) {
  DlTensor view;
  if (api.view_from_object(object.ptr(), &view) != 0) {
    PyErr_Clear();
    return false;
  }
  check_ndim(view.ndim);
  t.data = static_cast<char*>(view.data) + view.byte_offset;
  t.dtype = dtype_of(view);
  t.device = view.device_type == 1 ? Device::cpu : view.device_type == 2 ? Device::cuda : Device::other;
  t.device_index = view.device_id;
  t.ndim = view.ndim;
  for (int i = 0; i < view.ndim; ++i) {
    t.shape[i] = view.shape[i];
    t.strides[i] = view.strides[i];
  }
  return true;
}

Tensor from_attributes(py::handle object) {
  Tensor t;
  const py::object device = object.attr("device");
  const std::string type = py::cast<std::string>(device.attr("type"));
  t.device = type == "cpu" ? Device::cpu : type == "cuda" ? Device::cuda : Device::other;
  if (!device.attr("index").is_none()) t.device_index = py::cast<std::int32_t>(device.attr("index"));
  const py::object dtype = object.attr("dtype");
  for (int i = 0; i < 9; ++i) {
    if (dtype.is(torch().dtypes[i])) t.dtype = static_cast<DType>(i);
  }
  const py::tuple shape = object.attr("shape");
  const py::tuple strides = object.attr("stride")();
  check_ndim(static_cast<std::int64_t>(shape.size()));
  t.ndim = static_cast<std::int32_t>(shape.size());
  for (std::size_t i = 0; i < shape.size(); ++i) {
    t.shape[i] = py::cast<std::int64_t>(shape[i]);
    t.strides[i] = py::cast<std::int64_t>(strides[i]);
  }
  t.data = reinterpret_cast<void*>(py::cast<std::uintptr_t>(object.attr("data_ptr")()));
  return t;
}

}  // namespace

Tensor to_tensor(py::handle object) {
  const Torch& library = torch();
  const int is_tensor = PyObject_IsInstance(object.ptr(), library.tensor_type.ptr());
  if (is_tensor != 1) {
    throw py::type_error("expected a torch.Tensor, got " + std::string(py::str(py::type::of(object))));
  }
  // The table belongs to torch.Tensor itself; subclasses (parameters among them) go the general way.
  if (library.exchange && py::type::of(object).is(library.tensor_type)) {
    Tensor t;
    if (from_exchange(object, *library.exchange, t)) return t;
  }
  return from_attributes(object);
}

}  // namespace dpn::python
