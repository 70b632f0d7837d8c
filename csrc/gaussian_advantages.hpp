// SPDX-License-Identifier: Apache-2.0
// Gaussian advantages of a batch of rewards.
//
// Whatever is computed of a set is a function of its sorted values. The advantages are therefore the same, bit for bit,
// for every order of the rows. Time O(N log N), memory O(N). No Python, no torch.
//
// Source of the map: "OpenVLThinkerV2", arXiv 2604.08539 (one-dimensional optimal transport of a set of values to
// N(0, 1) at the midpoint quantiles).
#pragma once

#include <cstddef>
#include <vector>

#include "batch.hpp"
#include "distinct_values.hpp"
#include "large_vector.hpp"
#include "midpoint_quantiles.hpp"
#include "moments.hpp"
#include "partition.hpp"

namespace g2rpo {

enum class Stage { group, task };

struct AdvantageOptions {
    std::vector<Stage> stages;
    double tie_tolerance;     // finite, >= 0
    bool drop_zero_variance;  // rows of a set whose values are all equal get 0 and take no rank in later stages
    bool unit_variance;       // rescale the advantages of every task to a population standard deviation of 1
};

namespace detail {

// What transport() and rescale_to_unit_variance() need memory for, kept from set to set and from stage to stage.
struct Scratch {
    DistinctValues distinct;
    MidpointQuantiles quantiles;
    LargeVector<double> images;  // by label of the distinct values
    LargeVector<double> gathered;
};

// Images of the distinct values of a set: the mean of the quantiles at the ranks of each chain of tied ones. Returns
// whether all of them are one chain, whose image is 0.
inline bool find_images(double tie_tolerance, Scratch& scratch) {
    const DistinctValues& distinct = scratch.distinct;
    const MidpointQuantiles& quantiles = scratch.quantiles;
    scratch.quantiles.resize(distinct.total());
    scratch.images.resize(distinct.labels());
    double* const images = scratch.images.data();

    // Usual for rewards from a continuum: no two are equal or tied, and each has a rank of its own.
    if (distinct.size() == distinct.total() && distinct.size() > 1 && !distinct.any_tied(tie_tolerance)) {
        for (std::size_t level = 0; level < distinct.size(); ++level) images[distinct.label(level)] = quantiles[level];
        return false;
    }

    std::size_t level = 0, rank = 0;
    while (level < distinct.size()) {
        const std::size_t first_level = level, first_rank = rank;
        do {
            rank += distinct.count(level++);
        } while (level < distinct.size() && distinct.tied(level, tie_tolerance));
        const double image = quantiles.mean(first_rank, rank);
        for (std::size_t chained = first_level; chained < level; ++chained) images[distinct.label(chained)] = image;
        if (first_level == 0 && level == distinct.size()) return true;
    }
    return false;
}

// One stage: replaces the values of every set by their images, and clears `active` where a set was dropped.
inline void transport(const Partition& sets, const AdvantageOptions& options, double* values, std::vector<char>& active,
                      Scratch& scratch) {
    std::vector<char> dropped(sets.size());
    bool any_dropped = false;
    double* const by_set = sets.gather(values, scratch.gathered);
    for (std::size_t set = 0; set < sets.size(); ++set) {
        double* const members = by_set + sets.offset(set);
        scratch.distinct.find(members, sets.count(set));
        const bool zero_variance = find_images(options.tie_tolerance, scratch);
        scratch.distinct.replace(members, scratch.images.data());
        dropped[set] = zero_variance && options.drop_zero_variance;
        any_dropped |= dropped[set];
    }
    sets.scatter(by_set, values);
    if (any_dropped) sets.deactivate(dropped, active);
}

// Divides the values of every set by their population standard deviation; a set without spread keeps its 0s.
inline void rescale_to_unit_variance(const Partition& sets, double* values, Scratch& scratch) {
    double* const by_set = sets.gather(values, scratch.gathered);
    for (std::size_t set = 0; set < sets.size(); ++set) {
        double* const members = by_set + sets.offset(set);
        scratch.distinct.find(members, sets.count(set));
        const double std = moments(scratch.distinct).std;
        if (std == 0.0) continue;
        for (std::size_t i = 0; i < sets.count(set); ++i) members[i] /= std;
    }
    sets.scatter(by_set, values);
}

}  // namespace detail

// Writes the advantages of all rows to `advantages` [N]. Throws what copy_rewards does.
template <class Real>
void gaussian_advantages(const Batch<Real>& batch, const AdvantageOptions& options, double* advantages) {
    copy_rewards(batch, advantages);
    std::vector<char> active;  // by row; empty until a set is dropped
    detail::Scratch scratch;
    for (const Stage stage : options.stages) {
        const Partition sets(stage == Stage::group ? batch.groups : batch.tasks, batch.size, active);
        detail::transport(sets, options, advantages, active, scratch);
    }
    if (options.unit_variance) {
        detail::rescale_to_unit_variance(Partition(batch.tasks, batch.size, active), advantages, scratch);
    }
}

}  // namespace g2rpo
