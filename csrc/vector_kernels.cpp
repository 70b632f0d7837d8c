// SPDX-License-Identifier: Apache-2.0
// Plain loops in a file of their own: the compiler vectorises each of them once per instruction set, and the dynamic
// loader takes the widest that the CPU has. Every version does the same operations on every element, none of them
// contracted (setup.py), so that the results are the same bit for bit.
#include "vector_kernels.hpp"

#include <array>

#include "normal_quantile.hpp"

// The loader's choice needs ifunc, which is glibc's, and comes before a sanitizer is ready for it. A build may set the
// attribute itself (-DG2RPO_VECTOR_CLONES=), as the tests do to compare the versions.
#if !defined(G2RPO_VECTOR_CLONES) && defined(__x86_64__) && defined(__GLIBC__) && defined(__has_attribute) && \
    !defined(__SANITIZE_ADDRESS__)
#if __has_attribute(target_clones)
#define G2RPO_VECTOR_CLONES __attribute__((target_clones("default", "avx2", "avx512f")))
#endif
#endif
#ifndef G2RPO_VECTOR_CLONES
#define G2RPO_VECTOR_CLONES
#endif

namespace g2rpo {

G2RPO_VECTOR_CLONES
void count_smaller(const double* values, std::size_t n, std::int64_t* smaller) {
    for (std::size_t begin = 0; begin < n; begin += count_smaller_block) {
        std::array<std::int64_t, count_smaller_block> counts{};
        for (std::size_t other = 0; other < n; ++other) {
            for (std::size_t i = 0; i < count_smaller_block; ++i) counts[i] += values[other] < values[begin + i];
        }
        for (std::size_t i = 0; i < count_smaller_block; ++i) smaller[begin + i] = counts[i];
    }
}

G2RPO_VECTOR_CLONES
void central_normal_quantiles(double* probabilities, std::size_t n) {
    for (std::size_t i = 0; i < n; ++i) probabilities[i] = central_normal_quantile(probabilities[i]);
}

G2RPO_VECTOR_CLONES
void lower_tail_normal_quantiles(double* roots, std::size_t n) {
    for (std::size_t i = 0; i < n; ++i) roots[i] = -tail_normal_quantile(roots[i]);
}

}  // namespace g2rpo
