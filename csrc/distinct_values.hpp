// SPDX-License-Identifier: Apache-2.0
// What every function of ranks needs of a set: its distinct values in ascending order, how often each occurs, and which
// of them each row holds.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <vector>

#include "first_appearance.hpp"
#include "large_vector.hpp"
#include "radix_sort.hpp"
#include "vector_kernels.hpp"

namespace g2rpo {

// Calls the distinct values levels, and numbers them in ascending order. To the rows they are known by labels, which
// saves a pass over the rows: labels can be handed out before the order of the levels is known.
class DistinctValues {
public:
    // Looks at n >= 1 values: finite, and no -0, so that values are equal where their bits are.
    void find(const double* values, std::size_t n) {
        total_ = n;
        size_ = 0;
        if (label_of_.size() < n) label_of_.resize(n);
        if (n <= most_ranked) {
            rank(values);
        } else if (!index(values)) {
            sort(values);
        }
    }

    std::size_t total() const { return total_; }
    std::size_t size() const { return size_; }

    double value(std::size_t level) const { return values_[level]; }
    std::size_t count(std::size_t level) const { return counts_[level]; }

    // Some number below labels().
    std::size_t label(std::size_t level) const { return label_[level]; }
    std::size_t labels() const { return labels_; }

    // Whether a level is nearer to the one below it than the tolerance; and whether any is.
    bool tied(std::size_t level, double tolerance) const { return values_[level] - values_[level - 1] < tolerance; }
    bool any_tied(double tolerance) const {
        bool any = false;  // no early exit, which would keep the loop from being vectorised
        for (std::size_t level = 1; level < size_; ++level) any |= tied(level, tolerance);
        return any;
    }

    // Replaces the n values of find() by images[label of the value].
    void replace(double* values, const double* images) const {
        for (std::size_t i = 0; i < total_; ++i) values[i] = images[label_of_[i]];
    }

private:
    // From measurements: ranking costs n^2, sorting n with a start of its own; a larger index leaves the fast caches.
    static constexpr std::size_t most_ranked = 128, most_indexed = 4096;

    void reserve(std::size_t labels) {
        labels_ = labels;
        if (values_.size() >= labels) return;
        values_.resize(labels);
        counts_.resize(labels);
        label_.resize(labels);
    }

    void add_level(double value, std::uint32_t count, std::uint32_t label) {
        values_[size_] = value;
        counts_[size_] = count;
        label_[size_] = label;
        ++size_;
    }

    // Few values: how many are smaller than a value is its rank, and its label.
    void rank(const double* values) {
        static_assert(most_ranked % count_smaller_block == 0);
        std::array<double, most_ranked> members;
        std::array<std::int64_t, most_ranked> ranks;
        const auto n = static_cast<std::uint32_t>(total_);
        std::fill(std::copy_n(values, n, members.begin()), members.begin() + padded(n), 0.0);
        count_smaller(members.data(), n, ranks.data());

        reserve(n);
        std::fill_n(values_.begin(), n, 0.0);
        std::fill_n(counts_.begin(), n, 0);
        for (std::uint32_t i = 0; i < n; ++i) {
            const auto label = static_cast<std::uint32_t>(ranks[i]);
            values_[label] = members[i];
            ++counts_[label];
            label_of_[i] = label;
        }
        // Closes, in place and without a branch, the gaps that equal values leave behind their common rank.
        for (std::uint32_t label = 0; label < n; ++label) {
            const std::uint32_t count = counts_[label];
            values_[size_] = values_[label];
            counts_[size_] = count;
            label_[size_] = label;
            size_ += count != 0;
        }
    }

    // The next multiple of count_smaller_block.
    static std::size_t padded(std::size_t n) {
        return (n + count_smaller_block - 1) / count_smaller_block * count_smaller_block;
    }

    // Many values, few of them distinct, as after the group stage: numbers them as they appear, and sorts but them.
    // Returns false, before much is done, where too many are distinct.
    bool index(const double* values) {
        const std::size_t most = std::min(total_ / 8, most_indexed);
        seen_.clear();
        seen_counts_.clear();
        for (std::size_t i = 0; i < total_; ++i) {
            const std::uint32_t label = seen_.find_or_insert(bits_of(values[i]));
            if (label == seen_counts_.size()) {
                if (label == most) return false;
                seen_counts_.push_back(0);
            }
            ++seen_counts_[label];
            label_of_[i] = label;
        }
        const std::vector<std::uint64_t>& keys = seen_.keys();
        reserve(keys.size());
        std::vector<std::uint32_t> order(keys.size());
        std::iota(order.begin(), order.end(), 0);
        std::sort(order.begin(), order.end(), [&](std::uint32_t a, std::uint32_t b) {
            return from_bits(keys[a]) < from_bits(keys[b]);
        });
        for (const std::uint32_t label : order) add_level(from_bits(keys[label]), seen_counts_[label], label);
        return true;
    }

    // Many distinct values.
    void sort(const double* values) {
        entries_.clear();
        entries_.reserve(total_);
        for (std::size_t i = 0; i < total_; ++i) entries_.emplace_back(values[i], static_cast<std::uint32_t>(i));
        radix_sort(entries_, scratch_);
        reserve(total_);
        for (std::size_t begin = 0, end = 0; begin < total_; begin = end) {
            const auto label = static_cast<std::uint32_t>(size_);
            for (end = begin; end < total_ && entries_[end].key == entries_[begin].key; ++end) {
                label_of_[entries_[end].position] = label;
            }
            add_level(entries_[begin].value(), static_cast<std::uint32_t>(end - begin), label);
        }
    }

    std::size_t total_ = 0, size_ = 0, labels_ = 0;
    LargeVector<double> values_;
    LargeVector<std::uint32_t> counts_, label_, label_of_;
    FirstAppearance seen_;
    std::vector<std::uint32_t> seen_counts_;
    LargeVector<SortEntry> entries_, scratch_;
};

}  // namespace g2rpo
