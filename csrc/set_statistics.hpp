// SPDX-License-Identifier: Apache-2.0
// Statistics of the rewards of every group or task. Like the advantages, the same for every order of the rows.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <vector>

#include "batch.hpp"
#include "distinct_values.hpp"
#include "large_vector.hpp"
#include "moments.hpp"
#include "partition.hpp"

namespace g2rpo {

// One entry a set, ids ascending.
struct SetStatistics {
    std::vector<std::int64_t> id, count, distinct;
    std::vector<double> mean, std, min, max;
};

// Statistics by `ids` of the rewards that copy_rewards wrote to `values`. `distinct` counts chains of tied values.
inline SetStatistics set_statistics(const double* values, const std::int64_t* ids, std::size_t size,
                                    double tie_tolerance) {
    const Partition sets(ids, size);
    std::vector<std::size_t> order(sets.size());
    std::iota(order.begin(), order.end(), std::size_t{0});
    std::sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) { return sets.id(a) < sets.id(b); });

    SetStatistics result;
    LargeVector<double> gathered;
    const double* const by_set = sets.gather(values, gathered);
    DistinctValues distinct;
    for (const std::size_t set : order) {
        distinct.find(by_set + sets.offset(set), sets.count(set));
        std::int64_t chains = 1;
        for (std::size_t level = 1; level < distinct.size(); ++level) chains += !distinct.tied(level, tie_tolerance);
        const Moments shape = moments(distinct);
        result.id.push_back(sets.id(set));
        result.count.push_back(static_cast<std::int64_t>(distinct.total()));
        result.distinct.push_back(chains);
        result.mean.push_back(shape.mean);
        result.std.push_back(shape.std);
        result.min.push_back(distinct.value(0));
        result.max.push_back(distinct.value(distinct.size() - 1));
    }
    return result;
}

}  // namespace g2rpo
