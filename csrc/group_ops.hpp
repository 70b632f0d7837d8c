// SPDX-License-Identifier: Apache-2.0
// Gaussian advantages and per-set statistics of a batch of rewards.
//
// Every sum runs over the sorted values of a set. The results are therefore the same, bit for bit, for every order of
// the rows. Time O(N log N), memory O(N). No Python, no torch.
//
// Source of the map: "OpenVLThinkerV2", arXiv 2604.08539 (one-dimensional optimal transport of a set of values to
// N(0, 1) at the midpoint quantiles).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "normal_quantile.hpp"
#include "partition.hpp"

namespace g2rpo {

// N rollouts: rewards[i], groups[i] (id of the prompt) and tasks[i] belong to rollout i. Borrowed, never written.
template <class Real>
struct Batch {
    const Real* rewards;
    const std::int64_t* groups;
    const std::int64_t* tasks;
    std::size_t size;
};

enum class Stage { group, task };

struct AdvantageOptions {
    std::vector<Stage> stages;
    double tie_tolerance;      // finite, >= 0
    bool drop_zero_variance;   // rows of a set whose values are all equal get 0 and take no rank in later stages
    bool unit_variance;        // rescale the advantages of every task to a population standard deviation of 1
};

// One entry a set, ids ascending.
struct SetStatistics {
    std::vector<std::int64_t> id, count, distinct;
    std::vector<double> mean, std, min, max;
};

namespace detail {

// Rewards in double precision. -0 becomes +0, which compares equal but would let the order of rows decide a sign bit.
template <class Real>
std::vector<double> finite_values(const Batch<Real>& batch) {
    std::vector<double> values(batch.size);
    for (std::size_t row = 0; row < batch.size; ++row) {
        const auto value = static_cast<double>(batch.rewards[row]);
        if (!std::isfinite(value)) {
            throw std::invalid_argument("reward of row " + std::to_string(row) + " is " +
                                        (std::isnan(value) ? "nan" : value > 0 ? "inf" : "-inf") + " (group " +
                                        std::to_string(batch.groups[row]) + ", task " +
                                        std::to_string(batch.tasks[row]) + "); rewards must be finite");
        }
        values[row] = value + 0.0;
    }
    return values;
}

// Equal values tie at every tolerance; neighbours nearer than the tolerance tie as well (and chains of them).
inline bool tied(double lower, double upper, double tolerance) {
    return lower == upper || upper - lower < tolerance;
}

// Neumaier's compensated summation: the error does not grow with the number of terms.
class CompensatedSum {
public:
    void add(double term) {
        const double next = sum_ + term;
        correction_ += std::fabs(sum_) >= std::fabs(term) ? (sum_ - next) + term : (term - next) + sum_;
        sum_ = next;
    }
    double value() const { return sum_ + correction_; }

private:
    double sum_ = 0.0, correction_ = 0.0;
};

// Midpoint quantiles q_k = Phi^-1((k + 1/2) / n), k = 0 .. n-1. Only the lower half is computed; the upper half is its
// mirror image, which makes the map exactly antisymmetric. The last n is kept: groups mostly share one size.
class MidpointQuantiles {
public:
    void resize(std::size_t n) {
        if (n == n_) return;
        n_ = n;
        lower_.resize(n / 2);
        for (std::size_t k = 0; k < lower_.size(); ++k) {
            lower_[k] = normal_quantile((static_cast<double>(k) + 0.5) / static_cast<double>(n));
        }
    }

