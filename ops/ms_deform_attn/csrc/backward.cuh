// What a block of the backward holds, and where its samples lie.
#pragma once

#include "samples.cuh"

__device__ constexpr unsigned round_up(unsigned count, unsigned step) { return (count + step - 1) / step * step; }

constexpr int WARPS = THREADS / 32;
constexpr unsigned LEVEL_SAMPLES = QUERIES * POINTS;   // of one level
// Tables of samples have one level behind the other, so that a warp reads one without a gap; lanes that have samples of
// several levels use different banks.
constexpr unsigned LEVEL_PITCH = LEVEL_SAMPLES + (SORTED ? 8 : 0);
constexpr unsigned DOT_PITCH = SORTED ? round_up(LEVELS * LEVEL_PITCH, 32) : LEVELS * LEVEL_PITCH + 8;
constexpr bool ONE_LEVEL = THREADS % SAMPLES == 0;  // that a thread has samples of, if it has every THREADS-th
constexpr int NEIGHBOURS = POINTS % 4 == 0 ? 4 : POINTS % 2 == 0 ? 2 : 1;  // samples of a query that are read at once

#if SORTED
// Taps of one level whose row and column have the same parities are listed together, sorted by a cell: their place in a
// window that wraps around, of 8 x 8 such pixels.
constexpr unsigned TOGETHER = 4;  // that lanes have at a time
constexpr int CELLS = 64;
// Groups of LANES go through a list.
constexpr unsigned GROUPS = 32 / LANES;
// They have equal parts of it, each a multiple of TOGETHER. Pairs change places in every second 32, lest two groups read from
// the same banks.
__device__ constexpr unsigned share_of(unsigned count) { return round_up((count + GROUPS - 1) / GROUPS, TOGETHER); }
__device__ constexpr unsigned in_list(unsigned i) { return i ^ i / 32 % 2 * 2; }
constexpr unsigned LIST = share_of(LEVEL_SAMPLES) * GROUPS;
struct alignas(8) Tap {
  unsigned pixel_and_sample;  // the pixel times 4096, and which of the level's samples
  float factor;
};
#endif

struct Shared {
  value_t* grad;    // [QUERIES (+ 1 of zeros if SORTED), CHANNELS] of the output
  float* dots;      // [4, LEVELS, LEVEL_SAMPLES] dot products of the taps' rows with the gradient, by tap or, if SORTED, by
                    // parity; at last the gradients of weight, x and y. Before, if SORTED, factors of taps
  Level* levels;    // [LEVELS]
#if SORTED
  Tap* lists;       // [WARPS, LIST]
  unsigned* cells;  // [WARPS, CELLS] taps in each, then where they begin
#endif
  int* samples;     // [LEVELS, LEVEL_SAMPLES] pixel and taps or, if SORTED, parities; at last weights times their gradients
  float *x, *y, *weights;  // the same: parts of a pixel, and the attention weight; before, logits
  unsigned* codes;  // the same, if SORTED: the cells of the taps, seven bits for each parity
  float* means;     // [QUERIES] at last, of the weights' gradients; if SORTED the same memory as codes

  __device__ explicit Shared(char* memory) {
    grad = reinterpret_cast<value_t*>(memory);
    dots = reinterpret_cast<float*>(memory + round_up((QUERIES + SORTED) * CHANNELS * sizeof(value_t), 16));
    levels = reinterpret_cast<Level*>(dots + 4 * DOT_PITCH);
    char* next = reinterpret_cast<char*>(levels + LEVELS);
#if SORTED
    lists = reinterpret_cast<Tap*>(next);
    cells = reinterpret_cast<unsigned*>(lists + WARPS * LIST);
    next = reinterpret_cast<char*>(cells + WARPS * CELLS);
#endif
    samples = reinterpret_cast<int*>(next);
    x = reinterpret_cast<float*>(samples + LEVELS * LEVEL_PITCH);
    y = x + LEVELS * LEVEL_PITCH;
    weights = y + LEVELS * LEVEL_PITCH;
    means = weights + LEVELS * LEVEL_PITCH;
    codes = reinterpret_cast<unsigned*>(means);
  }
};

// Where sample i = query * SAMPLES + n has its place in the tables.
__device__ inline unsigned place_of(unsigned i) {
  return i % SAMPLES / POINTS * LEVEL_PITCH + i / SAMPLES * POINTS + i % POINTS;
}

// First element of grad_value that belongs to the block's image and head.
__device__ inline int64 first_element(const Problem& p, const Block& block) {
  return (block.image * p.pixels * HEADS + block.head) * CHANNELS;
}

// Sums of a lane that go to memory at once.
constexpr int SUMS = DETERMINISTIC ? 1 : VECTOR < 4 ? VECTOR : 4;

// Where a lane's sums begin in their row, given the first one's channel. All lanes' first SUMS come first, then all their next:
// neighbouring lanes add to neighbouring numbers, and vector reductions to no sector of memory twice.
__device__ inline unsigned place_of_sum(unsigned channel) { return channel / VECTOR * SUMS; }

// Adds a lane's VECTOR sums to memory, the first to to.
__device__ inline void add_sums(sum_t* to, const float* sums, float scale) {
#pragma unroll
  for (int c = 0; c < VECTOR; c += SUMS) add_shared_by_blocks<SUMS>(to + c * VECTORS, sums + c, scale);
}

