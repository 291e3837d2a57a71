// Where the samples of one query and head lie, and with which weights: everything that comes before touching the value.
#pragma once

#include <algorithm>
#include <limits>
#include <vector>

#include "simd.h"

// Row-major tensors: value [B, S, H, D], samples [B, Q, H, N, 2], weights [B, Q, H, N] with N = levels * points.
// Everything but the value has the accumulation type: float, or double beside a double value.
struct Problem {
  int64_t images, pixels, queries, heads, channels, levels, points;
  int64_t value_type;       // 0 float32, 1 bfloat16, 2 float16, 3 float64
  int64_t fused;            // 1: offsets and logits, with valid sizes and a reference; 0: locations and weights
  int64_t reference_size;   // 2: points, 4: boxes
  int64_t threads;
  const int64_t* shapes;    // [levels, 2] (h, w)
  const int64_t* valid;     // [B, levels, 2] (h, w); fused only
  const void* value;
  const void* reference;    // [B, Q, reference_size]; fused only
  const void* samples;      // offsets or locations
  const void* weights;      // logits or weights
  void* output;             // [B, Q, H, D]
  const void* grad_output;  // [B, Q, H, D]
  void* grad_value;         // [B, S, H, D] of the accumulation type
  void* grad_samples;
  void* grad_weights;
  void* grad_reference;     // or null
};

