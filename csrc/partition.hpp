// SPDX-License-Identifier: Apache-2.0
// Rows grouped by an arbitrary 64-bit id, in time linear in the number of rows.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <vector>

namespace g2rpo {

// Set s holds rows[offsets[s]] .. rows[offsets[s + 1] - 1]; ids ascend, and so do the rows of a set.
struct Partition {
    std::vector<std::int64_t> ids;
    std::vector<std::size_t> offsets;
    std::vector<std::size_t> rows;

    std::size_t size() const { return ids.size(); }
};

namespace detail {

// Open-addressing map from an id to the order of its first appearance.
class IdIndex {
public:
    IdIndex() : slots_(initial_capacity) {}

    std::size_t find_or_insert(std::int64_t id) {
        if (2 * (ids_.size() + 1) > slots_.size()) grow();
        Slot& slot = slot_of(id);
        if (slot.entry == 0) {
            ids_.push_back(id);
            slot = {id, ids_.size()};
        }
        return slot.entry - 1;
    }

    const std::vector<std::int64_t>& ids() const { return ids_; }

private:
    struct Slot {
        std::int64_t id = 0;
        std::size_t entry = 0;  // 1 + index into ids_; 0 marks a free slot, so that every id is a legal key
    };
    static constexpr std::size_t initial_capacity = 256;  // a power of two, as is every later capacity

    // Finaliser of splitmix64: ids that differ in any bit spread over the low bits.
    static std::size_t hash(std::int64_t id) {
        auto x = static_cast<std::uint64_t>(id);
        x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ULL;
        x = (x ^ (x >> 27)) * 0x94d049bb133111ebULL;
        return static_cast<std::size_t>(x ^ (x >> 31));
    }

    Slot& slot_of(std::int64_t id) {
        const std::size_t mask = slots_.size() - 1;
        std::size_t position = hash(id) & mask;
        while (slots_[position].entry != 0 && slots_[position].id != id) position = (position + 1) & mask;
        return slots_[position];
    }

    void grow() {
        slots_.assign(2 * slots_.size(), Slot{});
        for (std::size_t entry = 0; entry < ids_.size(); ++entry) slot_of(ids_[entry]) = {ids_[entry], entry + 1};
    }

    std::vector<Slot> slots_;
    std::vector<std::int64_t> ids_;
};

}  // namespace detail

inline Partition partition(const std::int64_t* ids, std::size_t count) {
    detail::IdIndex index;
    std::vector<std::size_t> set_of(count);
    for (std::size_t row = 0; row < count; ++row) {
        const bool repeats = row > 0 && ids[row] == ids[row - 1];  // usual case: the rows of a group lie together
        set_of[row] = repeats ? set_of[row - 1] : index.find_or_insert(ids[row]);
    }

    const std::vector<std::int64_t>& seen = index.ids();
    std::vector<std::size_t> order(seen.size());
    std::iota(order.begin(), order.end(), std::size_t{0});
    std::sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) { return seen[a] < seen[b]; });
    std::vector<std::size_t> rank(seen.size());
    Partition result;
    result.ids.resize(seen.size());
    for (std::size_t set = 0; set < order.size(); ++set) {
        result.ids[set] = seen[order[set]];
        rank[order[set]] = set;
    }

    result.offsets.assign(seen.size() + 1, 0);
    for (std::size_t& set : set_of) {
        set = rank[set];
        ++result.offsets[set + 1];
    }
    std::partial_sum(result.offsets.begin(), result.offsets.end(), result.offsets.begin());
    std::vector<std::size_t> next(result.offsets.begin(), result.offsets.end() - 1);
    result.rows.resize(count);
    for (std::size_t row = 0; row < count; ++row) result.rows[next[set_of[row]]++] = row;
    return result;
}

}  // namespace g2rpo
