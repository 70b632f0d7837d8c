// SPDX-License-Identifier: Apache-2.0
// Numbers 64-bit keys in the order in which they first appear.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace g2rpo {

// Open-addressing hash map from a key to the order of its first appearance. Every key is legal.
class FirstAppearance {
public:
    FirstAppearance() : slots_(initial_capacity) {}

    std::uint32_t find_or_insert(std::uint64_t key) {
        const std::size_t position = position_of(key);
        if (slots_[position].entry != 0) return slots_[position].entry - 1;
        return insert(key, position);
    }

    // Keys by their number.
    const std::vector<std::uint64_t>& keys() const { return keys_; }

    // Forgets the keys, in time linear in their number, and keeps the memory.
    void clear() {
        // Last in, first out: a slot is found by probing over slots that were taken before it.
        while (!keys_.empty()) {
            slots_[position_of(keys_.back())].entry = 0;
            keys_.pop_back();
        }
    }

private:
    struct Slot {
        std::uint64_t key = 0;
        std::uint32_t entry = 0;  // 1 + number of the key; 0 marks a free slot
    };
    // A power of two, as is every later capacity; so large that few keys rarely share a slot, whose look-ups branch.
    static constexpr std::size_t initial_capacity = 1024;

    // Finaliser of splitmix64: keys that differ in any bit spread over the low bits.
    static std::size_t hash(std::uint64_t x) {
        x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ULL;
        x = (x ^ (x >> 27)) * 0x94d049bb133111ebULL;
        return static_cast<std::size_t>(x ^ (x >> 31));
    }

    // Where the key is, or the free slot that it would take.
    std::size_t position_of(std::uint64_t key) const {
        const std::size_t mask = slots_.size() - 1;
        std::size_t position = hash(key) & mask;
        while (slots_[position].entry != 0 && slots_[position].key != key) position = (position + 1) & mask;
        return position;
    }

    std::uint32_t insert(std::uint64_t key, std::size_t position) {
        keys_.push_back(key);
        slots_[position] = {key, static_cast<std::uint32_t>(keys_.size())};
        if (2 * keys_.size() > slots_.size()) grow();
        return static_cast<std::uint32_t>(keys_.size() - 1);
    }

    void grow() {
        slots_.assign(4 * slots_.size(), Slot{});
        for (std::size_t number = 0; number < keys_.size(); ++number) {
            slots_[position_of(keys_[number])] = {keys_[number], static_cast<std::uint32_t>(number + 1)};
        }
    }

    std::vector<Slot> slots_;
    std::vector<std::uint64_t> keys_;
};

}  // namespace g2rpo
