// Which queries a block has, and where their samples lie.
#pragma once

#include "device.cuh"

constexpr int SAMPLES = LEVELS * POINTS;
constexpr int QUERIES = TILE_WIDTH * TILE_HEIGHT;  // of a block, all of one image and head

// How a row of the value is read: VECTORS accesses of VECTOR channels by LANES neighbouring lanes, a power of two.
__device__ constexpr int largest_divisor(int count) { return CHANNELS % count == 0 ? count : largest_divisor(count / 2); }
__device__ constexpr int lanes_for(int needed, int lanes) {
  return lanes >= needed || lanes == 32 ? lanes : lanes_for(needed, 2 * lanes);
}
constexpr int VECTOR = largest_divisor(16 / sizeof(value_t));
constexpr int VECTORS = CHANNELS / VECTOR;
constexpr int LANES = lanes_for(VECTORS, 1);
constexpr int CHUNKS = (VECTORS + LANES - 1) / LANES;
constexpr unsigned STRIDE = HEADS * CHANNELS * sizeof(value_t);  // bytes from a pixel's row to the next

// Contiguous tensors: value [B, S, H, D], samples [B, Q, H, L, P, 2], weights [B, Q, H, L, P].
struct Problem {
  const value_t* value;
  const int64* valid;          // [B, L, 2] (h, w); fused only
  const float* reference;      // [B, Q, REFERENCE_SIZE]; fused only
  const sample_t* samples;     // offsets (fused) or locations
  const sample_t* weights;     // logits (fused) or weights
  value_t* output;             // [B, Q, H, D]
  const value_t* grad_output;  // [B, Q, H, D]
  sum_t* grad_value;           // [B, S, H, D], D in the order of backward.cuh; zeroed
  sample_t* grad_samples;
  sample_t* grad_weights;
  float* grad_reference;       // [B, Q, H, REFERENCE_SIZE], to be summed over H; or null
  const float* scale;          // of the fixed-point numbers, if DETERMINISTIC
  int64 pixels, queries;
  int tiles;                   // of an image
  int shift;                   // parts of a pixel are rounded to 2^-shift, in the forward
  int shapes[LEVELS][4];       // h, w, first pixel, first tile
};

// A level as a block needs it: size of the region that is not padding, pixels of a row, first pixel of the image's.
struct alignas(16) Level {
  int width, height, columns, start;
};

struct Block {
  int image, head;
  int first;                   // first query, or first query of the tile's level
  int left, top, width, height;

  // Blocks are ordered by image, tile, head.
  __device__ explicit Block(const Problem& p) {
    // The coarse levels' tiles first: they add more to memory, and should not be what the grid ends with.
    const int tile = p.tiles - 1 - static_cast<int>(blockIdx.x / HEADS % p.tiles);
    head = blockIdx.x % HEADS;
    image = blockIdx.x / HEADS / p.tiles;
    left = top = width = height = 0;
#if TILED
    // Queries are the pixels themselves: neighbours in both directions share what they read and add to.
    int level = 0;
    while (level + 1 < LEVELS && tile >= p.shapes[level + 1][3]) ++level;
    height = p.shapes[level][0];
    width = p.shapes[level][1];
    first = p.shapes[level][2];
    const int columns = (width + TILE_WIDTH - 1) / TILE_WIDTH, inner = tile - p.shapes[level][3];
    left = inner % columns * TILE_WIDTH;
    top = inner / columns * TILE_HEIGHT;
#else
    first = tile * QUERIES;
#endif
  }

  // Index over the batch of the block's query i, or -1 if there is none. B * Q * H is less than 2^31.
  __device__ int query(const Problem& p, unsigned i) const {
    const int queries = static_cast<int>(p.queries);
#if TILED
    const int x = left + i % TILE_WIDTH, y = top + i / TILE_WIDTH;
    return x < width && y < height ? image * queries + first + y * width + x : -1;
#else
    const int index = first + static_cast<int>(i);
    return index >= 0 && index < queries ? image * queries + index : -1;
#endif
  }

  // Where the row of a query begins that has size elements a head.
  __device__ int64 row(const Problem& p, int query, int size) const {
    return static_cast<int64>(query * HEADS + head) * size;
  }
};

// Calls each(i, round) for those of count things that are a thread's.
template <unsigned count, class Each> __device__ inline void for_own(const Each& each) {
  constexpr unsigned rounds = (count + THREADS - 1) / THREADS;
#pragma unroll (rounds <= 8 ? rounds : 1)
  for (unsigned round = 0; round < rounds; ++round) {
    const unsigned i = round * THREADS + threadIdx.x;
    if (count % THREADS == 0 || i < count) each(i, round);
  }
}

