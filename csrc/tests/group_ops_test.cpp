// SPDX-License-Identifier: Apache-2.0
// Tests of the op without Python, so that sanitizers see nothing else. Prints a checksum of the bits of all results, by
// which builds for different instruction sets can be compared; exits with 1 after a failure.
// tests/unit/objective/test_group_ops_cpp.py builds and runs it.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <limits>
#include <map>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "../gaussian_advantages.hpp"
#include "../set_statistics.hpp"
#include "check.hpp"
#include "parts_test.hpp"

using namespace g2rpo;

namespace {

struct Rows {
    Doubles rewards;
    Ids groups, tasks;

    std::size_t size() const { return rewards.size(); }

    Rows in_order(const std::vector<std::size_t>& order) const {
        Rows rows;
        for (const std::size_t row : order) {
            rows.rewards.push_back(rewards[row]);
            rows.groups.push_back(groups[row]);
            rows.tasks.push_back(tasks[row]);
        }
        return rows;
    }
};

const AdvantageOptions paper{{Stage::group, Stage::task}, 1e-6, true, false};
const AdvantageOptions group_stage{{Stage::group}, 1e-6, true, false};

Doubles advantages(const Rows& rows, const AdvantageOptions& options) {
    Doubles result(rows.size());
    gaussian_advantages(Batch<double>{rows.rewards.data(), rows.groups.data(), rows.tasks.data(), rows.size()}, options,
                        result.data());
    add_to_checksum(result);
    return result;
}

Doubles one_group(const Doubles& rewards, const AdvantageOptions& options = group_stage) {
    return advantages({rewards, Ids(rewards.size(), 7), Ids(rewards.size(), 7)}, options);
}

// The definition, one set after the other: sort, mean of the quantiles over each chain of ties.
Doubles by_definition(const Rows& rows, const AdvantageOptions& options) {
    Doubles values = rows.rewards;
    std::vector<bool> dropped(rows.size());
    const auto members_by_id = [&](const Ids& ids) {
        std::map<std::int64_t, std::vector<std::size_t>> sets;
        for (std::size_t row = 0; row < rows.size(); ++row) {
            if (!dropped[row]) sets[ids[row]].push_back(row);
        }
        return sets;
    };
    for (const Stage stage : options.stages) {
        for (auto& [id, members] : members_by_id(stage == Stage::group ? rows.groups : rows.tasks)) {
            std::sort(members.begin(), members.end(), [&](auto a, auto b) { return values[a] < values[b]; });
            const std::size_t n = members.size();
            Doubles images(n);
            for (std::size_t begin = 0, end = 0; begin < n; begin = end) {
                const auto tied = [&](double a, double b) { return a == b || b - a < options.tie_tolerance; };
                for (end = begin + 1; end < n && tied(values[members[end - 1]], values[members[end]]);) ++end;
                long double sum = 0;
                for (std::size_t k = begin; k < end; ++k) {
                    // 1 - p has more digits than p near 1.
                    const bool lower = 2 * k + 1 <= n;
                    const double tail = (static_cast<double>(lower ? k : n - 1 - k) + 0.5) / static_cast<double>(n);
                    sum += lower ? normal_quantile(tail) : -normal_quantile(tail);
                }
                const bool all = end - begin == n;
                for (std::size_t k = begin; k < end; ++k) {
                    images[k] = all ? 0.0 : static_cast<double>(sum / static_cast<long double>(end - begin));
                    if (all && options.drop_zero_variance) dropped[members[k]] = true;
                }
            }
            for (std::size_t k = 0; k < n; ++k) values[members[k]] = images[k];
        }
    }
    if (options.unit_variance) {
        for (const auto& [id, members] : members_by_id(rows.tasks)) {
            long double mean = 0, square = 0;
            for (const std::size_t row : members) mean += values[row] / static_cast<long double>(members.size());
            for (const std::size_t row : members) square += (values[row] - mean) * (values[row] - mean);
            const double std = std::sqrt(static_cast<double>(square / static_cast<long double>(members.size())));
            for (const std::size_t row : members) values[row] /= std > 1e-9 ? std : 1.0;
        }
    }
    return values;
}

void test_the_papers_values() {
    const auto near = [](const Doubles& a, const Doubles& b) { return close(a, b, 5e-5); };  // printed to 4 digits
    CHECK(near(one_group({0, 0, 0, 0, 1}), {-0.3204, -0.3204, -0.3204, -0.3204, 1.2816}));
    CHECK(near(one_group({0.81, 0.81, 0.82, 0.82, 0.83}), {-0.9030, -0.9030, 0.2622, 0.2622, 1.2816}));
}

void test_ties() {
    AdvantageOptions options = group_stage;
    options.tie_tolerance = 1.0;
    // 0 ~ 0.6 ~ 1.2 through the middle, although 0 and 1.2 are further apart than the tolerance.
    CHECK(one_group({1.2, 0.0, 0.6, 9.0}, options) == one_group({0, 0, 0, 1}));
    options.tie_tolerance = 0.5;
    CHECK(one_group({1.2, 0.0, 0.6, 9.0}, options) == one_group({2, 0, 1, 3}));
    options.tie_tolerance = 0.0;  // equal values tie at every tolerance
    CHECK(one_group({3, 3, 4}, options) == one_group({0, 0, 1}));
    // So do zeros of both signs, also where values are told apart by their bits.
    Doubles signs(200, 4.0), zeros(200, 4.0);
    for (std::size_t i = 0; i < 100; ++i) signs[i] = i % 2 == 0 ? 0.0 : -0.0, zeros[i] = 0.0;
    CHECK(one_group(signs, options) == one_group(zeros, options));
}

void test_zero_variance() {
    const Rows rows{{0, 0, 1, 5, 5, 5}, {1, 1, 1, 2, 2, 2}, {0, 0, 0, 0, 0, 0}};
    const Doubles dropped = advantages(rows, paper);
    CHECK(equal_bits(Doubles(dropped.begin() + 3, dropped.end()), {0.0, 0.0, 0.0}));
    CHECK(Doubles(dropped.begin(), dropped.begin() + 3) == one_group({0, 0, 1}));
    AdvantageOptions keep = paper;
    keep.drop_zero_variance = false;
    const Doubles kept = advantages(rows, keep);
    CHECK(kept[3] > kept[0] && kept[3] < kept[2] && kept[3] == kept[5]);
    CHECK(close(kept, by_definition(rows, keep), 1e-12));
    AdvantageOptions unit = paper;
    unit.unit_variance = true;
    CHECK(equal_bits(one_group({2, 2, 2}, unit), {0.0, 0.0, 0.0}));
}

void test_no_rows_and_one() {
    CHECK(advantages({}, paper).empty());
    CHECK(equal_bits(one_group({7.5}, paper), {0.0}));
    AdvantageOptions unit{{Stage::group, Stage::task}, 0.0, false, true};
    CHECK(advantages({}, unit).empty());
    CHECK(equal_bits(one_group({7.5}, unit), {0.0}));
    const SetStatistics none = set_statistics(nullptr, nullptr, 0, 1e-6);
    CHECK(none.id.empty() && none.mean.empty());
}

void test_extreme_rewards() {
    AdvantageOptions options = group_stage;
    options.tie_tolerance = 0.0;
    CHECK(one_group({-huge, -1, -denormal, 0, denormal, 2, huge}, options) == one_group({0, 1, 2, 3, 4, 5, 6}));
    CHECK(equal_bits(one_group({0, denormal}), {0.0, 0.0}));  // nearer than the tolerance of 1e-6
}

void test_errors() {
    const Ids groups{4, 17}, tasks{0, -2};
    const auto run = [&](auto bad) {
        const std::vector<decltype(bad)> rewards{0, bad};
        Doubles result(2);
        return error_of([&] {
            gaussian_advantages(Batch<decltype(bad)>{rewards.data(), groups.data(), tasks.data(), 2}, paper,
                                result.data());
        });
    };
    const double infinity = std::numeric_limits<double>::infinity();
    CHECK(run(std::nan("")) == "reward of row 1 is nan (group 17, task -2); rewards must be finite");
    CHECK(run(infinity) == "reward of row 1 is inf (group 17, task -2); rewards must be finite");
    CHECK(run(-infinity) == "reward of row 1 is -inf (group 17, task -2); rewards must be finite");
    CHECK(run(-std::numeric_limits<float>::infinity()).find("row 1 is -inf") != std::string::npos);
    CHECK(run(1.0).empty());
    const Batch<double> too_many{nullptr, nullptr, nullptr, std::size_t{1} << 32};
    CHECK(error_of([&] { gaussian_advantages(too_many, paper, nullptr); }) ==
          "a batch has fewer than 2^32 rows, got 4294967296");
}

// Groups of all sizes, with and without ties; ids at the limits; tasks large enough to be indexed or to be sorted.
Rows random_rows(std::uint64_t seed, std::size_t groups, std::size_t largest_group, std::size_t tasks) {
    std::mt19937_64 random(seed);
    std::normal_distribution<double> normal;
    Rows rows;
    for (std::size_t group = 0; group < groups; ++group) {
        const std::size_t size = 1 + random() % largest_group;
        const std::uint64_t grid = random() % 4;
        const std::int64_t id = group == 0 ? lowest_id : group == 1 ? highest_id : static_cast<std::int64_t>(random());
        const std::int64_t task = random() % tasks == 0 ? lowest_id : static_cast<std::int64_t>(random() % tasks);
        for (std::size_t i = 0; i < size; ++i) {
            rows.rewards.push_back(grid == 0 ? normal(random) : static_cast<double>(random() % (grid + 1)));
            rows.groups.push_back(id);
            rows.tasks.push_back(task);
        }
    }
    return rows;
}

void test_advantages_follow_the_definition_in_every_order_of_rows() {
    std::mt19937_64 random(4);
    std::vector<Rows> batches{random_rows(1, 40, 12, 3), random_rows(2, 300, 40, 2), random_rows(3, 12, 700, 2)};
    const std::vector<std::vector<Stage>> orders{
        {Stage::group}, {Stage::task}, {Stage::group, Stage::task}, {Stage::task, Stage::group}};
    for (const Rows& rows : batches) {
        std::vector<std::size_t> order(rows.size());
        std::iota(order.begin(), order.end(), std::size_t{0});
        std::shuffle(order.begin(), order.end(), random);
        for (const std::vector<Stage>& stages : orders) {
            for (const int choice : {0, 1, 2, 3}) {
                const AdvantageOptions options{stages, 1e-6, choice % 2 == 0, choice / 2 == 0};
                const Doubles actual = advantages(rows, options);
                CHECK(close(actual, by_definition(rows, options), 1e-12));
                Doubles expected;
                for (const std::size_t row : order) expected.push_back(actual[row]);
                CHECK(equal_bits(advantages(rows.in_order(order), options), expected));
            }
        }
    }
}

void test_statistics() {
    const Rows rows{{1, 2, 0.1, 4, 0.1, 4 + 1e-9}, {3, 3, lowest_id, 3, lowest_id, 3}, {}};
    const SetStatistics groups = set_statistics(rows.rewards.data(), rows.groups.data(), rows.size(), 1e-6);
    CHECK(groups.id == (Ids{lowest_id, 3}));
    CHECK(groups.count == (Ids{2, 4}));
    CHECK(groups.distinct == (Ids{1, 3}));
    CHECK(groups.mean[0] == 0.1 && groups.std[0] == 0.0);  // exactly, although 0.1 has no exact binary form
    CHECK(std::fabs(groups.mean[1] - 2.75) < 1e-8 && std::fabs(groups.std[1] - std::sqrt(1.6875)) < 1e-8);
    CHECK(groups.min[1] == 1 && groups.max[1] == 4 + 1e-9);
    for (const double magnitude : {huge, 1e200, 1e-200, denormal}) {
        const Doubles pair{magnitude, -magnitude};
        const Ids ids{0, 0};
        const SetStatistics one = set_statistics(pair.data(), ids.data(), 2, 0.0);
        CHECK(one.mean[0] == 0.0 && one.std[0] == magnitude);
    }
    for (const Doubles& values : samples()) {
        const Ids ids(values.size(), -1);
        const SetStatistics one = set_statistics(values.data(), ids.data(), values.size(), 0.0);
        const auto [low, high] = std::minmax_element(values.begin(), values.end());
        CHECK(one.min[0] == *low && one.max[0] == *high);
        CHECK(one.mean[0] >= *low && one.mean[0] <= *high && std::isfinite(one.std[0]));
        add_to_checksum(one.mean);
        add_to_checksum(one.std);
    }
}

}  // namespace

int main() {
    test_normal_quantile();
    test_midpoint_quantiles_are_the_quantile_function_bit_for_bit();
    test_count_smaller();
    test_first_appearance();
    test_partition();
    test_rows_that_lie_set_by_set_are_not_copied();
    test_distinct_values();
    test_radix_sort();
    test_large_vectors_keep_what_they_hold_as_they_grow();
    test_the_papers_values();
    test_ties();
    test_zero_variance();
    test_no_rows_and_one();
    test_extreme_rewards();
    test_errors();
    test_advantages_follow_the_definition_in_every_order_of_rows();
    test_statistics();
    std::printf("checksum %016llx\n", static_cast<unsigned long long>(checksum));
    return failures == 0 ? 0 : 1;
}
