// SPDX-License-Identifier: Apache-2.0
// Operators of tensors on the virtual device: each is run by its CPU kernel on the same memory, after the checks of where
// its operands are that CUDA's kernels make.
#include "device.h"

#include <ATen/EmptyTensor.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/InferSize.h>
#include <ATen/TensorUtils.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <cstring>
#include <mutex>
#include <unordered_map>
#include <unordered_set>

namespace virtual_cuda {
namespace {

using c10::Device;
using c10::DeviceType;
using torch::jit::Stack;

// Operators of which CUDA leaves the check of devices to TensorIterator, which takes a CPU tensor without dimensions as a
// number. build.py reads them from the declarations that torch ships (device_check: NoCheck); every other operator takes
// no CPU tensor at all.
const std::unordered_set<std::string> kTakesNumbers{
#include "takes_numbers.inc"
};

// ---- what is to be known of an operator, found once -------------------------------------------------------------------
struct Operator {
  std::string name;              // with its overload: aten::add.Tensor
  bool takes_numbers = false;
  bool indexes = false;          // by a list of tensors that are brought over from the CPU
  bool writes_at = false;        // those indices
  bool draws = false;            // from a random generator
  bool depends_on_data = false;  // its result's shape or value on the host does: the host waits
  std::optional<size_t> generator;
};

Operator inspect(const c10::OperatorHandle& handle) {
  const auto& schema = handle.schema();
  const auto& overload = schema.overload_name();
  Operator op;
  op.name = schema.operator_name().name + (overload.empty() ? "" : "." + overload);
  const auto& base = schema.operator_name().name;
  op.writes_at = base == "aten::_index_put_impl_";
  op.indexes = op.writes_at || base == "aten::index" || base == "aten::_unsafe_index";
  op.takes_numbers = op.indexes || base.rfind("aten::", 0) != 0 || kTakesNumbers.count(op.name.substr(6)) > 0;
  op.depends_on_data = handle.hasTag(at::Tag::dynamic_output_shape) || handle.hasTag(at::Tag::data_dependent_output);
  for (size_t i = 0; i < schema.arguments().size(); ++i)
    if (schema.arguments()[i].name() == "generator") op.generator = i;
  op.draws = op.generator || handle.hasTag(at::Tag::nondeterministic_seeded);
  return op;
}

std::mutex lock;
std::unordered_map<const void*, std::unique_ptr<Operator>> inspected;
std::map<std::string, int64_t> calls;

const Operator& called(const c10::OperatorHandle& handle) {
  std::lock_guard<std::mutex> guard(lock);
  auto& op = inspected[&handle.schema()];
  if (!op) op = std::make_unique<Operator>(inspect(handle));
  ++calls[op->name];
  return *op;
}

// ---- where the operands are --------------------------------------------------------------------------------------------
template <class Visit>
void each_tensor(const c10::IValue& value, Visit visit) {
  if (value.isTensor()) {
    visit(value.toTensor());
  } else if (value.isTensorList()) {
    for (const at::Tensor& tensor : value.toTensorVector()) visit(tensor);
  } else if (value.isOptionalTensorList()) {
    for (const std::optional<at::Tensor>& tensor : value.toOptionalTensorVector())
      if (tensor) visit(*tensor);
  }
}

c10::IValue moved(const c10::IValue& value, const std::function<at::Tensor(const at::Tensor&)>& move) {
  if (value.isTensor()) return move(value.toTensor());
  if (value.isTensorList()) {
    c10::List<at::Tensor> list;
    for (const at::Tensor& tensor : value.toTensorVector()) list.push_back(move(tensor));
    return list;
  }
  if (value.isOptionalTensorList()) {
    c10::List<std::optional<at::Tensor>> list;
    for (const std::optional<at::Tensor>& tensor : value.toOptionalTensorVector())
      list.push_back(tensor ? std::optional<at::Tensor>(move(*tensor)) : tensor);
    return list;
  }
  return value;
}

// The device of the operands, or the one that a factory asks for, or the current one.
Device device_of(const Operator& op, const std::vector<c10::IValue>& arguments) {
  std::optional<Device> found, asked;
  for (const auto& argument : arguments) {
    if (argument.isDevice()) asked = argument.toDevice();
    each_tensor(argument, [&](const at::Tensor& tensor) {
      if (!tensor.defined() || !tensor.is_cuda()) return;
      TORCH_CHECK(!found || *found == tensor.device(), op.name, ": Expected all tensors to be on the same device, but found ",
                  "at least two devices, ", *found, " and ", tensor.device(), "!");
      found = tensor.device();
    });
  }
  return found ? *found : resolved(asked && asked->is_cuda() ? asked : std::nullopt);
}

void check_operands(const Operator& op, const c10::FunctionSchema& schema, const std::vector<c10::IValue>& arguments,
                    Device device) {
  bool any_on_device = false;
  for (const auto& argument : arguments)
    each_tensor(argument, [&](const at::Tensor& tensor) { any_on_device |= tensor.defined() && tensor.is_cuda(); });
  if (!any_on_device) return;
  for (size_t i = 0; i < arguments.size(); ++i) {
    const auto* written = schema.arguments()[i].alias_info();
    const bool output = written != nullptr && written->isWrite();
    const bool index = op.indexes && schema.arguments()[i].name() == "indices";
    each_tensor(arguments[i], [&](const at::Tensor& tensor) {
      if (!tensor.defined() || !tensor.is_cpu() || index) return;
      TORCH_CHECK(op.takes_numbers && tensor.dim() == 0 && !output, op.name,
                  ": Expected all tensors to be on the same device, but found at least two devices, ", device,
                  " and cpu! (argument ", schema.arguments()[i].name(), ")");
    });
  }
}

// ---- when the host waits -----------------------------------------------------------------------------------------------
bool is_mask(const at::Tensor& index) { return index.scalar_type() == at::kBool || index.scalar_type() == at::kByte; }

void note_synchronisation(const Operator& op, const std::vector<c10::IValue>& arguments) {
  if (op.indexes) {
    int masks = 0, others = 0, on_host = 0;
    each_tensor(arguments[1], [&](const at::Tensor& index) {
      if (!index.defined()) return;
      (is_mask(index) ? masks : others) += 1;
      on_host += index.is_cpu();
    });
    // Reading by a mask has asked aten::nonzero by now, which counts. Writing one number of the host by one mask is
    // masked_fill, and any other writing by a mask asks for the places, too.
    const bool fills = op.writes_at && masks == 1 && others == 0 && arguments[2].toTensor().numel() == 1 &&
        arguments[2].toTensor().is_cpu() && !arguments[3].toBool();
    if (on_host > 0) synchronised(op.name + " (index on the host)");
    if (masks > 0 && op.writes_at && !fills) synchronised(op.name + " (mask)");
  } else if (op.depends_on_data) {
    const bool told = op.name == "aten::repeat_interleave.Tensor" && !arguments[1].isNone();
    if (!told) synchronised(op.name);
  }
}

// ---- the operator ------------------------------------------------------------------------------------------------------
// A kernel that takes no generator draws from the CPU's: it is lent the device's for as long.
struct LentGenerator {
  at::Generator cpu = at::detail::getDefaultCPUGenerator();
  at::Tensor saved;
  explicit LentGenerator(const at::Generator& device) {
    std::lock_guard<std::mutex> guard(cpu.mutex());
    saved = cpu.get_state();
    cpu.set_state(device.get_state());
  }
  ~LentGenerator() {
    std::lock_guard<std::mutex> guard(cpu.mutex());
    cpu.set_state(saved);
  }
};

// An argument that the kernel wrote to: its host alias may have been given another shape, or memory.
void take_over(const at::Tensor& mine, const at::Tensor& theirs) {
  if (!mine.defined() || !mine.is_cuda()) return;
  if (mine.storage().data() != theirs.storage().data()) {
    auto* storage = mine.storage().unsafeGetStorageImpl();
    storage->set_data_ptr_noswap(adopt(theirs.storage(), mine.device().index()));
    storage->set_nbytes(theirs.storage().nbytes());
  }
  if (mine.sizes() != theirs.sizes() || mine.strides() != theirs.strides())
    mine.unsafeGetTensorImpl()->set_sizes_and_strides(theirs.sizes(), theirs.strides(), theirs.storage_offset());
}

// Replace the results on the stack: of an argument that is written to that argument, of all else the device's tensor.
void return_results(const c10::FunctionSchema& schema, const std::vector<c10::IValue>& arguments, Stack* stack,
                    Device device, bool to_the_host) {
  const auto first = stack->size() - schema.returns().size();
  for (size_t r = 0; r < schema.returns().size(); ++r) {
    auto& result = (*stack)[first + r];
    const auto* written = schema.returns()[r].alias_info();
    if (written == nullptr || !written->isWrite()) {
      if (!to_the_host) result = moved(result, [&](const at::Tensor& tensor) { return to_device(tensor, device); });
      continue;
    }
    for (size_t a = 0; a < arguments.size(); ++a) {
      const auto* into = schema.arguments()[a].alias_info();
      if (into == nullptr || !into->isWrite() || into->beforeSet() != written->beforeSet()) continue;
      if (arguments[a].isTensor() && result.isTensor()) take_over(arguments[a].toTensor(), result.toTensor());
      result = arguments[a];
      break;
    }
  }
}

void run_on_host(const c10::OperatorHandle& handle, Stack* stack) {
  const auto& op = called(handle);
  const auto& schema = handle.schema();
  const auto begin = stack->size() - schema.arguments().size();
  const std::vector<c10::IValue> arguments(stack->begin() + static_cast<int64_t>(begin), stack->end());
  const auto device = device_of(op, arguments);
  check_operands(op, schema, arguments, device);
  note_synchronisation(op, arguments);

  bool to_the_host = false;
  for (size_t i = 0; i < arguments.size(); ++i) {
    auto& argument = (*stack)[begin + i];
    if (argument.isDevice()) {
      to_the_host = argument.toDevice().is_cpu();
      argument = Device(DeviceType::CPU);
    } else {
      argument = moved(argument, to_host);
    }
  }
  std::optional<LentGenerator> lent;
  if (op.draws) {
    const auto given = op.generator ? arguments[*op.generator].toOptional<at::Generator>() : std::nullopt;
    const auto drawn = next_draw(given, device);
    if (op.generator) (*stack)[begin + *op.generator] = drawn;
    else lent.emplace(drawn);
  }
  handle.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  lent.reset();
  return_results(schema, arguments, stack, device, to_the_host);
}

// ---- operators that make, view or move memory, and so must know the device --------------------------------------------
at::Tensor empty(c10::SymIntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                 std::optional<Device> device, std::optional<bool> pin, std::optional<at::MemoryFormat> format) {
  TORCH_CHECK(!pin.value_or(false), "Only dense CPU tensors can be pinned");
  const auto before = exchange_device(resolved(device).index());
  auto made = at::detail::empty_generic(C10_AS_INTARRAYREF_SLOW(size), device_allocator(),
                                        c10::DispatchKeySet(c10::DispatchKey::CUDA), c10::dtype_or_default(dtype), format);
  exchange_device(before);
  return made;
}

at::Tensor empty_strided(c10::SymIntArrayRef size, c10::SymIntArrayRef stride, std::optional<at::ScalarType> dtype,
                         std::optional<at::Layout>, std::optional<Device> device, std::optional<bool> pin) {
  TORCH_CHECK(!pin.value_or(false), "Only dense CPU tensors can be pinned");
  const auto before = exchange_device(resolved(device).index());
  auto made = at::detail::empty_strided_generic(C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride),
                                                device_allocator(), c10::DispatchKeySet(c10::DispatchKey::CUDA),
                                                c10::dtype_or_default(dtype));
  exchange_device(before);
  return made;
}

at::Tensor& copy_(at::Tensor& self, const at::Tensor& source, bool non_blocking) {
  if (self.numel() > 0 && self.is_cuda() != source.is_cuda() && !non_blocking)
    synchronised(self.is_cuda() ? "aten::copy_ (host to device)" : "aten::copy_ (device to host)");
  to_host(self).copy_(to_host(source));
  return self;
}

at::Tensor as_strided(const at::Tensor& self, c10::SymIntArrayRef size, c10::SymIntArrayRef stride,
                      std::optional<c10::SymInt> offset) {
  auto result = at::detail::make_tensor<c10::TensorImpl>(c10::TensorImpl::VIEW, c10::Storage(self.storage()),
                                                         self.key_set(), self.dtype());
  auto* impl = result.unsafeGetTensorImpl();
  impl->set_storage_offset(offset ? offset->expect_int() : self.storage_offset());
  impl->set_sizes_and_strides(C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride));
  return result;
}

