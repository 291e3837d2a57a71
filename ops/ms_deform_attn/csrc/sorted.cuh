// grad_value and dot products from sorted taps. Queries of a tile have their taps close together: many on each pixel. A warp
// takes those of one level whose row and column have the same parities, one of each sample, and sorts them by pixel, or
// nearly: by the pixel's place in a window that wraps around, so that there is nothing outside. Then groups of lanes go
// through equal parts of the list: as long as the pixel stays, its row and the sums of its gradient stay in registers. What
// a tap costs is to read its query's row of the output's gradient in shared memory, once for both. A list's order is that of
// the samples, always the same.
#pragma once

#include "backward.cuh"

constexpr unsigned NOWHERE = 0xfffff;  // no pixel
constexpr int AHEAD = sizeof(value_t) == 4 ? 2 : 4;  // taps whose rows are on their way at a time
// Without vector reductions, neighbouring lanes exchange sums, to add to neighbouring numbers.
constexpr bool TURNED = VECTOR % 4 == 0 && LANES >= 4 && !VECTOR_REDUCTIONS && !DETERMINISTIC;

// Makes the warp's list, and returns how many taps it has. What groups read behind them stands for none.
__device__ inline unsigned sort_taps(const Shared& s, int level, int parity) {
  const unsigned lane = threadIdx.x % 32, first = level * LEVEL_PITCH;
  unsigned* cells = s.cells + threadIdx.x / 32 * CELLS;
  Tap* list = s.lists + threadIdx.x / 32 * LIST;
  const float* factors = s.dots + parity * DOT_PITCH + first;
  constexpr unsigned STEPS = round_up(LEVEL_SAMPLES, 32) / 32;
  unsigned ranks[STEPS];  // times 128, and the cell
  cells[lane] = cells[lane + 32] = 0;
  __syncwarp();
#pragma unroll
  for (unsigned n = 0; n < STEPS; ++n) {
    const bool in = LEVEL_SAMPLES % 32 == 0 || n * 32 + lane < LEVEL_SAMPLES;
    const unsigned cell = in ? s.codes[first + n * 32 + lane] >> 7 * parity & 127 : CELLS;
    const unsigned same = __match_any_sync(0xffffffffu, cell);
    unsigned rank = __popc(same & ((1u << lane) - 1));
    if (cell < CELLS) rank += cells[cell];
    __syncwarp();
    if (cell < CELLS && same >> lane == 1) cells[cell] = rank + 1;
    ranks[n] = rank << 7 | cell;
    __syncwarp();
  }
  const uint2 counts = reinterpret_cast<const uint2*>(cells)[lane];
  unsigned before = 0, total = counts.x + counts.y;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const unsigned other = __shfl_xor_sync(0xffffffffu, total, step);
    if (lane & step) before += other;
    total += other;
  }
  reinterpret_cast<uint2*>(cells)[lane] = make_uint2(before, before + counts.x);
  __syncwarp();
  const int columns = s.levels[level].columns;
#pragma unroll
  for (unsigned n = 0; n < STEPS; ++n) {
    const unsigned i = n * 32 + lane, cell = ranks[n] & 127;
    if (cell == CELLS) continue;
    const int sample = s.samples[first + i];
    const int turned = sample ^ parity;
    const unsigned pixel = (sample >> 2) + (turned & 1) + (turned & 2 ? columns : 0);
    list[in_list(cells[cell] + (ranks[n] >> 7))] = {pixel << 12 | i, factors[i]};
  }
  __syncwarp();
  const unsigned last = total > 0 ? list[in_list(total - 1)].pixel_and_sample & ~4095u : 0;
  for (unsigned n = total + lane; n < share_of(total) * GROUPS; n += 32) list[in_list(n)] = {last | LEVEL_SAMPLES, 0};
  __syncwarp();
  return total;
}

// What compilers are not to take apart, or they work it out again and again.
__device__ inline unsigned fixed(unsigned number) {
  asm("mov.b32 %0, %0;" : "+r"(number));
  return number;
}
template <class T> __device__ inline T fixed(T number) {
  asm("mov.b64 %0, %0;" : "+l"(number));
  return number;
}

// An element of a pixel's row, given the same of the first row.
template <class T> __device__ inline T* in_row(T* first, unsigned pixel) {
  T* address;
  asm("mad.wide.u32 %0, %1, %2, %3;" : "=l"(address) : "r"(pixel), "n"(HEADS * CHANNELS * sizeof(T)), "l"(first));
  return address;
}

