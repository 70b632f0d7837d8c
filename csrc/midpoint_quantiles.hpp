// SPDX-License-Identifier: Apache-2.0
// The midpoint quantiles of N(0, 1) that n ranked values are mapped to.
#pragma once

#include <algorithm>
#include <cstddef>
#include <vector>

#include "compensated_sum.hpp"
#include "large_vector.hpp"
#include "normal_quantile.hpp"
#include "vector_kernels.hpp"

namespace g2rpo {

// q_k = Phi^-1((k + 1/2) / n), k = 0 .. n-1. Only the lower half is computed; the upper half is its mirror image, which
// makes the map exactly antisymmetric. The last n is kept: groups mostly share one size.
class MidpointQuantiles {
public:
    void resize(std::size_t n) {
        if (n == size_) return;
        size_ = n;
        lower_.resize(n / 2);
        for (std::size_t k = 0; k < n / 2; ++k) lower_[k] = (static_cast<double>(k) + 0.5) / static_cast<double>(n);
        std::size_t tail = 0;
        for (; tail < n / 2 && !in_central_region(lower_[tail]); ++tail) lower_[tail] = tail_root(lower_[tail]);
        lower_tail_normal_quantiles(lower_.data(), tail);
        central_normal_quantiles(lower_.data() + tail, n / 2 - tail);
    }

    double operator[](std::size_t k) const {
        return k < size_ / 2 ? lower_[k] : k >= size_ - size_ / 2 ? -lower_[size_ - 1 - k] : 0.0;
    }

    // Mean of q_k for begin <= k < end. Ranks whose mirror images are also in the range cancel and are never added.
    double mean(std::size_t begin, std::size_t end) const {
        if (begin + end > size_) return -mean(size_ - end, size_ - begin);
        const std::size_t last = std::min(end, size_ - end);
        CompensatedSum sum;
        std::size_t k = begin;
        // Four at a time: all are negative, so that the short sums lose nothing worth compensating.
        for (; k + 4 <= last; k += 4) sum.add((lower_[k] + lower_[k + 1]) + (lower_[k + 2] + lower_[k + 3]));
        for (; k < last; ++k) sum.add(lower_[k]);
        return sum.value() / static_cast<double>(end - begin);
    }

private:
    std::size_t size_ = 0;
    LargeVector<double> lower_;
};

}  // namespace g2rpo
