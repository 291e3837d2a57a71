// grad_value and dot products tap by tap, for queries that have nothing to do with each other.
#pragma once

#include "backward.cuh"

// Adds the taps of a sample to VECTOR channels of grad_value, of which the first pixel's sums begin at first.
__device__ inline void add_taps(const Problem& p, const Shared& s, unsigned place, int columns, const float* grad, int64 first,
                                float scale) {
  const int sample = s.samples[place];
  const Place at = {s.x[place], s.y[place], 0, 0};
#pragma unroll
  for (int tap = 0; tap < 4; ++tap) {
    if (!(sample >> tap & 1)) continue;
    const float factor = s.weights[place] * at.factor_x(tap) * at.factor_y(tap);
    const int64 to = first + static_cast<int64>(pixel_of(sample, tap, columns)) * HEADS * CHANNELS;
    float added[VECTOR];
#pragma unroll
    for (int c = 0; c < VECTOR; ++c) added[c] = grad[c] * factor;
    add_sums(p.grad_value + to, added, scale);
  }
}

// Groups of lanes have a sample each.
__device__ inline void gather(const Problem& p, const Block& block, const Shared& s, float scale) {
  constexpr unsigned groups = THREADS / LANES, count = QUERIES * SAMPLES;
  const unsigned lane = threadIdx.x % LANES, stride = HEADS * CHANNELS * sizeof(value_t);
  const int64 first = first_element(p, block);
  // All lanes of a warp take part in the sums, whether there is a sample for them or not.
#pragma unroll 1
  for (unsigned i = threadIdx.x / LANES; i < round_up(count, groups); i += groups) {
    const bool used = count % groups == 0 || i < count;
    const unsigned place = used ? place_of(i) : 0;
    const int columns = s.levels[i % SAMPLES / POINTS].columns;
    float dots[4] = {};
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; ++chunk) {
      const unsigned channel = (chunk * LANES + lane) * VECTOR;
      if (channel >= CHANNELS || !used) break;
      float rows[4][VECTOR], grad[VECTOR];
      load_taps(p.value + first + channel, s.samples[place], columns, stride, rows);
      read<VECTOR>(s.grad + i / SAMPLES * CHANNELS + channel, grad);
#pragma unroll
      for (int tap = 0; tap < 4; ++tap)
#pragma unroll
        for (int c = 0; c < VECTOR; ++c) dots[tap] += rows[tap][c] * grad[c];
      add_taps(p, s, place, columns, grad, first + place_of_sum(channel), scale);
    }
    sum_over_lanes<LANES>(dots, lane, [&](int tap, float sum) {
      if (used) s.dots[tap * DOT_PITCH + place] = sum;
    });
  }
}
