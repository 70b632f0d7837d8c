// SPDX-License-Identifier: Apache-2.0
// What the parts of the virtual device know of each other.
//
//   device.cpp       memory, the current device, streams and events, random generators, synchronisations
//   operators.cpp    the operators of tensors on the device
//   collectives.cpp  NCCL
//   module.cpp       what Python sees of all that
#pragma once

#include <ATen/ATen.h>
#include <c10/core/Allocator.h>

#include <functional>
#include <map>
#include <string>

namespace virtual_cuda {

constexpr c10::DeviceIndex kDevices = 8;

// ---- the current device and streams, of this thread --------------------------------------------------------------------
c10::DeviceIndex current_device();
c10::DeviceIndex exchange_device(c10::DeviceIndex index);  // refuses one that does not exist
int64_t current_stream(c10::DeviceIndex index);
void set_stream(c10::DeviceIndex index, int64_t stream);
c10::Device resolved(std::optional<c10::Device> device);  // "cuda" means the current device

// ---- memory ------------------------------------------------------------------------------------------------------------
struct MemoryUse {
  int64_t allocated = 0, peak = 0;        // bytes of storages that live
  int64_t blocks = 0, peak_blocks = 0;    // how many they are
};
MemoryUse memory_use(c10::DeviceIndex index);
void reset_peak(c10::DeviceIndex index);
c10::Allocator* device_allocator();
c10::DataPtr allocate(size_t bytes, c10::DeviceIndex index);

// The same tensor on the CPU, and a result of the CPU on the device: same memory, no copy. What is undefined stays so.
at::Tensor to_host(const at::Tensor& tensor);
at::Tensor to_device(const at::Tensor& tensor, c10::Device device);
// Memory of a CPU storage as the device's own, which keeps that storage alive and counts it.
c10::DataPtr adopt(const c10::Storage& storage, c10::DeviceIndex index);

// ---- randomness --------------------------------------------------------------------------------------------------------
const at::Generator& default_generator(c10::DeviceIndex index);
// A CPU generator for the next draw of the device's own, which moves on; refuses a generator of another device.
at::Generator next_draw(const std::optional<at::Generator>& generator, c10::Device device);

// ---- waits of the host for the device ----------------------------------------------------------------------------------
void synchronised(const std::string& by);
std::map<std::string, int64_t> synchronisations();
void on_synchronisation(std::function<void(const std::string&)> listener);
int sync_debug_mode();  // of torch.cuda.set_sync_debug_mode: 0 says nothing, 1 warns, 2 refuses
void set_sync_debug_mode(int mode);

// ---- operators.cpp -----------------------------------------------------------------------------------------------------
std::map<std::string, int64_t> operator_calls();

}  // namespace virtual_cuda
