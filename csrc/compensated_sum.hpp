// SPDX-License-Identifier: Apache-2.0
// Neumaier's compensated summation.
#pragma once

#include <cmath>

namespace g2rpo {

// A sum whose error does not grow with the number of terms.
class CompensatedSum {
public:
    void add(double term) {
        const double next = sum_ + term;
        correction_ += std::fabs(sum_) >= std::fabs(term) ? (sum_ - next) + term : (term - next) + sum_;
        sum_ = next;
    }
    double value() const { return sum_ + correction_; }

private:
    double sum_ = 0.0, correction_ = 0.0;
};

}  // namespace g2rpo
