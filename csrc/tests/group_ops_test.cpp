// SPDX-License-Identifier: Apache-2.0
// Tests of the op without Python, so that sanitizers see nothing else. Prints a checksum of the bits of all results, by
// which builds for different instruction sets can be compared; exits with 1 after a failure.
// tests/unit/objective/test_group_ops_cpp.py builds and runs it.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <functional>
#include <limits>
#include <map>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "../gaussian_advantages.hpp"
#include "../set_statistics.hpp"

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
