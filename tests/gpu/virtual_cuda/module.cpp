// SPDX-License-Identifier: Apache-2.0
// The extension module _virtual_cuda: what install.py puts where torch's Python looks for its CUDA half.
#include "collectives.h"

#include <torch/csrc/utils/device_lazy_init.h>
#include <torch/extension.h>

namespace virtual_cuda {
namespace {

// Which Python hears of a synchronisation, if any. Kept past the interpreter's end, where it could not be released.
py::object*& listener() {
  static auto* held = new py::object(py::none());
  return held;
}

void listen(py::object heard) {
  *listener() = heard;
  if (heard.is_none()) {
    on_synchronisation(nullptr);
    return;
  }
  on_synchronisation([](const std::string& by) {
    py::gil_scoped_acquire held;
    if (!listener()->is_none()) (*listener())(by);
  });
}

// gloo's own Python class makes the group that does the work.
c10::intrusive_ptr<Nccl> make_nccl(py::object store, int rank, int size, py::object options) {
  auto distributed = py::module_::import("torch.distributed.distributed_c10d");
  py::object timeout = distributed.attr("default_pg_timeout");
  if (!options.is_none() && !options.attr("_timeout").is_none()) timeout = options.attr("_timeout");
  auto prefixed = distributed.attr("PrefixStore")("virtual_nccl", store);
  auto gloo = distributed.attr("ProcessGroupGloo")(prefixed, rank, size, py::arg("timeout") = timeout);
  return c10::make_intrusive<Nccl>(gloo.cast<c10::intrusive_ptr<c10d::Backend>>());
}

py::dict memory(int index) {
  const auto use = memory_use(static_cast<c10::DeviceIndex>(index));
  py::dict stated;
  stated["allocated"] = use.allocated;
  stated["peak"] = use.peak;
  stated["blocks"] = use.blocks;
  stated["peak_blocks"] = use.peak_blocks;
  return stated;
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.attr("DEVICES") = static_cast<int>(kDevices);
  // CUDA does not survive a fork, so the child of a process that uses it is told so.
  m.def("refuse_forks", [] { torch::utils::register_fork_handler_for_device_init(c10::kCUDA); });
  m.def("is_forked", [] { return torch::utils::is_device_in_bad_fork(c10::kCUDA); });
  m.def("current_device", [] { return static_cast<int>(current_device()); });
  m.def("exchange_device", [](int index) {
    return static_cast<int>(exchange_device(static_cast<c10::DeviceIndex>(index)));
  });
  m.def("current_stream", [](int index) { return current_stream(static_cast<c10::DeviceIndex>(index)); });
  m.def("set_stream", [](int index, int64_t stream) { set_stream(static_cast<c10::DeviceIndex>(index), stream); });
  m.def("memory", &memory);
  m.def("reset_peak", [](int index) { reset_peak(static_cast<c10::DeviceIndex>(index)); });
  m.def("default_generator", [](int index) { return default_generator(static_cast<c10::DeviceIndex>(index)); });
  m.def("synchronised", &synchronised, py::call_guard<py::gil_scoped_release>());
  m.def("synchronisations", &synchronisations);
  m.def("listen", &listen);
  m.def("sync_debug_mode", &sync_debug_mode);
  m.def("set_sync_debug_mode", &set_sync_debug_mode);
  m.def("operator_calls", &operator_calls);
  py::class_<Nccl, c10::intrusive_ptr<Nccl>, c10d::Backend>(m, "ProcessGroupNCCL")
      .def(py::init(&make_nccl), py::arg("store"), py::arg("rank"), py::arg("size"), py::arg("options") = py::none());
}

}  // namespace virtual_cuda
