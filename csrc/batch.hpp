// SPDX-License-Identifier: Apache-2.0
// The rollouts that the op reads.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>

namespace g2rpo {

// N rollouts: rewards[i], groups[i] (id of the prompt) and tasks[i] belong to rollout i. Borrowed, never written.
template <class Real>
struct Batch {
    const Real* rewards;
    const std::int64_t* groups;
    const std::int64_t* tasks;
    std::size_t size;
};

// Copies the rewards in double precision. -0 becomes +0, which compares equal but would let the order of rows decide a
// sign bit. Throws std::invalid_argument for a reward that is not finite, std::length_error for 2^32 rows or more: rows
// and ranks are counted in 32 bits, which halves the memory that the op moves.
template <class Real>
void copy_rewards(const Batch<Real>& batch, double* values) {
    if (batch.size > std::numeric_limits<std::uint32_t>::max()) {
        throw std::length_error("a batch has fewer than 2^32 rows, got " + std::to_string(batch.size));
    }
    for (std::size_t row = 0; row < batch.size; ++row) {
        const auto value = static_cast<double>(batch.rewards[row]);
        if (!std::isfinite(value)) {
            throw std::invalid_argument("reward of row " + std::to_string(row) + " is " +
                                        (std::isnan(value) ? "nan" : value > 0 ? "inf" : "-inf") + " (group " +
                                        std::to_string(batch.groups[row]) + ", task " +
                                        std::to_string(batch.tasks[row]) + "); rewards must be finite");
        }
        values[row] = value + 0.0;
    }
}

}  // namespace g2rpo
