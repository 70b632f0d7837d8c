// SPDX-License-Identifier: Apache-2.0
// Tests of what the op is made of: quantiles, partition, distinct values, sorting, storage.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <map>
#include <random>
#include <vector>

#include "../distinct_values.hpp"
#include "../first_appearance.hpp"
#include "../large_vector.hpp"
#include "../midpoint_quantiles.hpp"
#include "../normal_quantile.hpp"
#include "../partition.hpp"
#include "../radix_sort.hpp"
#include "../vector_kernels.hpp"
#include "check.hpp"

using namespace g2rpo;

namespace {

void test_normal_quantile() {
    // 17 digits from mpmath; the third is beyond sqrt(-log(p)) = 5, where the third approximation begins.
    CHECK(std::fabs(normal_quantile(0.975) - 1.9599639845400543) < 1e-15);
    CHECK(std::fabs(normal_quantile(1e-3) + 3.0902323061678135) < 1e-15);
    CHECK(std::fabs(normal_quantile(1e-20) + 9.2623400897984076) < 1e-14);
    CHECK(normal_quantile(0.5) == 0.0);
    CHECK(normal_quantile(0.25) == -normal_quantile(0.75));
    CHECK(std::isfinite(normal_quantile(std::numeric_limits<double>::min())));
}

void test_midpoint_quantiles_are_the_quantile_function_bit_for_bit() {
    MidpointQuantiles quantiles;
    for (const std::size_t n : {1, 2, 3, 7, 8, 32, 127, 1000, 100003}) {
        quantiles.resize(n);
        Doubles actual, expected;
        for (std::size_t k = 0; k < n; ++k) {
            const std::size_t mirrored = std::min(k, n - 1 - k);
            const double lower = normal_quantile((static_cast<double>(mirrored) + 0.5) / static_cast<double>(n));
            actual.push_back(quantiles[k]);
            expected.push_back(2 * k + 1 == n ? 0.0 : k == mirrored ? lower : -lower);
        }
        CHECK(equal_bits(actual, expected));
        CHECK(quantiles.mean(0, n) == 0.0);
        CHECK(quantiles.mean(0, 1) == quantiles[0]);
        CHECK(quantiles.mean(n / 2, n) == -quantiles.mean(0, n - n / 2));
        add_to_checksum(actual);
    }
}

void test_count_smaller() {
    std::mt19937_64 random(1);
    for (std::size_t n = 0; n <= 40; ++n) {
        const std::size_t padded = (n + count_smaller_block - 1) / count_smaller_block * count_smaller_block;
        Doubles values(padded, -huge);
        for (std::size_t i = 0; i < n; ++i) values[i] = static_cast<double>(random() % 11) - 5.0;
        std::vector<std::int64_t> smaller(padded);
        count_smaller(values.data(), n, smaller.data());
        for (std::size_t i = 0; i < n; ++i) {
            const auto last = values.begin() + static_cast<std::ptrdiff_t>(n);
            CHECK(smaller[i] == std::count_if(values.begin(), last, [&](double x) { return x < values[i]; }));
        }
    }
}

void test_first_appearance() {
    FirstAppearance keys;
    for (int turn = 0; turn < 2; ++turn) {
        // Strides that leave the low or the high bits empty, both limits, and more keys than any first capacity.
        for (const int shift : {0, 20, 47}) {
            for (std::uint64_t i = 0; i < 5000; ++i) {
                const auto known = static_cast<std::uint32_t>(keys.keys().size());
                const std::uint32_t number = keys.find_or_insert(i << shift | std::uint64_t{1} << 63);
                CHECK(number <= known);
                CHECK(keys.keys()[number] == (i << shift | std::uint64_t{1} << 63));
                CHECK(keys.find_or_insert(i << shift | std::uint64_t{1} << 63) == number);
            }
        }
        CHECK(keys.find_or_insert(0) == keys.keys().size() - 1);
        CHECK(keys.find_or_insert(~std::uint64_t{0}) == keys.keys().size() - 1);
        keys.clear();
        CHECK(keys.keys().empty());
    }
}

void test_partition() {
    const Ids ids{5, 5, lowest_id, 5, highest_id, highest_id, -1};
    const Partition sets(ids.data(), ids.size());
    CHECK(sets.size() == 4);
    CHECK(sets.id(0) == 5 && sets.id(1) == lowest_id && sets.id(2) == highest_id && sets.id(3) == -1);
    CHECK(sets.count(0) == 3 && sets.count(1) == 1 && sets.count(2) == 2 && sets.count(3) == 1);
    const Doubles rows{0, 1, 2, 3, 4, 5, 6};
    LargeVector<double> buffer;
    const double* const by_set = sets.gather(rows.data(), buffer);
    CHECK(Doubles(by_set, by_set + 7) == (Doubles{0, 1, 3, 2, 4, 5, 6}));
    Doubles back(7);
    sets.scatter(by_set, back.data());
    CHECK(back == rows);

    std::vector<char> active;
    sets.deactivate({1, 0, 0, 1}, active);
    CHECK(active == (std::vector<char>{0, 0, 1, 0, 1, 1, 0}));
    const Partition rest(ids.data(), ids.size(), active);
    CHECK(rest.size() == 2 && rest.id(0) == lowest_id && rest.id(1) == highest_id);
    const double* const of_rest = rest.gather(rows.data(), buffer);
    CHECK(Doubles(of_rest, of_rest + 3) == (Doubles{2, 4, 5}));

    const Partition none(ids.data(), 0);
    CHECK(none.size() == 0);
    const Partition nobody(ids.data(), ids.size(), std::vector<char>(7, 0));
    CHECK(nobody.size() == 0);
}

void test_rows_that_lie_set_by_set_are_not_copied() {
    for (const Ids& ids : {Ids{1, 1, 2, 9}, Ids{4, 4, -3, 2}}) {
        const Partition sets(ids.data(), ids.size());
        Doubles rows{1, 2, 3, 4};
        LargeVector<double> buffer;
        CHECK(sets.size() == 3 && sets.gather(rows.data(), buffer) == rows.data() && buffer.empty());
    }
    const Ids scattered{1, 2, 1, 2};
    Doubles rows{1, 2, 3, 4};
    LargeVector<double> buffer;
    CHECK(Partition(scattered.data(), 4).gather(rows.data(), buffer) != rows.data());
}

void test_distinct_values() {
    DistinctValues distinct;  // one for all, as in the op: nothing may remain from the set before
    for (const Doubles& values : samples()) {
        std::map<double, std::size_t> expected;
        for (const double value : values) ++expected[value];
        distinct.find(values.data(), values.size());
        CHECK(distinct.total() == values.size());
        CHECK(distinct.size() == expected.size());
        Doubles by_label(distinct.labels());
        std::size_t level = 0;
        for (const auto& [value, count] : expected) {
            CHECK(distinct.value(level) == value && distinct.count(level) == count);
            CHECK(distinct.label(level) < distinct.labels());
            by_label[distinct.label(level++)] = value;
        }
        Doubles replaced(values.size());
        distinct.replace(replaced.data(), by_label.data());
        CHECK(equal_bits(replaced, values));
    }
}

void test_radix_sort() {
    std::mt19937_64 random(3);
    for (const std::size_t n : {1, 2, 3000}) {
        LargeVector<SortEntry> entries, scratch;
        Doubles values;
        while (values.size() < n) {
            const double value = from_bits(random());
            if (!std::isfinite(value)) continue;
            entries.emplace_back(value, static_cast<std::uint32_t>(values.size()));
            values.push_back(value);
        }
        radix_sort(entries, scratch);
        for (const SortEntry& entry : entries) CHECK(bits_of(entry.value()) == bits_of(values[entry.position]));
        for (std::size_t i = 1; i < n; ++i) CHECK(entries[i - 1].value() <= entries[i].value());
    }
}

void test_large_vectors_keep_what_they_hold_as_they_grow() {
    LargeVector<std::uint32_t> vector;
    for (std::uint32_t i = 0; i < 3'000'000; ++i) vector.push_back(i);  // over the threshold of huge pages, and twice
    std::size_t wrong = 0;
    for (std::uint32_t i = 0; i < vector.size(); ++i) wrong += vector[i] != i;
    CHECK(wrong == 0);
}

}  // namespace