// The samples of one query and head in levels [first, last), as a structure of arrays padded to whole vectors.
template <class A> class Samples {
 public:
  using V = Vec<A>;
  using I = IntVec<A>;
  using Int = typename Lanes<A>::Int;
  static constexpr int width = WIDTH<A>;

  int64_t begin, count, vectors;
  std::vector<V> limit_x, limit_y;  // width and height of the valid region; zero in padding lanes
  std::vector<V> weight;            // attention weights
  // Bilinear factors and their derivatives along x and y, zero for taps that do not exist.
  std::vector<V> left, right, top, bottom, d_left, d_right, d_top, d_bottom;
  std::vector<V> tap[4];            // weight times both factors: top left, top right, bottom left, bottom right
  std::vector<I> pixel[4];          // the pixel that each tap reads, within the image
  std::vector<I> active;            // nonzero if any tap exists

  Samples(const Problem& problem, int64_t first, int64_t last)
      : begin(first * problem.points), count((last - first) * problem.points), vectors((count + width - 1) / width),
        problem_(problem), all_(problem.levels * problem.points) {
    for (auto* reals : {&limit_x, &limit_y, &weight, &left, &right, &top, &bottom, &d_left, &d_right, &d_top,
                        &d_bottom, &tap[0], &tap[1], &tap[2], &tap[3]})
      reals->assign(vectors, V{});
    for (auto* ints : {&pixel[0], &pixel[1], &pixel[2], &pixel[3], &active, &stride_, &start_}) ints->assign(vectors, I{});
    coordinates_.assign(2 * vectors, V{});
    softmax_.assign((all_ + width - 1) / width + 1, V{});
  }

  // Sets the maps' limits for one image.
  void set_image(int64_t image) {
    int64_t start = 0, n = -begin;
    for (int64_t level = 0; level < problem_.levels; ++level) {
      const int64_t h = problem_.shapes[2 * level], w = problem_.shapes[2 * level + 1];
      int64_t valid_h = h, valid_w = w;
      if (problem_.fused) {
        const int64_t* valid = problem_.valid + 2 * (image * problem_.levels + level);
        valid_h = std::max<int64_t>(0, std::min(h, valid[0]));
        valid_w = std::max<int64_t>(0, std::min(w, valid[1]));
      }
      for (int64_t point = 0; point < problem_.points; ++point, ++n) {
        if (n < 0 || n >= count) continue;
        const bool empty = valid_h == 0 || valid_w == 0;
        limit_x[n / width][n % width] = static_cast<A>(empty ? 0 : valid_w);
        limit_y[n / width][n % width] = static_cast<A>(empty ? 0 : valid_h);
        stride_[n / width][n % width] = static_cast<Int>(w);
        start_[n / width][n % width] = static_cast<Int>(start);
      }
      start += h * w;
    }
  }

  // First and one past the last pixel of the levels.
  std::pair<int64_t, int64_t> pixel_range() const {
    int64_t start = 0, first = 0, last = 0;
    for (int64_t level = 0; level < problem_.levels; ++level) {
      if (level * problem_.points == begin) first = start;
      start += problem_.shapes[2 * level] * problem_.shapes[2 * level + 1];
      if ((level + 1) * problem_.points == begin + count) last = start;
    }
    return {first, last};
  }

  // The softmax of the logits of all levels, row = (image * queries + query) * heads + head.
  const A* softmax(int64_t row) {
    A* out = reinterpret_cast<A*>(softmax_.data());
    const int64_t used = (all_ + width - 1) / width;
    const A* logits = static_cast<const A*>(problem_.weights) + row * all_;
    for (int64_t i = 0; i < all_ / width; ++i) softmax_[i] = load(logits + i * width);
    if (const int64_t rest = all_ % width) {
      softmax_[used - 1] = splat(-std::numeric_limits<A>::infinity());
      std::memcpy(out + all_ - rest, logits + all_ - rest, rest * sizeof(A));
    }
    V highest = softmax_[0];
    for (int64_t i = 1; i < used; ++i) highest = softmax_[i] > highest ? softmax_[i] : highest;
    const A offset = maximum<A>(highest);
    V total = {};
    for (int64_t i = 0; i < used; ++i) total += softmax_[i] = exponential(softmax_[i] - offset);
    const A scale = 1 / sum<A>(total);
    for (int64_t i = 0; i < used; ++i) softmax_[i] *= scale;
    return out;
  }

  // Computes everything about the samples of one row of the given query (image * queries + query).
  void prepare(int64_t query, int64_t row) {
    const A* weights =
        problem_.fused ? softmax(row) + begin : static_cast<const A*>(problem_.weights) + row * all_ + begin;
    const A* coordinates = static_cast<const A*>(problem_.samples) + 2 * (row * all_ + begin);
    if (count % width) {
      std::memcpy(coordinates_.data(), coordinates, 2 * count * sizeof(A));
      coordinates = reinterpret_cast<const A*>(coordinates_.data());
      if (!problem_.fused) {
        std::memcpy(weight.data(), weights, count * sizeof(A));
        weights = reinterpret_cast<const A*>(weight.data());
      }
    }
    for (int64_t i = 0; i < vectors; ++i) {
      const V low = load(coordinates + 2 * i * width), high = load(coordinates + (2 * i + 1) * width);
      V x = shuffle<A>(low, high, Deinterleave<0>{}), y = shuffle<A>(low, high, Deinterleave<1>{});
      to_pixels(query, i, x, y);
      weight[i] = load(weights + i * width);
      locate(i, x, y);
    }
  }

 private:
  void to_pixels(int64_t query, int64_t i, V& x, V& y) const {
    const A half = A(0.5);
    if (!problem_.fused) {
      x = x * limit_x[i] - half;
      y = y * limit_y[i] - half;
      return;
    }
    const A* reference = static_cast<const A*>(problem_.reference) + query * problem_.reference_size;
    if (problem_.reference_size == 4) {
      const A scale = half / static_cast<A>(problem_.points);
      x = (reference[0] + x * (reference[2] * scale)) * limit_x[i] - half;
      y = (reference[1] + y * (reference[3] * scale)) * limit_y[i] - half;
    } else {
      x = reference[0] * limit_x[i] + x - half;
      y = reference[1] * limit_y[i] + y - half;
    }
  }

  void locate(int64_t i, V x, V y) {
    const V zero = {}, one = splat(A(1));
    const V limit_x = this->limit_x[i], limit_y = this->limit_y[i];
    // False for NaN, and for what is too far away to be converted to an integer.
    const I inside = (x >= -one) & (x < limit_x) & (y >= -one) & (y < limit_y) & (limit_x > zero);
    x = inside ? x : zero;
    y = inside ? y : zero;
    const I x0 = floor_to_int(x), y0 = floor_to_int(y);
    const V x_floor = __builtin_convertvector(x0, V), y_floor = __builtin_convertvector(y0, V);
    const V x_part = x - x_floor, y_part = y - y_floor;
    const I has_left = inside & (x_floor >= zero), has_right = inside & (x_floor + one < limit_x);
    const I has_top = inside & (y_floor >= zero), has_bottom = inside & (y_floor + one < limit_y);
    left[i] = has_left ? one - x_part : zero;
    right[i] = has_right ? x_part : zero;
    top[i] = has_top ? one - y_part : zero;
    bottom[i] = has_bottom ? y_part : zero;
    d_left[i] = has_left ? -one : zero;
    d_right[i] = has_right ? one : zero;
    d_top[i] = has_top ? -one : zero;
    d_bottom[i] = has_bottom ? one : zero;
    tap[0][i] = weight[i] * (top[i] * left[i]);
    tap[1][i] = weight[i] * (top[i] * right[i]);
    tap[2][i] = weight[i] * (bottom[i] * left[i]);
    tap[3][i] = weight[i] * (bottom[i] * right[i]);
    // A tap that does not exist reads its neighbour, which does, with weight zero.
    const I first = I{}, low_x = x0 < first ? first : x0, high_x = x0 - has_right;
    const I low_y = (y0 < first ? first : y0) * stride_[i] + start_[i], high_y = (y0 - has_bottom) * stride_[i] + start_[i];
    pixel[0][i] = low_y + low_x;
    pixel[1][i] = low_y + high_x;
    pixel[2][i] = high_y + low_x;
    pixel[3][i] = high_y + high_x;
    active[i] = inside;
  }

  static I floor_to_int(V x) {
    const I truncated = __builtin_convertvector(x, I);
    return truncated + (x < __builtin_convertvector(truncated, V));
  }

  const Problem& problem_;
  int64_t all_;
  std::vector<I> stride_, start_;
  std::vector<V> coordinates_, softmax_;
};
