// SPDX-License-Identifier: Apache-2.0
// What the tests of the op share: checks that count, the checksum of all results, values to test with.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <functional>
#include <limits>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "../radix_sort.hpp"

using namespace g2rpo;

namespace {

int failures = 0;
std::uint64_t checksum = 0xcbf29ce484222325ULL;

#define CHECK(condition)                                                      \
    do {                                                                      \
        if (!(condition)) {                                                   \
            std::printf("%s:%d: %s\n", __FILE__, __LINE__, #condition);       \
            ++failures;                                                       \
        }                                                                     \
    } while (false)

using Doubles = std::vector<double>;
using Ids = std::vector<std::int64_t>;

constexpr std::int64_t lowest_id = std::numeric_limits<std::int64_t>::min();
constexpr std::int64_t highest_id = std::numeric_limits<std::int64_t>::max();
constexpr double denormal = std::numeric_limits<double>::denorm_min();
constexpr double huge = std::numeric_limits<double>::max();

void add_to_checksum(const Doubles& values) {
    for (const double value : values) checksum = (checksum ^ bits_of(value)) * 0x100000001b3ULL;
}

bool equal_bits(const Doubles& a, const Doubles& b) {
    return std::equal(a.begin(), a.end(), b.begin(), b.end(),
                      [](double x, double y) { return bits_of(x) == bits_of(y); });
}

bool close(const Doubles& a, const Doubles& b, double tolerance) {
    return std::equal(a.begin(), a.end(), b.begin(), b.end(),
                      [&](double x, double y) { return std::fabs(x - y) <= tolerance; });
}

// The message of the exception that the call throws, or "".
std::string error_of(const std::function<void()>& call) {
    try {
        call();
    } catch (const std::exception& error) {
        return error.what();
    }
    return "";
}

// Values for which DistinctValues ranks (up to 128), indexes (few distinct) and sorts (many distinct).
std::vector<Doubles> samples() {
    std::mt19937_64 random(2);
    std::normal_distribution<double> normal;
    std::vector<Doubles> result;
    for (const std::size_t n : {1, 2, 7, 8, 9, 127, 128, 129, 1000, 40000}) {
        for (const std::uint64_t distinct : {1, 2, 12, 17, 5000}) {
            Doubles few;
            for (std::size_t i = 0; i < n; ++i) few.push_back(static_cast<double>(random() % distinct) / 3.0 - 2.0);
            result.push_back(few);
        }
        Doubles many, magnitudes;
        for (std::size_t i = 0; i < n; ++i) {
            many.push_back(normal(random));
            magnitudes.push_back(std::ldexp(normal(random), static_cast<int>(random() % 2000) - 1074) + 0.0);
        }
        result.push_back(many);
        result.push_back(magnitudes);
    }
    result.push_back({huge, -huge, denormal, -denormal, 0.0});
    return result;
}

}  // namespace
