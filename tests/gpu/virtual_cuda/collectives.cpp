// SPDX-License-Identifier: Apache-2.0
// NCCL: gloo on the same memory, which takes what NCCL takes and gives what NCCL gives.
#include "collectives.h"

namespace virtual_cuda {
namespace {

at::Tensor host(const at::Tensor& tensor) {
  TORCH_CHECK(tensor.is_cuda() && !tensor.is_sparse(), "Tensors must be CUDA and dense");
  TORCH_CHECK(tensor.is_contiguous(tensor.suggest_memory_format()), "Tensors must be contiguous");
  return to_host(tensor);
}

Tensors host(const Tensors& tensors) {
  Tensors aliases;
  for (const auto& tensor : tensors) aliases.push_back(host(tensor));
  return aliases;
}

std::vector<Tensors> host(const std::vector<Tensors>& lists) {
  std::vector<Tensors> aliases;
  for (const auto& list : lists) aliases.push_back(host(list));
  return aliases;
}

// Everything that was started, as one piece of work that may be waited for any number of times, as NCCL's may: context
// parallelism does. gloo's sends and receives may not, and its reduce_scatter would copy its result out once more.
struct Started final : c10d::Work {
  std::vector<Handle> parts;
  bool waited = false;

  explicit Started(std::vector<Handle> started) : parts(std::move(started)) {}
  explicit Started(Handle one) : Started(std::vector<Handle>{std::move(one)}) {}
  bool isCompleted() override {
    return waited || std::all_of(parts.begin(), parts.end(), [](const auto& part) { return part->isCompleted(); });
  }
  bool isSuccess() const override {
    return waited || std::all_of(parts.begin(), parts.end(), [](const auto& part) { return part->isSuccess(); });
  }
  bool wait(std::chrono::milliseconds timeout) override {
    for (const auto& part : parts)
      if (!waited) part->wait(timeout);
    return waited = true;
  }
  void synchronize() override { wait(kNoTimeout); }
  c10::intrusive_ptr<c10::ivalue::Future> getFuture() override {
    auto future = c10::make_intrusive<c10::ivalue::Future>(c10::ListType::create(c10::TensorType::get()));
    wait(kNoTimeout);
    future->markCompleted(c10::IValue(Tensors{}));
    return future;
  }
};

// gloo knows no mean: it sums, and the sum is divided.
template <class Options>
bool averages(Options& options) {
  if (options.reduceOp != c10d::ReduceOp::AVG) return false;
  options.reduceOp = c10d::ReduceOp::SUM;
  return true;
}

}  // namespace

Nccl::Nccl(c10::intrusive_ptr<c10d::Backend> with) : Backend(with->getRank(), with->getSize()), gloo(std::move(with)) {}

Handle Nccl::began(Handle work) {
  Handle once = c10::make_intrusive<Started>(std::move(work));
  if (coalescing) pending.push_back(once);
  return once;
}

Handle Nccl::averaged(Handle work, const Tensors& results) {
  auto once = began(std::move(work));
  once->wait();
  for (auto result : results) result.div_(getSize());
  return once;
}

void Nccl::startCoalescing() { coalescing = true; }

Handle Nccl::endCoalescing() {
  coalescing = false;
  return c10::make_intrusive<Started>(std::exchange(pending, {}));
}

Handle Nccl::broadcast(Tensors& tensors, const c10d::BroadcastOptions& options) {
  auto aliases = host(tensors);
  return began(gloo->broadcast(aliases, options));
}

Handle Nccl::allreduce(Tensors& tensors, const c10d::AllreduceOptions& options) {
  auto aliases = host(tensors);
  auto asked = options;
  const bool mean = averages(asked);
  auto work = gloo->allreduce(aliases, asked);
  return mean ? averaged(work, aliases) : began(work);
}

Handle Nccl::reduce(Tensors& tensors, const c10d::ReduceOptions& options) {
  auto aliases = host(tensors);
  auto asked = options;
  const bool mean = averages(asked);
  auto work = gloo->reduce(aliases, asked);
  return mean && getRank() == options.rootRank ? averaged(work, aliases) : began(work);
}

Handle Nccl::allgather(std::vector<Tensors>& outputs, Tensors& inputs, const c10d::AllgatherOptions& options) {
  auto to = host(outputs);
  auto from = host(inputs);
  return began(gloo->allgather(to, from, options));
}

Handle Nccl::_allgather_base(at::Tensor& output, at::Tensor& input, const c10d::AllgatherOptions& options) {
  auto to = host(output), from = host(input);
  return began(gloo->_allgather_base(to, from, options));
}

Handle Nccl::reduce_scatter(Tensors& outputs, std::vector<Tensors>& inputs, const c10d::ReduceScatterOptions& options) {
  auto to = host(outputs);
  auto from = host(inputs);
  auto asked = options;
  const bool mean = averages(asked);
  auto work = gloo->reduce_scatter(to, from, asked);
  return mean ? averaged(work, to) : began(work);
}

Handle Nccl::_reduce_scatter_base(at::Tensor& output, at::Tensor& input, const c10d::ReduceScatterOptions& options) {
  auto to = host(output), from = host(input);
  auto asked = options;
  const bool mean = averages(asked);
  auto work = gloo->_reduce_scatter_base(to, from, asked);
  return mean ? averaged(work, {to}) : began(work);
}

Handle Nccl::allreduce_coalesced(Tensors& tensors, const c10d::AllreduceCoalescedOptions& options) {
  c10d::AllreduceOptions each;
  each.reduceOp = options.reduceOp;
  each.timeout = options.timeout;
  std::vector<Handle> works;
  for (const auto& tensor : tensors) {
    Tensors one{tensor};
    works.push_back(allreduce(one, each));
  }
  return c10::make_intrusive<Started>(std::move(works));
}

Handle Nccl::allgather_into_tensor_coalesced(Tensors& outputs, Tensors& inputs, const c10d::AllgatherOptions& options) {
  std::vector<Handle> works;
  for (size_t i = 0; i < outputs.size(); ++i) works.push_back(_allgather_base(outputs[i], inputs[i], options));
  return c10::make_intrusive<Started>(std::move(works));
}

Handle Nccl::reduce_scatter_tensor_coalesced(Tensors& outputs, Tensors& inputs,
                                             const c10d::ReduceScatterOptions& options) {
  std::vector<Handle> works;
  for (size_t i = 0; i < outputs.size(); ++i) works.push_back(_reduce_scatter_base(outputs[i], inputs[i], options));
  return c10::make_intrusive<Started>(std::move(works));
}

Handle Nccl::gather(std::vector<Tensors>& outputs, Tensors& inputs, const c10d::GatherOptions& options) {
  auto to = host(outputs);
  auto from = host(inputs);
  return began(gloo->gather(to, from, options));
}

Handle Nccl::scatter(Tensors& outputs, std::vector<Tensors>& inputs, const c10d::ScatterOptions& options) {
  auto to = host(outputs);
  auto from = host(inputs);
  return began(gloo->scatter(to, from, options));
}

Handle Nccl::alltoall_base(at::Tensor& output, at::Tensor& input, std::vector<int64_t>& output_splits,
                           std::vector<int64_t>& input_splits, const c10d::AllToAllOptions& options) {
  auto to = host(output), from = host(input);
  return began(gloo->alltoall_base(to, from, output_splits, input_splits, options));
}

Handle Nccl::alltoall(Tensors& outputs, Tensors& inputs, const c10d::AllToAllOptions& options) {
  // gloo exchanges the pieces of one tensor only.
  auto to = host(outputs), from = host(inputs);
  std::vector<int64_t> output_splits, input_splits;
  Tensors pieces;
  for (const auto& tensor : to) output_splits.push_back(tensor.numel());
  for (const auto& tensor : from) {
    input_splits.push_back(tensor.numel());
    pieces.push_back(tensor.flatten());
  }
  auto sent = at::cat(pieces);
  auto received = at::empty({std::accumulate(output_splits.begin(), output_splits.end(), int64_t{0})}, sent.options());
  auto work = began(gloo->alltoall_base(received, sent, output_splits, input_splits, options));
  work->wait();
  auto parts = received.split_with_sizes(output_splits);
  for (size_t i = 0; i < to.size(); ++i) to[i].copy_(parts[i].view(to[i].sizes()));
  return work;
}

Handle Nccl::send(Tensors& tensors, int to, int tag) {
  auto aliases = host(tensors);
  return began(gloo->send(aliases, to, tag));
}

Handle Nccl::recv(Tensors& tensors, int from, int tag) {
  auto aliases = host(tensors);
  return began(gloo->recv(aliases, from, tag));
}

Handle Nccl::barrier(const c10d::BarrierOptions& options) {
  synchronised("barrier");
  return gloo->barrier(options);
}

}  // namespace virtual_cuda