// The cells of a sample's taps, by parity; the highest bit of those that do not exist.
__device__ inline unsigned codes_of(const Place& place, int taps) {
  unsigned codes = 0;
#pragma unroll
  for (int parity = 0; parity < 4; ++parity) {
    const int right = (place.column ^ parity) & 1, below = (place.row ^ parity >> 1) & 1;
    const unsigned cell = (place.row + below) * 4 & 56 | (place.column + right) / 2 & 7;
    codes |= (taps >> (2 * below + right) & 1 ? cell : 64) << 7 * parity;
  }
  return codes;
}

// Changes a query's weights one after the other.
template <class Change> __device__ inline void each_weight(const Shared& s, unsigned query, const Change& change) {
#pragma unroll (SAMPLES <= 32 ? SAMPLES / NEIGHBOURS : 1)
  for (int n = 0; n < SAMPLES; n += NEIGHBOURS) {
    Pack<float, NEIGHBOURS> pack;
    auto* at = reinterpret_cast<Pack<float, NEIGHBOURS>::wide_t*>(s.weights + place_of(query * SAMPLES + n));
    pack.wide = *at;
#pragma unroll
    for (int k = 0; k < NEIGHBOURS; ++k) change(pack.items[k]);
    *at = pack.wide;
  }
}

// Attention weights from logits. Ends with a barrier; without a softmax it is just that.
__device__ inline void softmax_of_block(const Problem& p, const Block& block, const Shared& s) {
#if FUSED
  for_own<QUERIES * SAMPLES>([&](unsigned i, unsigned) {
    const int query = block.query(p, i / SAMPLES);
    s.weights[place_of(i)] = query < 0 ? 0.0f : widen(p.weights[block.row(p, query, SAMPLES) + i % SAMPLES]);
  });
  __syncthreads();
  for (unsigned i = threadIdx.x; i < QUERIES; i += THREADS) {
    float highest = s.weights[place_of(i * SAMPLES)], total = 0;
    each_weight(s, i, [&](float& x) { highest = fmaxf(highest, x); });
    each_weight(s, i, [&](float& x) { total += x = exponential(x - highest); });
    total = __fdividef(1.0f, total);
    each_weight(s, i, [&](float& x) { x *= total; });
  }
#endif
  __syncthreads();
}

__device__ inline void locate_all(const Problem& p, const Block& block, const Shared& s) {
  Level level = s.levels[threadIdx.x % SAMPLES / POINTS];
  for_own<QUERIES * SAMPLES>([&](unsigned i, unsigned) {
    const int query = block.query(p, i / SAMPLES);
    if (!ONE_LEVEL) level = s.levels[i % SAMPLES / POINTS];
    const unsigned to = place_of(i);
    Place place = {0, 0, -2, 0};
    float weight = 0;
    if (query >= 0) {
      const int64 at = block.row(p, query, SAMPLES) + i % SAMPLES;
      float sample[2];
      load<2>(p.samples + 2 * at, sample);
      place = locate(p, query, level, sample[0], sample[1]);
      weight = FUSED ? s.weights[to] : widen(p.weights[at]);
    }
    const int sample = pixel_and_taps(place, level);
#if SORTED
    const int parity = (place.row & 1) * 2 + (place.column & 1);
    s.samples[to] = (sample >> 4) * 4 + parity;
    s.codes[to] = codes_of(place, sample);
#pragma unroll
    for (int tap = 0; tap < 4; ++tap)
      s.dots[(tap ^ parity) * DOT_PITCH + to] = sample >> tap & 1 ? weight * place.factor_x(tap) * place.factor_y(tap) : 0;
#else
    s.samples[to] = sample;
#endif
    s.x[to] = place.x;
    s.y[to] = place.y;
    if (!FUSED) s.weights[to] = weight;
  });
  for_own<(QUERIES + SORTED) * VECTORS>([&](unsigned i, unsigned) {
    const int query = i < QUERIES * VECTORS ? block.query(p, i / VECTORS) : -1;
    Pack<value_t, VECTOR> pack;
    load_if(query >= 0, p.grad_output + block.row(p, query, CHANNELS) + i % VECTORS * VECTOR, pack);
    reinterpret_cast<Pack<value_t, VECTOR>::wide_t*>(s.grad)[i] = pack.wide;
  });
}

// The sums of four numbers over some neighbouring lanes, each given to one of the lanes: to(which, sum).
template <int lanes, class To> __device__ inline void sum_over_lanes(float* x, unsigned lane, const To& to) {
  if constexpr (lanes >= 4) {
    // Half of the numbers stay with half of the lanes, twice; then there is one left.
    const bool odd = lane & 1, upper = lane & 2;
    float a = odd ? x[2] : x[0], b = odd ? x[3] : x[1];
    a += __shfl_xor_sync(0xffffffffu, odd ? x[0] : x[2], 1);
    b += __shfl_xor_sync(0xffffffffu, odd ? x[1] : x[3], 1);
    float sum = (upper ? b : a) + __shfl_xor_sync(0xffffffffu, upper ? a : b, 2);
#pragma unroll
    for (int step = 4; step < lanes; step *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
    if (lane < 4) to(2 * (lane & 1) + (lane >> 1), sum);
  } else {
#pragma unroll
    for (int step = 1; step < lanes; step *= 2)
#pragma unroll
      for (int n = 0; n < 4; ++n) x[n] += __shfl_xor_sync(0xffffffffu, x[n], step);
    if (lane == 0)
      for (int n = 0; n < 4; ++n) to(n, x[n]);
  }
}
