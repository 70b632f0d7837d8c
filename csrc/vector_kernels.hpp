// SPDX-License-Identifier: Apache-2.0
// The inner loops that gain from wide vector registers.
#pragma once

#include <cstddef>
#include <cstdint>

namespace g2rpo {

// Values that count_smaller compares at a time.
constexpr std::size_t count_smaller_block = 8;

// smaller[i] = number of the n values that are smaller than values[i], in n^2 comparisons without a branch. Both arrays
// must reach up to the next multiple of count_smaller_block, whatever they hold from n on.
void count_smaller(const double* values, std::size_t n, std::int64_t* smaller);

// Replaces n probabilities, each of them in the central region, by central_normal_quantile.
void central_normal_quantiles(double* probabilities, std::size_t n);

// Replaces n values of tail_root by the negative tail_normal_quantile.
void lower_tail_normal_quantiles(double* roots, std::size_t n);

}  // namespace g2rpo