// Adds VECTOR sums to each of a group's rows; all lanes of the warp take part.
__device__ inline void add_turned(bool is, sum_t* to, unsigned channel, const float* sums, float scale) {
  if (!__any_sync(0xffffffffu, is)) return;
  const unsigned lane = threadIdx.x % 4;
  const bool odd = lane & 1, upper = lane & 2;
#pragma unroll
  for (int c = 0; c < VECTOR; c += 4) {
    // Number n of lane m goes to lane n as its number m.
    const float* x = sums + c;
    const float a = __shfl_xor_sync(0xffffffffu, odd ? x[0] : x[1], 1);
    const float b = __shfl_xor_sync(0xffffffffu, odd ? x[2] : x[3], 1);
    const float pairs[4] = {odd ? a : x[0], odd ? x[1] : a, odd ? b : x[2], odd ? x[3] : b};
    const float d = __shfl_xor_sync(0xffffffffu, upper ? pairs[0] : pairs[2], 2);
    const float e = __shfl_xor_sync(0xffffffffu, upper ? pairs[1] : pairs[3], 2);
    const float turned[4] = {upper ? d : pairs[0], upper ? e : pairs[1], upper ? pairs[2] : d, upper ? pairs[3] : e};
#pragma unroll
    for (int m = 0; m < 4; ++m) {
      const int lanes = m - static_cast<int>(lane), own = static_cast<int>(lane);
      const bool used = channel + lanes * VECTOR + c + own < CHANNELS;
      if (is && used) add_shared_by_blocks<1>(to + lanes * SUMS + c * VECTORS + own, turned + m, scale);
    }
  }
}

// Goes through a warp's list of count taps.
__device__ inline void walk(const Problem& p, const Block& block, const Shared& s, int level, int parity, unsigned count,
                            float scale) {
  constexpr bool full = CHUNKS * LANES * VECTOR == CHANNELS;
  const unsigned lane = threadIdx.x % LANES, group = threadIdx.x % 32 / LANES;
  const unsigned share = share_of(count), begin = group * share;
  const Tap* list = s.lists + threadIdx.x / 32 * LIST;
  float* dots = s.dots + parity * DOT_PITCH + level * LEVEL_PITCH;
#pragma unroll 1
  for (int chunk = 0; chunk < CHUNKS; ++chunk) {
    const unsigned channel = fixed((chunk * LANES + lane) * VECTOR);
    const bool used = full || channel < CHANNELS;
    float sums[VECTOR] = {}, row[VECTOR] = {};
    const value_t* value = fixed(p.value + first_element(p, block) + channel);
    sum_t* target = fixed(p.grad_value + first_element(p, block) + place_of_sum(channel));
    unsigned pixel = NOWHERE;
#pragma unroll 1
    for (unsigned k = begin; k < begin + share; k += TOGETHER) {
      Pack<unsigned, 4> pairs[TOGETHER / 2];
      float products[TOGETHER] = {};
#pragma unroll
      for (int start = 0; start < TOGETHER; start += AHEAD) {
        bool changes[AHEAD];
        unsigned pixels[AHEAD + 1] = {pixel};
        Pack<value_t, VECTOR> rows[AHEAD];
#pragma unroll
        for (int t = start / 2; t < (start + AHEAD) / 2; ++t)
          pairs[t].wide = *reinterpret_cast<const uint4*>(list + in_list(k + 2 * t));
#pragma unroll
        for (int t = 0; t < AHEAD; ++t) {
          pixels[t + 1] = pairs[(start + t) / 2].items[t % 2 * 2] >> 12;
          changes[t] = pixels[t + 1] != pixels[t];
          load_if<full>(changes[t] && used, in_row(value, pixels[t + 1]), rows[t]);
        }
#pragma unroll
        for (int t = 0; t < AHEAD; ++t) {
          const Pack<unsigned, 4>& pair = pairs[(start + t) / 2];
          const unsigned query = (pair.items[t % 2 * 2] & 4095) / POINTS;
          const float factor = __uint_as_float(pair.items[t % 2 * 2 + 1]);
          const bool flushes = changes[t] && (start + t > 0 || pixel != NOWHERE);
          sum_t* to = in_row(target, pixels[t]);
          if (TURNED) add_turned(flushes, to, channel, sums, scale);
          if (changes[t]) {
            if (!TURNED && flushes && used) add_sums(to, sums, scale);
            widen_all<VECTOR>(rows[t], row);
#pragma unroll
            for (int c = 0; c < VECTOR; ++c) sums[c] = 0;
          }
          float grad[VECTOR] = {};
          if (used) read<VECTOR>(s.grad + (channel + query * CHANNELS), grad);
#pragma unroll
          for (int c = 0; c < VECTOR; ++c) {
            sums[c] += factor * grad[c];
            products[start + t] += row[c] * grad[c];
          }
        }
        pixel = pixels[AHEAD];
      }
      sum_over_lanes<LANES>(products, lane, [&](int t, float sum) {
        unsigned sample = LEVEL_SAMPLES;
#pragma unroll
        for (int n = 0; n < TOGETHER; ++n)
          if (n == t) sample = pairs[n / 2].items[n % 2 * 2] & 4095;
        if (sample < LEVEL_SAMPLES) dots[sample] = chunk > 0 ? dots[sample] + sum : sum;
      });
    }
    sum_t* to = in_row(target, pixel);
    if (TURNED) add_turned(begin < count, to, channel, sums, scale);
    else if (begin < count && used) add_sums(to, sums, scale);
  }
}
