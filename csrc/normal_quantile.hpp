// SPDX-License-Identifier: Apache-2.0
// The inverse of the standard normal distribution function.
//
// Source: M. J. Wichura, "Algorithm AS 241: The Percentage Points of the Normal Distribution", Applied Statistics 37
// (1988) 477-484, routine PPND16: rational approximations with a relative error of about 1e-16.
#pragma once

#include <array>
#include <cmath>
#include <cstddef>

namespace g2rpo {

namespace detail {

// Horner's rule, coefficients in ascending order of power.
template <std::size_t N>
inline double polynomial(const std::array<double, N>& coefficients, double x) {
    double value = coefficients[N - 1];
    for (std::size_t power = N - 1; power-- > 0;) value = value * x + coefficients[power];
    return value;
}

// |p - 1/2| <= 0.425, in 0.425^2 - (p - 1/2)^2.
constexpr std::array<double, 8> central_numerator = {
    3.3871328727963666080e0, 1.3314166789178437745e2, 1.9715909503065514427e3, 1.3731693765509461125e4,
    4.5921953931549871457e4, 6.7265770927008700853e4, 3.3430575583588128105e4, 2.5090809287301226727e3};
constexpr std::array<double, 8> central_denominator = {
    1.0,                     4.2313330701600911252e1, 6.8718700749205790830e2, 5.3941960214247511077e3,
    2.1213794301586595867e4, 3.9307895800092710610e4, 2.8729085735721942674e4, 5.2264952788528545610e3};
// sqrt(-log(tail probability)) <= 5, in that root minus 1.6.
constexpr std::array<double, 8> tail_numerator = {
    1.42343711074968357734e0, 4.63033784615654529590e0, 5.76949722146069140550e0,  3.64784832476320460504e0,
    1.27045825245236838258e0, 2.41780725177450611770e-1, 2.27238449892691845833e-2, 7.74545014278341407640e-4};
constexpr std::array<double, 8> tail_denominator = {
    1.0,                      2.05319162663775882187e0,  1.67638483018380384940e0,  6.89767334985100004550e-1,
    1.48103976427480074590e-1, 1.51986665636164571966e-2, 5.47593808499534494600e-4, 1.05075007164441684324e-9};
// Beyond, in the root minus 5.
constexpr std::array<double, 8> far_numerator = {
    6.65790464350110377720e0,  5.46378491116411436990e0,  1.78482653991729133580e0,  2.96560571828504891230e-1,
    2.65321895265761230930e-2, 1.24266094738807843860e-3, 2.71155556874348757815e-5, 2.01033439929228813265e-7};
constexpr std::array<double, 8> far_denominator = {
    1.0,                       5.99832206555887937690e-1, 1.36929880922735805310e-1, 1.48753612908506148525e-2,
    7.86869131145613259100e-4, 1.84631831751005468180e-5, 1.42151175831644588870e-7, 2.04426310338993978564e-15};

}  // namespace detail

// Phi^-1(p) has three branches. Here the central one holds:
inline bool in_central_region(double p) { return std::fabs(p - 0.5) <= 0.425; }

inline double central_normal_quantile(double p) {
    const double centred = p - 0.5;
    const double r = 0.180625 - centred * centred;
    return centred * detail::polynomial(detail::central_numerator, r) /
           detail::polynomial(detail::central_denominator, r);
}

// Outside of it, |Phi^-1| depends on this of the smaller tail's probability,
inline double tail_root(double tail_probability) { return std::sqrt(-std::log(tail_probability)); }

// up to where the third branch begins (1.4e-11).
constexpr double far_tail_root = 5.0;

inline double tail_normal_quantile(double root) {
    return detail::polynomial(detail::tail_numerator, root - 1.6) /
           detail::polynomial(detail::tail_denominator, root - 1.6);
}

inline double far_tail_normal_quantile(double root) {
    return detail::polynomial(detail::far_numerator, root - 5.0) /
           detail::polynomial(detail::far_denominator, root - 5.0);
}

// Phi^-1(p) for 0 < p < 1; odd in p - 1/2.
inline double normal_quantile(double p) {
    if (in_central_region(p)) return central_normal_quantile(p);
    const bool lower = p < 0.5;
    const double root = tail_root(lower ? p : 1.0 - p);
    const double magnitude = root <= far_tail_root ? tail_normal_quantile(root) : far_tail_normal_quantile(root);
    return lower ? -magnitude : magnitude;
}

}  // namespace g2rpo
