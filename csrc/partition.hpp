// SPDX-License-Identifier: Apache-2.0
// Rows grouped by an arbitrary 64-bit id, in time linear in the number of rows.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <vector>

#include "first_appearance.hpp"
#include "large_vector.hpp"

namespace g2rpo {

// Which rows have which id. A set is the rows of one id; sets are in the order of their first rows.
//
// Rows are kept as runs of neighbours of one id: the rollouts of a prompt usually lie together, and a run costs one
// look-up however long it is.
class Partition {
public:
    // Rows whose `active` is 0 are in no set; an empty `active` means that all are.
    Partition(const std::int64_t* ids, std::size_t rows, const std::vector<char>& active = {}) : rows_(rows) {
        if (active.empty()) {
            find_runs(ids, [](std::size_t) { return true; });
        } else {
            find_runs(ids, [&](std::size_t row) { return active[row] != 0; });
        }
        number_sets(ids);
        offsets_.assign(ids_.size() + 1, 0);
        for (const Run& run : runs_) offsets_[run.set + 1] += run.size;
        std::partial_sum(offsets_.begin(), offsets_.end(), offsets_.begin());
    }

    std::size_t size() const { return ids_.size(); }
    std::int64_t id(std::size_t set) const { return ids_[set]; }

    // Number of rows of a set, and where they begin in what gather() returns.
    std::size_t count(std::size_t set) const { return offsets_[set + 1] - offsets_[set]; }
    std::size_t offset(std::size_t set) const { return offsets_[set]; }

    // Returns the values of the rows set by set, within a set in the order of the rows: in `buffer`, or where they are
    // if they lie that way already.
    template <class Double>
    Double* gather(Double* by_row, LargeVector<double>& buffer) const {
        if (runs_.size() == size() && offsets_.back() == rows_) return by_row;
        buffer.resize(offsets_.back());
        double* const by_set = buffer.data();
        for_each_run([&](const Run& run, std::size_t at) { copy(by_row + run.begin, run.size, by_set + at); });
        return by_set;
    }

    // The way back of gather(). Rows in no set keep their values.
    void scatter(const double* by_set, double* by_row) const {
        if (by_set == by_row) return;
        for_each_run([&](const Run& run, std::size_t at) { copy(by_set + at, run.size, by_row + run.begin); });
    }

    // Sets `active` to 0 at the rows of the sets that are `chosen`.
    void deactivate(const std::vector<char>& chosen, std::vector<char>& active) const {
        active.resize(rows_, 1);
        for (const Run& run : runs_) {
            if (chosen[run.set]) std::fill_n(active.begin() + run.begin, run.size, 0);
        }
    }

private:
    struct Run {
        std::uint32_t begin, size, set;
    };

    template <class Predicate>
    void find_runs(const std::int64_t* ids, Predicate takes_part) {
        for (std::size_t begin = 0, end = 0; begin < rows_; begin = end) {
            end = begin + 1;
            if (!takes_part(begin)) continue;
            while (end < rows_ && ids[end] == ids[begin] && takes_part(end)) ++end;
            runs_.push_back({static_cast<std::uint32_t>(begin), static_cast<std::uint32_t>(end - begin), 0});
        }
    }

    void number_sets(const std::int64_t* ids) {
        const auto not_ascending = [&](const Run& run, const Run& next) { return ids[run.begin] >= ids[next.begin]; };
        if (std::adjacent_find(runs_.begin(), runs_.end(), not_ascending) == runs_.end()) {
            // No id comes back: every run is a set, without a look-up.
            ids_.reserve(runs_.size());
            for (Run& run : runs_) {
                run.set = static_cast<std::uint32_t>(ids_.size());
                ids_.push_back(ids[run.begin]);
            }
            return;
        }
        FirstAppearance sets;
        for (Run& run : runs_) run.set = sets.find_or_insert(static_cast<std::uint64_t>(ids[run.begin]));
        ids_.assign(sets.keys().begin(), sets.keys().end());
    }

    // Calls visit(run, offset of its first row).
    template <class Visit>
    void for_each_run(Visit visit) const {
        std::vector<std::size_t> next(offsets_.begin(), offsets_.end() - 1);
        for (const Run& run : runs_) {
            visit(run, next[run.set]);
            next[run.set] += run.size;
        }
    }

    static void copy(const double* from, std::uint32_t size, double* to) {
        if (size == 1) {  // scattered rows, not worth a call each
            *to = *from;
        } else {
            std::copy_n(from, size, to);
        }
    }

    std::size_t rows_;
    LargeVector<Run> runs_;
    std::vector<std::int64_t> ids_;
    std::vector<std::size_t> offsets_;
};

}  // namespace g2rpo