at::Tensor view(const at::Tensor& self, c10::SymIntArrayRef size) {
  const auto sizes = at::infer_size_dv(C10_AS_INTARRAYREF_SLOW(size), self.numel());
  const auto strides = at::detail::computeStride(self.sizes(), self.strides(), sizes);
  TORCH_CHECK(strides.has_value(), "view size is not compatible with input tensor's size and stride; use reshape");
  return as_strided(self, c10::fromIntArrayRefSlow(sizes), c10::fromIntArrayRefSlow(*strides), std::nullopt);
}

at::Tensor view_dtype(const at::Tensor& self, at::ScalarType dtype) {
  return to_device(to_host(self).view(dtype), self.device());
}

at::Tensor alias(const at::Tensor& self) {
  return as_strided(self, self.sym_sizes(), self.sym_strides(), std::nullopt);
}

at::Scalar local_scalar(const at::Tensor& self) {
  synchronised("aten::_local_scalar_dense");
  return at::_local_scalar_dense(to_host(self));
}

const at::Tensor& resize_(const at::Tensor& self, c10::SymIntArrayRef size, std::optional<at::MemoryFormat>) {
  const auto sizes = C10_AS_INTARRAYREF_SLOW(size);
  const auto need = (c10::multiply_integers(sizes) + self.storage_offset()) * static_cast<int64_t>(self.element_size());
  auto* storage = self.storage().unsafeGetStorageImpl();
  if (static_cast<int64_t>(storage->nbytes()) < need) {
    auto data = allocate(need, self.device().index());
    if (storage->nbytes() > 0) std::memcpy(data.mutable_get(), storage->data(), storage->nbytes());
    storage->set_data_ptr_noswap(std::move(data));
    storage->set_nbytes(need);
  }
  self.unsafeGetTensorImpl()->set_sizes_contiguous(sizes);
  return self;
}

