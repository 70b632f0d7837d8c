// SPDX-License-Identifier: Apache-2.0
// Means and standard deviations.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>

#include "compensated_sum.hpp"
#include "distinct_values.hpp"

namespace g2rpo {

struct Moments {
    double mean, std;
};

// Mean and population standard deviation of a set of one value or more. Values whose squares would overflow or vanish
// are scaled by a power of two first, which is exact.
inline Moments moments(const DistinctValues& set) {
    const double smallest = set.value(0), largest = set.value(set.size() - 1);
    const auto n = static_cast<double>(set.total());
    const double magnitude = std::max(std::fabs(smallest), std::fabs(largest));
    const bool extreme = magnitude != 0.0 && (magnitude > 0x1p+400 || magnitude < 0x1p-400);
    const int exponent = extreme ? std::max(std::ilogb(magnitude), -1000) : 0;
    const double scale = std::ldexp(1.0, -exponent);
    CompensatedSum total;
    for (std::size_t level = 0; level < set.size(); ++level) {
        total.add(static_cast<double>(set.count(level)) * (set.value(level) * scale));
    }
    // The clamp keeps a rounded mean of equal values equal to them.
    const double mean = std::clamp(total.value() / n, smallest * scale, largest * scale);
    CompensatedSum squares;
    for (std::size_t level = 0; level < set.size(); ++level) {
        const double deviation = set.value(level) * scale - mean;
        squares.add(static_cast<double>(set.count(level)) * (deviation * deviation));
    }
    return {std::ldexp(mean, exponent), std::ldexp(std::sqrt(squares.value() / n), exponent)};
}

}  // namespace g2rpo