    // Mean of q_k for begin <= k < end. Ranks whose mirror images are also in the range cancel and are never added.
    double mean(std::size_t begin, std::size_t end) const {
        if (begin + end > n_) return -mean(n_ - end, n_ - begin);
        CompensatedSum sum;
        for (std::size_t k = begin, last = std::min(end, n_ - end); k < last; ++k) sum.add(lower_[k]);
        return sum.value() / static_cast<double>(end - begin);
    }

private:
    std::size_t n_ = 0;
    std::vector<double> lower_;
};

struct Moments {
    double mean, std;
};

// Mean and population standard deviation of n >= 1 ascending values. Values whose squares would overflow or vanish
// are scaled by a power of two first, which is exact.
inline Moments moments(const double* values, std::size_t n) {
    const double largest = std::max(std::fabs(values[0]), std::fabs(values[n - 1]));
    const bool extreme = largest != 0.0 && (largest > 0x1p+400 || largest < 0x1p-400);
    const int exponent = extreme ? std::max(std::ilogb(largest), -1000) : 0;
    const double scale = std::ldexp(1.0, -exponent);
    CompensatedSum total;
    for (std::size_t i = 0; i < n; ++i) total.add(values[i] * scale);
    // The clamp keeps a rounded mean of equal values equal to them.
    const double mean =
        std::clamp(total.value() / static_cast<double>(n), values[0] * scale, values[n - 1] * scale);
    CompensatedSum squares;
    for (std::size_t i = 0; i < n; ++i) {
        const double deviation = values[i] * scale - mean;
        squares.add(deviation * deviation);
    }
    return {std::ldexp(mean, exponent), std::ldexp(std::sqrt(squares.value() / static_cast<double>(n)), exponent)};
}

struct Entry {
    double value;
    std::size_t row;
};

// One stage: replaces the values of every set by their images, and clears `active` where a set was dropped.
inline void transport(const Partition& sets, const AdvantageOptions& options, std::vector<double>& values,
                      std::vector<char>& active) {
    MidpointQuantiles quantiles;
    std::vector<Entry> entries;
    for (std::size_t set = 0; set < sets.size(); ++set) {
        entries.clear();
        for (std::size_t i = sets.offsets[set]; i < sets.offsets[set + 1]; ++i) {
            const std::size_t row = sets.rows[i];
            if (active[row]) entries.push_back({values[row], row});
        }
        std::sort(entries.begin(), entries.end(), [](const Entry& a, const Entry& b) { return a.value < b.value; });
        quantiles.resize(entries.size());
        for (std::size_t begin = 0, end = 0; begin < entries.size(); begin = end) {
            end = begin + 1;
            while (end < entries.size() &&
                   tied(entries[end - 1].value, entries[end].value, options.tie_tolerance)) ++end;
            const bool zero_variance = end - begin == entries.size();
            const double image = zero_variance ? 0.0 : quantiles.mean(begin, end);
            for (std::size_t i = begin; i < end; ++i) {
                values[entries[i].row] = image;
                if (zero_variance && options.drop_zero_variance) active[entries[i].row] = 0;
            }
        }
    }
}

// Divides the active values of every set by their population standard deviation; a set without spread keeps its 0s.
inline void rescale_to_unit_variance(const Partition& sets, const std::vector<char>& active,
                                     std::vector<double>& values) {
    std::vector<double> sorted;
    for (std::size_t set = 0; set < sets.size(); ++set) {
        sorted.clear();
        for (std::size_t i = sets.offsets[set]; i < sets.offsets[set + 1]; ++i) {
            if (active[sets.rows[i]]) sorted.push_back(values[sets.rows[i]]);
        }
        if (sorted.empty()) continue;
        std::sort(sorted.begin(), sorted.end());
        const double std = moments(sorted.data(), sorted.size()).std;
        if (std == 0.0) continue;
        for (std::size_t i = sets.offsets[set]; i < sets.offsets[set + 1]; ++i) values[sets.rows[i]] /= std;
    }
}

}  // namespace detail

// Advantages of every row. Throws std::invalid_argument for a reward that is not finite.
template <class Real>
std::vector<double> gaussian_advantages(const Batch<Real>& batch, const AdvantageOptions& options) {
    std::vector<double> values = detail::finite_values(batch);
    std::vector<char> active(batch.size, 1);
    for (const Stage stage : options.stages) {
        const Partition sets = partition(stage == Stage::group ? batch.groups : batch.tasks, batch.size);
        detail::transport(sets, options, values, active);
    }
    if (options.unit_variance) detail::rescale_to_unit_variance(partition(batch.tasks, batch.size), active, values);
    return values;
}

// Statistics of the rewards by `ids`, which is batch.groups or batch.tasks; `distinct` counts chains of tied values.
template <class Real>
SetStatistics set_statistics(const Batch<Real>& batch, const std::int64_t* ids, double tie_tolerance) {
    const std::vector<double> values = detail::finite_values(batch);
    const Partition sets = partition(ids, batch.size);
    SetStatistics result;
    std::vector<double> sorted;
    for (std::size_t set = 0; set < sets.size(); ++set) {
        sorted.clear();
        for (std::size_t i = sets.offsets[set]; i < sets.offsets[set + 1]; ++i) sorted.push_back(values[sets.rows[i]]);
        std::sort(sorted.begin(), sorted.end());
        std::int64_t distinct = 1;
        for (std::size_t i = 1; i < sorted.size(); ++i) {
            distinct += !detail::tied(sorted[i - 1], sorted[i], tie_tolerance);
        }
        const detail::Moments moments = detail::moments(sorted.data(), sorted.size());
        result.id.push_back(sets.ids[set]);
        result.count.push_back(static_cast<std::int64_t>(sorted.size()));
        result.distinct.push_back(distinct);
        result.mean.push_back(moments.mean);
        result.std.push_back(moments.std);
        result.min.push_back(sorted.front());
        result.max.push_back(sorted.back());
    }
    return result;
}

}  // namespace g2rpo
