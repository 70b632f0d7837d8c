// SPDX-License-Identifier: Apache-2.0
// NCCL's place in torch.distributed.
#pragma once

#include "device.h"

#include <torch/csrc/distributed/c10d/Backend.hpp>

#include <algorithm>
#include <numeric>

namespace virtual_cuda {

using Tensors = std::vector<at::Tensor>;
using Handle = c10::intrusive_ptr<c10d::Work>;

class Nccl final : public c10d::Backend {
 public:
  explicit Nccl(c10::intrusive_ptr<c10d::Backend> with);
  const std::string getBackendName() const override { return "nccl"; }
  void setSequenceNumberForGroup() override {}
  uint64_t getSequenceNumberForGroup() override { return 0; }
  bool supportsCoalescing() const override { return true; }
  void startCoalescing() override;
  Handle endCoalescing() override;

  Handle broadcast(Tensors&, const c10d::BroadcastOptions&) override;
  Handle allreduce(Tensors&, const c10d::AllreduceOptions&) override;
  Handle allreduce_coalesced(Tensors&, const c10d::AllreduceCoalescedOptions&) override;
  Handle reduce(Tensors&, const c10d::ReduceOptions&) override;
  Handle allgather(std::vector<Tensors>&, Tensors&, const c10d::AllgatherOptions&) override;
  Handle _allgather_base(at::Tensor&, at::Tensor&, const c10d::AllgatherOptions&) override;
  Handle allgather_into_tensor_coalesced(Tensors&, Tensors&, const c10d::AllgatherOptions&) override;
  Handle reduce_scatter(Tensors&, std::vector<Tensors>&, const c10d::ReduceScatterOptions&) override;
  Handle _reduce_scatter_base(at::Tensor&, at::Tensor&, const c10d::ReduceScatterOptions&) override;
  Handle reduce_scatter_tensor_coalesced(Tensors&, Tensors&, const c10d::ReduceScatterOptions&) override;
  Handle gather(std::vector<Tensors>&, Tensors&, const c10d::GatherOptions&) override;
  Handle scatter(Tensors&, std::vector<Tensors>&, const c10d::ScatterOptions&) override;
  Handle alltoall_base(at::Tensor&, at::Tensor&, std::vector<int64_t>&, std::vector<int64_t>&,
                       const c10d::AllToAllOptions&) override;
  Handle alltoall(Tensors&, Tensors&, const c10d::AllToAllOptions&) override;
  Handle send(Tensors&, int to, int tag) override;
  Handle recv(Tensors&, int from, int tag) override;
  Handle barrier(const c10d::BarrierOptions&) override;

 private:
  Handle began(Handle work);                               // kept while a batch is being collected
  Handle averaged(Handle work, const Tensors& results);

  c10::intrusive_ptr<c10d::Backend> gloo;
  bool coalescing = false;
  std::vector<Handle> pending;
};

}  // namespace virtual_cuda
