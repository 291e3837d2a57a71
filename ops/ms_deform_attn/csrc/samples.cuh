// Which queries a block has, and where their samples lie.
#pragma once

#include "device.cuh"

constexpr int SAMPLES = LEVELS * POINTS;
constexpr int QUERIES = TILE_WIDTH * TILE_HEIGHT;  // of one block, all of one image and head

// How a row of the value is read: VECTORS accesses of VECTOR channels by LANES neighbouring lanes, a power of two.
__device__ constexpr int largest_divisor(int count) { return CHANNELS % count == 0 ? count : largest_divisor(count / 2); }
__device__ constexpr int lanes_for(int needed, int lanes) {
  return lanes >= needed || lanes == 32 ? lanes : lanes_for(needed, 2 * lanes);
}
constexpr int VECTOR = largest_divisor(16 / sizeof(value_t));
constexpr int VECTORS = CHANNELS / VECTOR;
constexpr int LANES = lanes_for(VECTORS, 1);
constexpr int CHUNKS = (VECTORS + LANES - 1) / LANES;

// Contiguous tensors: value [B, S, H, D], samples [B, Q, H, L, P, 2], weights [B, Q, H, L, P].
struct Problem {
  const value_t* value;
  const int64* valid;          // [B, L, 2] (h, w); fused only
  const float* reference;      // [B, Q, REFERENCE_SIZE]; fused only
  const sample_t* samples;     // offsets (fused) or locations
  const sample_t* weights;     // logits (fused) or weights
  value_t* output;             // [B, Q, H, D]
  const value_t* grad_output;  // [B, Q, H, D]
  void* grad_value;            // [B, S, H, D] float32, or int64 if DETERMINISTIC; zeroed
  sample_t* grad_samples;
  sample_t* grad_weights;
  float* grad_reference;       // [B, Q, H, REFERENCE_SIZE], to be summed over H; or null
  const float* scale;          // of the fixed-point numbers, if DETERMINISTIC
  int64 pixels, queries;
  int heads, tiles;            // tiles of an image
  int shapes[LEVELS][4];       // h, w, first pixel, first tile
};

struct Block {
  int64 image;
  int head;
  int64 first;                 // first query, or first query of the tile's level
  int left, top, width, height;

  // Blocks are ordered by image, tile, head.
  __device__ explicit Block(const Problem& p) {
    const int tile = blockIdx.x / p.heads % p.tiles;
    head = blockIdx.x % p.heads;
    image = blockIdx.x / p.heads / p.tiles;
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
    first = static_cast<int64>(tile) * QUERIES;
#endif
  }

  // Index over the batch of the block's query i, or -1 if there is none.
  __device__ int64 query(const Problem& p, int i) const {
#if TILED
    const int x = left + i % TILE_WIDTH, y = top + i / TILE_WIDTH;
    return x < width && y < height ? image * p.queries + first + static_cast<int64>(y) * width + x : -1;
#else
    return first + i < p.queries ? image * p.queries + first + i : -1;
#endif
  }
};

struct Place {
  float x, y;         // parts of a pixel right of and below the tap at (column, row)
  int column, row;
  int width, height;  // of the valid region; zero if the sample has no tap at all

  __device__ bool has(int tap) const {
    const int c = column + (tap & 1), r = row + (tap >> 1);
    return c >= 0 && c < width && r >= 0 && r < height;
  }
  __device__ float factor_x(int tap) const { return tap & 1 ? x : 1 - x; }
  __device__ float factor_y(int tap) const { return tap >> 1 ? y : 1 - y; }
};

__device__ inline void valid_size(const Problem& p, int64 image, int level, int& width, int& height) {
  height = p.shapes[level][0];
  width = p.shapes[level][1];
#if FUSED
  const int64* valid = p.valid + 2 * (image * LEVELS + level);
  height = static_cast<int>(max(int64(0), min(int64(height), valid[0])));
  width = static_cast<int>(max(int64(0), min(int64(width), valid[1])));
#endif
}

// Splits pixel coordinates; a sample that is NaN, infinite or far away has no taps.
__device__ inline Place place_at(float x, float y, int width, int height) {
  const bool inside = x >= -1 && x < width && y >= -1 && y < height && width > 0 && height > 0;
  Place place;
  const float column = inside ? floorf(x) : 0.0f, row = inside ? floorf(y) : 0.0f;
  place.x = inside ? x - column : 0.0f;
  place.y = inside ? y - row : 0.0f;
  place.column = static_cast<int>(column);
  place.row = static_cast<int>(row);
  place.width = inside ? width : 0;
  place.height = inside ? height : 0;
  return place;
}

// The factor from an offset to pixels; for points, offsets are in pixels.
__device__ inline float offset_scale(const float* reference, int axis, int size) {
  return REFERENCE_SIZE == 4 ? __ldg(reference + 2 + axis) * (0.5f / POINTS) * size : 1.0f;
}

__device__ inline Place locate(const Problem& p, int64 image, int64 query, int level, float a, float b) {
  int width, height;
  valid_size(p, image, level, width, height);
#if FUSED
  const float* reference = p.reference + query * REFERENCE_SIZE;
  const float x = __ldg(reference) * width + a * offset_scale(reference, 0, width) - 0.5f;
  const float y = __ldg(reference + 1) * height + b * offset_scale(reference, 1, height) - 0.5f;
#else
  const float x = a * width - 0.5f, y = b * height - 0.5f;
#endif
  return place_at(x, y, width, height);
}

// The attention weight is exp(logit - x) * y.
__device__ inline float2 softmax_terms(const sample_t* logits) {
  float highest = widen(logits[0]), total = 0;
  for (int n = 1; n < SAMPLES; ++n) highest = fmaxf(highest, widen(logits[n]));
  for (int n = 0; n < SAMPLES; ++n) total += __expf(widen(logits[n]) - highest);
  return make_float2(highest, 1 / total);
}

// Leaves the terms of the softmax of each of the block's queries in shared memory.
__device__ inline void softmax_of_block(const Problem& p, const Block& block, float2* terms) {
#if FUSED
  for (int i = threadIdx.x; i < QUERIES; i += THREADS) {
    const int64 query = block.query(p, i);
    if (query >= 0) terms[i] = softmax_terms(p.weights + (query * p.heads + block.head) * SAMPLES);
  }
  __syncthreads();
#endif
}

__device__ inline float weight_of(const Problem& p, int64 at, float2 terms) {
  const float weight = widen(p.weights[at]);
  return FUSED ? __expf(weight - terms.x) * terms.y : weight;
}