at::Tensor& set_storage(at::Tensor& self, at::Storage source, c10::SymInt offset, c10::SymIntArrayRef size,
                        c10::SymIntArrayRef stride) {
  TORCH_CHECK(source.device() == self.device(), "Attempted to set the storage of a tensor on device ", self.device(),
              " to a storage on different device ", source.device());
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(std::move(source));
  impl->set_storage_offset(offset.expect_int());
  const auto sizes = C10_AS_INTARRAYREF_SLOW(size);
  if (stride.empty() && !size.empty()) impl->set_sizes_contiguous(sizes);
  else impl->set_sizes_and_strides(sizes, C10_AS_INTARRAYREF_SLOW(stride));
  return self;
}

at::Tensor& set_whole_storage(at::Tensor& self, at::Storage source) {
  const auto elements = static_cast<int64_t>(source.nbytes() / self.element_size());
  return set_storage(self, std::move(source), 0, {c10::SymInt(elements)}, {c10::SymInt(1)});
}

at::Tensor& set_tensor(at::Tensor& self, const at::Tensor& source) {
  return set_storage(self, source.storage(), source.sym_storage_offset(), source.sym_sizes(), source.sym_strides());
}

void record_stream(at::Tensor&, c10::Stream) {}  // nothing is still running when memory is released

int64_t sdp_choice(const at::Tensor&, const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&, double, bool,
                   std::optional<double>, bool) {
  return 0;  // SDPBackend::math, the one that needs no kernel of its own
}

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("copy_", copy_);
  m.impl("as_strided", as_strided);
  m.impl("view", view);
  m.impl("view.dtype", view_dtype);
  m.impl("alias", alias);
  m.impl("_local_scalar_dense", local_scalar);
  m.impl("resize_", resize_);
  m.impl("set_.source_Storage_storage_offset", set_storage);
  m.impl("set_.source_Storage", set_whole_storage);
  m.impl("set_.source_Tensor", set_tensor);
  m.impl("record_stream", record_stream);
  m.impl("_fused_sdp_choice", sdp_choice);
  // Composites that would choose among CUDA's kernels by the device that they see.
  for (const char* name : {"convolution", "convolution_backward", "_convolution"})
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&run_on_host>());
}

TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&run_on_host>()); }

}  // namespace

std::map<std::string, int64_t> operator_calls() {
  std::lock_guard<std::mutex> guard(lock);
  return calls;
}

}  // namespace virtual_cuda
