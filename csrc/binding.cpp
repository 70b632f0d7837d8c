// SPDX-License-Identifier: Apache-2.0
// Python module megatron_g2rpo.objective._group_ops: numpy views in, numpy arrays out, no copies, the GIL released
// (normal_quantile, which is there for its test, aside).
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "gaussian_advantages.hpp"
#include "set_statistics.hpp"

namespace py = pybind11;

namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style>;

// Hands the vector's memory to numpy.
template <class T>
py::array_t<T> to_numpy(std::vector<T>&& values) {
    auto owner = std::make_unique<std::vector<T>>(std::move(values));
    const auto size = static_cast<py::ssize_t>(owner->size());
    T* data = owner->data();
    py::capsule release(owner.get(), [](void* pointer) { delete static_cast<std::vector<T>*>(pointer); });
    owner.release();
    return py::array_t<T>(size, data, release);
}

template <class Real>
g2rpo::Batch<Real> view(const Array<Real>& rewards, const Array<std::int64_t>& groups,
                        const Array<std::int64_t>& tasks) {
    if (rewards.ndim() != 1 || groups.ndim() != 1 || tasks.ndim() != 1 || rewards.size() != groups.size() ||
        rewards.size() != tasks.size()) {
        throw std::invalid_argument("rewards, groups and tasks must be one-dimensional and of one length");
    }
    return {rewards.data(), groups.data(), tasks.data(), static_cast<std::size_t>(rewards.size())};
}

g2rpo::Stage parse_stage(const std::string& name) {
    if (name == "group") return g2rpo::Stage::group;
    if (name == "task") return g2rpo::Stage::task;
    throw std::invalid_argument("unknown stage '" + name + "'; known: group, task");
}

template <class Real>
py::array_t<double> gaussian_advantages(const Array<Real>& rewards, const Array<std::int64_t>& groups,
                                        const Array<std::int64_t>& tasks, const std::vector<std::string>& stages,
                                        double tie_tolerance, bool drop_zero_variance, bool unit_variance) {
    const g2rpo::Batch<Real> batch = view(rewards, groups, tasks);
    g2rpo::AdvantageOptions options{{}, tie_tolerance, drop_zero_variance, unit_variance};
    for (const std::string& name : stages) options.stages.push_back(parse_stage(name));
    py::array_t<double> advantages(rewards.size());
    double* const values = advantages.mutable_data();
    {
        py::gil_scoped_release release;
        g2rpo::gaussian_advantages(batch, options, values);
    }
    return advantages;
}

py::dict to_dict(g2rpo::SetStatistics&& statistics) {
    py::dict columns;
    columns["id"] = to_numpy(std::move(statistics.id));
    columns["count"] = to_numpy(std::move(statistics.count));
    columns["mean"] = to_numpy(std::move(statistics.mean));
    columns["std"] = to_numpy(std::move(statistics.std));
    columns["min"] = to_numpy(std::move(statistics.min));
    columns["max"] = to_numpy(std::move(statistics.max));
    columns["distinct"] = to_numpy(std::move(statistics.distinct));
    return columns;
}

template <class Real>
std::pair<py::dict, py::dict> group_statistics(const Array<Real>& rewards, const Array<std::int64_t>& groups,
                                               const Array<std::int64_t>& tasks, double tie_tolerance) {
    const g2rpo::Batch<Real> batch = view(rewards, groups, tasks);
    g2rpo::SetStatistics by_group, by_task;
    {
        py::gil_scoped_release release;
        g2rpo::LargeVector<double> values(batch.size);
        g2rpo::copy_rewards(batch, values.data());
        by_group = g2rpo::set_statistics(values.data(), batch.groups, batch.size, tie_tolerance);
        by_task = g2rpo::set_statistics(values.data(), batch.tasks, batch.size, tie_tolerance);
    }
    return {to_dict(std::move(by_group)), to_dict(std::move(by_task))};
}

// `noconvert`: another dtype or layout is a TypeError here, never a hidden copy.
template <class Real>
void define(py::module_& module) {
    const auto rewards = py::arg("rewards").noconvert();
    const auto groups = py::arg("groups").noconvert();
    const auto tasks = py::arg("tasks").noconvert();
    module.def("gaussian_advantages", &gaussian_advantages<Real>, rewards, groups, tasks, py::arg("stages"),
               py::arg("tie_tolerance"), py::arg("drop_zero_variance"), py::arg("unit_variance"));
    module.def("group_statistics", &group_statistics<Real>, rewards, groups, tasks, py::arg("tie_tolerance"));
}

}  // namespace

PYBIND11_MODULE(_group_ops, module) {
    module.doc() = "Gaussian advantages and group statistics (compiled from csrc/).";
    define<double>(module);
    define<float>(module);
    module.def("normal_quantile", py::vectorize(g2rpo::normal_quantile), py::arg("p"));
}
