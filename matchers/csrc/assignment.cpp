// Minimum-cost assignment of columns to rows with capacities: row i takes exactly k columns, no column is taken twice.
//
// Shortest augmenting paths (Jonker and Volgenant, Computing 38, 1987) on the transportation problem itself instead
// of on k copies of each row: all columns of a row share its price, so a search settles each row once, not k times.
// Prices u (rows) and v <= 0 (columns) always satisfy u_i + v_j <= c_ij, with equality for taken columns, and v_j = 0
// for free ones: that is the proof of optimality. Compile without -ffast-math, but with -ffinite-math-only and
// -fno-signed-zeros, under which the minimum of a row vectorises; so "infinity" is a large number here.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>
#include <utility>
#include <vector>

namespace {

constexpr double kFar = 1e300;

class Solver {
 public:
  Solver(const float* cost, int64_t rows, int64_t columns, int64_t capacity)
      : cost_(cost), rows_(rows), columns_(columns), capacity_(capacity), u_(rows, 0.0), v_(columns, 0.0),
        open_(columns), distance_(columns), from_(columns), owner_(columns, -1), via_(rows),
        taken_(rows * capacity), count_(rows, 0) {}

  // Columns of row i, ascending, at [i * capacity, (i + 1) * capacity).
  std::vector<int64_t> run() {
    for (int64_t row = 0; row < rows_; ++row)
      for (int64_t unit = 0; unit < capacity_; ++unit) augment(row);
    for (int64_t row = 0; row < rows_; ++row)
      std::sort(taken_.begin() + row * capacity_, taken_.begin() + (row + 1) * capacity_);
    return std::move(taken_);
  }

 private:
  // Give one more column to `source` along the cheapest alternating path to a free column.
  void augment(int64_t source) {
    std::fill(distance_.begin(), distance_.end(), kFar);
    std::copy(v_.begin(), v_.end(), open_.begin());
    settled_rows_.clear();
    settled_columns_.clear();
    int64_t row = source, column = -1;
    double reached = 0.0;
    for (;;) {
      settle(row, reached);
      const double nearest = scan(row, reached);
      column = pick(nearest);
      reached = nearest;
      if (owner_[column] < 0) break;
      row = owner_[column];
      via_[row] = column;
    }
    for (const auto& [settled, at] : settled_rows_) u_[settled] += reached - at;
    for (const auto& [settled, at] : settled_columns_) v_[settled] -= reached - at;
    for (;;) {
      const int64_t next = from_[column];
      owner_[column] = next;
      if (next == source) break;
      int64_t* slots = taken_.data() + next * capacity_;
      *std::find(slots, slots + count_[next], via_[next]) = column;
      column = via_[next];
    }
    taken_[source * capacity_ + count_[source]++] = column;
  }

  // The row is final, and so are all columns it has taken, as their reduced cost is 0: close them to the search.
  void settle(int64_t row, double reached) {
    settled_rows_.emplace_back(row, reached);
    for (int64_t unit = 0; unit < count_[row]; ++unit) {
      const int64_t column = taken_[row * capacity_ + unit];
      settled_columns_.emplace_back(column, reached);
      open_[column] = -kFar;
      distance_[column] = kFar;
    }
  }

  // Relax all open columns from the row; the distance of the nearest.
  double scan(int64_t row, double reached) {
    const float* cost = cost_ + row * columns_;
    const double base = reached - u_[row];
    double* distance = distance_.data();
    const double* open = open_.data();
    int64_t* from = from_.data();
    const int64_t columns = columns_;  // a local copy: stores to `from` could alias the member
    double nearest = kFar;
    for (int64_t j = 0; j < columns; ++j) {
      const double length = base + static_cast<double>(cost[j]) - open[j];
      const bool shorter = length < distance[j];
      const double best = shorter ? length : distance[j];
      distance[j] = best;
      from[j] = shorter ? row : from[j];
      nearest = best < nearest ? best : nearest;
    }
    return nearest;
  }

  // The first free column at that distance, which ends the search, or else the first column.
  int64_t pick(double nearest) const {
    int64_t first = -1;
    for (int64_t j = 0; j < columns_; ++j) {
      if (distance_[j] != nearest) continue;
      if (owner_[j] < 0) return j;
      if (first < 0) first = j;
    }
    return first;
  }

  const float* cost_;
  const int64_t rows_, columns_, capacity_;
  std::vector<double> u_, v_, open_, distance_;
  std::vector<int64_t> from_, owner_, via_, taken_, count_;
  std::vector<std::pair<int64_t, double>> settled_rows_, settled_columns_;
};

void solve(const float* cost, int64_t targets, int64_t queries, int64_t capacity, int64_t* query_of) {
  if (targets == 0) return;
  if (targets <= queries) {
    const std::vector<int64_t> taken = Solver(cost, targets, queries, capacity).run();
    std::copy(taken.begin(), taken.end(), query_of);
    return;
  }
  std::vector<float> transposed(static_cast<size_t>(targets) * queries);
  for (int64_t i = 0; i < targets; ++i)
    for (int64_t j = 0; j < queries; ++j) transposed[j * targets + i] = cost[i * queries + j];
  const std::vector<int64_t> taken = Solver(transposed.data(), queries, targets, 1).run();
  std::fill(query_of, query_of + targets, -1);
  for (int64_t j = 0; j < queries; ++j) query_of[taken[j]] = j;
}

}  // namespace

// Solve independent problems, on several threads. Problem p has targets[p] x queries costs, row-major, at
// cost + cost_offset[p]; its result, capacity[p] queries of each target in ascending order (-1: none left, only if
// there are more targets than queries), goes to query_of + output_offset[p].
extern "C" void assign_all(const float* cost, int64_t problems, int64_t queries, const int64_t* cost_offset,
                           const int64_t* targets, const int64_t* capacity, const int64_t* output_offset,
                           int64_t* query_of, int64_t threads) {
  std::atomic<int64_t> next{0};
  const auto work = [&] {
    for (int64_t p = next++; p < problems; p = next++)
      solve(cost + cost_offset[p], targets[p], queries, capacity[p], query_of + output_offset[p]);
  };
  std::vector<std::thread> helpers;
  for (int64_t t = 1; t < std::min(threads, problems); ++t) helpers.emplace_back(work);
  work();
  for (std::thread& helper : helpers) helper.join();
}