// Writes the table of levels; its readers wait for a barrier.
__device__ inline void describe_levels(const Problem& p, const Block& block, Level* levels) {
#pragma unroll 1
  for (int i = threadIdx.x; i < LEVELS; i += THREADS) {
    int height = p.shapes[i][0], width = p.shapes[i][1];
#if FUSED
    const int64* valid = p.valid + 2 * (static_cast<int64>(block.image) * LEVELS + i);
    height = static_cast<int>(max(int64(0), min(int64(height), valid[0])));
    width = static_cast<int>(max(int64(0), min(int64(width), valid[1])));
    if (height == 0 || width == 0) height = width = 0;
#endif
    levels[i] = {width, height, p.shapes[i][1], p.shapes[i][2]};
  }
}

struct Place {
  float x, y;         // parts of a pixel right of and below the tap at (column, row)
  int column, row;    // column -2: a sample without taps

  __device__ bool has(int tap, const Level& level) const {
    const int c = column + (tap & 1), r = row + (tap >> 1);
    return column >= -1 && c >= 0 && c < level.width && r >= 0 && r < level.height;
  }
  __device__ int pixel(int tap, const Level& level) const {
    return level.start + (row + (tap >> 1)) * level.columns + column + (tap & 1);
  }
  __device__ float factor_x(int tap) const { return tap & 1 ? x : 1 - x; }
  __device__ float factor_y(int tap) const { return tap >> 1 ? y : 1 - y; }
};

// A sample in one number: the pixel of its upper left tap, there or not, times 16, and a bit for each tap that exists. An
// image has at most 2^26 pixels.
__device__ inline int pixel_and_taps(const Place& place, const Level& level) {
  int sample = place.pixel(0, level) * 16;
#pragma unroll
  for (int tap = 0; tap < 4; ++tap) sample += place.has(tap, level) << tap;
  return sample;
}
__device__ inline int pixel_of(int sample, int tap, int columns) {
  return (sample >> 4) + (tap & 1) + (tap >> 1) * columns;
}

// VECTOR channels of a sample's taps, of which the first pixel's begin at first; zeros for those that do not exist. Rows of
// pixels are stride bytes apart.
__device__ inline void load_taps(const value_t* first, int sample, int columns, unsigned stride, float rows[4][VECTOR]) {
  const char* corner = reinterpret_cast<const char*>(first) + static_cast<int64>(sample >> 4) * stride;
  const char* below = corner + static_cast<uint64>(static_cast<unsigned>(columns)) * stride;
#pragma unroll
  for (int tap = 0; tap < 4; ++tap) {
    Pack<value_t, VECTOR> row;
    const char* from = (tap >> 1 ? below : corner) + (tap & 1) * stride;
    load_if(sample >> tap & 1, reinterpret_cast<const value_t*>(from), row);
    widen_all<VECTOR>(row, rows[tap]);
  }
}

// The factors from offsets to pixels; for points, offsets are in pixels.
__device__ inline float2 offset_scale(const float* reference, int width, int height) {
  if (!FUSED) return make_float2(width, height);
  if (REFERENCE_SIZE == 2) return make_float2(1, 1);
  return make_float2(reference[REFERENCE_SIZE - 2] * (0.5f / POINTS) * width,
                     reference[REFERENCE_SIZE - 1] * (0.5f / POINTS) * height);
}

__device__ inline void load_reference(const Problem& p, int query, float* reference) {
#if FUSED
  load<REFERENCE_SIZE>(p.reference + static_cast<int64>(query) * REFERENCE_SIZE, reference);
#endif
}

// Where a sample lies, in pixels, given its offset or its location.
__device__ inline float2 location(const float* reference, int width, int height, float a, float b) {
  const float2 scale = offset_scale(reference, width, height);
  return make_float2(reference[0] * width + a * scale.x - 0.5f, reference[1] * height + b * scale.y - 0.5f);
}
// Whether it has taps: one that is NaN, infinite or far away has none.
__device__ inline bool is_inside(float2 at, int width, int height) {
  return at.x >= -1 && at.x < width && at.y >= -1 && at.y < height && width > 0;
}

// The same in whole pixels and parts of one.
__device__ inline Place locate(const Problem& p, int query, const Level& level, float a, float b) {
  float reference[REFERENCE_SIZE] = {};
  load_reference(p, query, reference);
  const float2 at = location(reference, level.width, level.height, a, b);
  if (!is_inside(at, level.width, level.height)) return {0, 0, -2, 0};
  const float column = floorf(at.x), row = floorf(at.y);
  return {at.x - column, at.y - row, static_cast<int>(column), static_cast<int>(row)};
}
