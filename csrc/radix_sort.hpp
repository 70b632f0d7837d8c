// SPDX-License-Identifier: Apache-2.0
// Sorts many doubles in linear time.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <utility>

#include "large_vector.hpp"

namespace g2rpo {

inline std::uint64_t bits_of(double value) {
    std::uint64_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

inline double from_bits(std::uint64_t bits) {
    double value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

// A value, as bits whose order as an unsigned integer is that of the values, and where it came from.
struct SortEntry {
    std::uint64_t key;
    std::uint32_t position;

    SortEntry() = default;
    SortEntry(double value, std::uint32_t from) : key(bits_of(value)), position(from) {
        key = key & sign ? ~key : key | sign;
    }
    double value() const { return from_bits(key & sign ? key ^ sign : ~key); }

private:
    static constexpr std::uint64_t sign = std::uint64_t{1} << 63;
};

// Least significant byte first; bytes that all values share cost no pass.
inline void radix_sort(LargeVector<SortEntry>& entries, LargeVector<SortEntry>& scratch) {
    constexpr std::size_t bytes = sizeof(SortEntry::key);
    const auto byte_of = [](const SortEntry& entry, std::size_t byte) { return entry.key >> 8 * byte & 255; };
    std::array<std::array<std::uint32_t, 256>, bytes> histograms{};
    for (const SortEntry& entry : entries) {
        for (std::size_t byte = 0; byte < bytes; ++byte) ++histograms[byte][byte_of(entry, byte)];
    }
    scratch.resize(entries.size());
    for (std::size_t byte = 0; byte < bytes; ++byte) {
        std::array<std::uint32_t, 256>& next = histograms[byte];
        if (next[byte_of(entries[0], byte)] == entries.size()) continue;
        std::exclusive_scan(next.begin(), next.end(), next.begin(), std::uint32_t{0});
        for (const SortEntry& entry : entries) scratch[next[byte_of(entry, byte)]++] = entry;
        std::swap(entries, scratch);
    }
}

}  // namespace g2rpo
