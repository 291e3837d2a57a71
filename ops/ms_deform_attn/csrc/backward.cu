// Backward: a block has a tile of queries of one image and head.
//
// grad_value is what costs: every tap adds a row to it. If queries are tiled, their taps fall close together, so the
// block adds up in shared memory first, in one window a level that lies around the level's samples, and flushes the sums.
// A window belongs to one warp, which goes through the samples in order. The four taps of a sample differ in the parity
// of column and row, and each parity belongs to a quarter of the warp: a pixel is only ever added to by the same lanes, so
// that there are neither races nor atomics, and the sums have a fixed order. Taps outside the window go to memory.

#include "samples.cuh"

constexpr int STEP = VECTOR < 4 ? VECTOR : 4;  // floats that are read or added at once

#if TILED
constexpr int QUAD = CHANNELS % 4 == 0 ? 4 : 1;  // the same where rows are all float32
__constant__ const int windows[LEVELS][2] = WINDOWS;  // width, height
#endif

// A located sample, kept in shared memory. The size of the map tells those that have no taps.
struct Record {
  float x, y, weight;
  short column, row;

  __device__ void set(const Place& place, float attention) {
    x = place.x;
    y = place.y;
    weight = attention;
    column = place.width ? static_cast<short>(place.column) : -2;
    row = static_cast<short>(place.row);
  }
  __device__ Place place(int width, int height) const {
    const bool inside = column >= -1;
    return {x, y, column, row, inside ? width : 0, inside ? height : 0};
  }
};

struct Shared {
  Record* records;   // [QUERIES, SAMPLES]
  float2* shift;     // [QUERIES, SAMPLES] gradients of the locations in pixels
  float* weight;     // [QUERIES, SAMPLES] gradients of the attention weights
  float* grad;       // [QUERIES, CHANNELS] of the output
  float2* terms;     // [QUERIES] of the softmax
  int2* origins;     // [LEVELS] of the windows
  float* window;     // one a level, behind each other

  __device__ explicit Shared(char* memory) {
    grad = reinterpret_cast<float*>(memory);
    window = grad + QUERIES * ((CHANNELS + 3) / 4 * 4);
    float* behind = window;
#if TILED
    for (int level = 0; level < LEVELS; ++level) behind += windows[level][0] * windows[level][1] * CHANNELS;
    behind += (4 - (behind - window) % 4) % 4;
#endif
    records = reinterpret_cast<Record*>(behind);
    shift = reinterpret_cast<float2*>(records + QUERIES * SAMPLES);
    terms = shift + QUERIES * SAMPLES;
    origins = reinterpret_cast<int2*>(terms + QUERIES);
    weight = reinterpret_cast<float*>(origins + LEVELS);
  }
};

__device__ inline void locate_all(const Problem& p, const Block& block, const Shared& s) {
  for (int i = threadIdx.x; i < QUERIES * SAMPLES; i += THREADS) {
    const int64 query = block.query(p, i / SAMPLES);
    Place place = place_at(0, 0, 0, 0);
    float weight = 0;
    if (query >= 0) {
      const int64 at = (query * p.heads + block.head) * SAMPLES + i % SAMPLES;
      float sample[2];
      load<2>(p.samples + 2 * at, sample);
      place = locate(p, block.image, query, i % SAMPLES / POINTS, sample[0], sample[1]);
      weight = weight_of(p, at, s.terms[i / SAMPLES]);
    }
    s.records[i].set(place, weight);
  }
  for (int i = threadIdx.x; i < QUERIES * CHANNELS; i += THREADS) {
    const int64 query = block.query(p, i / CHANNELS);
    s.grad[i] = query < 0 ? 0.0f : widen(p.grad_output[(query * p.heads + block.head) * CHANNELS + i % CHANNELS]);
  }
}

__device__ inline int64 first_element(const Problem& p, const Block& block, int level) {
  return ((block.image * p.pixels + p.shapes[level][2]) * p.heads + block.head) * CHANNELS;
}

// Gradients of weights and locations, from dot products of the taps' rows with the gradient of the output.
__device__ inline void gather(const Problem& p, const Block& block, const Shared& s, float scale) {
  const int lane = threadIdx.x % LANES;
  const int64 stride = static_cast<int64>(p.heads) * CHANNELS;
  for (int i = threadIdx.x / LANES; i < (QUERIES * SAMPLES + THREADS / LANES - 1) / (THREADS / LANES) * (THREADS / LANES);
       i += THREADS / LANES) {
    float weight = 0, x = 0, y = 0;
    if (i < QUERIES * SAMPLES) {
      const int level = i % SAMPLES / POINTS;
      int width, height;
      valid_size(p, block.image, level, width, height);
      const Place place = s.records[i].place(width, height);
      const float attention = s.records[i].weight;
      const int64 base = first_element(p, block, level);
#pragma unroll
      for (int tap = 0; tap < 4; ++tap) {
        if (!place.has(tap)) continue;
        const int64 pixel = static_cast<int64>(place.row + (tap >> 1)) * p.shapes[level][1] + place.column + (tap & 1);
        const float factor_x = place.factor_x(tap), factor_y = place.factor_y(tap);
        float dot = 0;
#pragma unroll
        for (int chunk = 0; chunk < CHUNKS; ++chunk) {
          const int channel = (chunk * LANES + lane) * VECTOR;
          if (channel >= CHANNELS) break;
          float row[VECTOR], grad[VECTOR];
#pragma unroll
          for (int c = 0; c < VECTOR; c += STEP) read<STEP>(s.grad + i / SAMPLES * CHANNELS + channel + c, grad + c);
          load<VECTOR>(p.value + base + pixel * stride + channel, row);
#pragma unroll
          for (int c = 0; c < VECTOR; ++c) dot += row[c] * grad[c];
#if !TILED
#pragma unroll
          for (int c = 0; c < VECTOR; c += STEP) {
            float added[STEP];
#pragma unroll
            for (int k = 0; k < STEP; ++k) added[k] = grad[c + k] * (attention * factor_x * factor_y);
            add_shared_by_blocks<STEP>(p.grad_value, base + pixel * stride + channel + c, added, scale);
          }
#endif
        }
        weight += dot * (factor_x * factor_y);
        x += dot * (tap & 1 ? factor_y : -factor_y);
        y += dot * (tap >> 1 ? factor_x : -factor_x);
      }
      x *= attention;
      y *= attention;
      if (!place.width) x = y = 0;
    }
#pragma unroll
    for (int step = LANES / 2; step > 0; step /= 2) {
      weight += __shfl_xor_sync(0xffffffffu, weight, step);
      x += __shfl_xor_sync(0xffffffffu, x, step);
      y += __shfl_xor_sync(0xffffffffu, y, step);
    }
    if (lane == 0 && i < QUERIES * SAMPLES) {
      s.weight[i] = weight;
      s.shift[i] = make_float2(x, y);
    }
  }
}

#if TILED
// Lays the level's window around the mean of its samples; every lane of the warp takes part.
__device__ inline int2 window_origin(const Shared& s, int level) {
  int count = 0, columns = 0, rows = 0;
  for (int i = threadIdx.x % 32; i < QUERIES * POINTS; i += 32) {
    const Record& record = s.records[i / POINTS * SAMPLES + level * POINTS + i % POINTS];
    if (record.column < -1) continue;
    ++count;
    columns += record.column;
    rows += record.row;
  }
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    count += __shfl_xor_sync(0xffffffffu, count, step);
    columns += __shfl_xor_sync(0xffffffffu, columns, step);
    rows += __shfl_xor_sync(0xffffffffu, rows, step);
  }
  count = max(count, 1);
  return make_int2(columns / count + 1 - windows[level][0] / 2, rows / count + 1 - windows[level][1] / 2);
}

// Adds all taps of one level, in the order of the samples; run by one warp.
__device__ inline void scatter_level(const Problem& p, const Block& block, const Shared& s, int level, float* window,
                                     float scale) {
  const int part = threadIdx.x % 32 / 8, lane = threadIdx.x % 8;
  const int2 origin = window_origin(s, level);
  if (threadIdx.x % 32 == 0) s.origins[level] = origin;
  int width, height;
  valid_size(p, block.image, level, width, height);
  const int64 base = first_element(p, block, level), stride = static_cast<int64>(p.heads) * CHANNELS;
  for (int i = 0; i < QUERIES * POINTS; ++i) {
    const Record& record = s.records[i / POINTS * SAMPLES + level * POINTS + i % POINTS];
    const Place place = record.place(width, height);
    const int tap = ((place.column ^ part) & 1) | ((place.row ^ part >> 1) & 1) << 1;
    if (!place.has(tap)) continue;
    const int column = place.column + (tap & 1), row = place.row + (tap >> 1);
    const float factor = record.weight * place.factor_x(tap) * place.factor_y(tap);
    const float* grad = s.grad + i / POINTS * CHANNELS;
    const int x = column - origin.x, y = row - origin.y;
    const bool near = x >= 0 && x < windows[level][0] && y >= 0 && y < windows[level][1];
    float* to = window + (y * windows[level][0] + x) * CHANNELS;
    for (int c = lane * QUAD; c < CHANNELS; c += 8 * QUAD) {
      float added[QUAD];
      read<QUAD>(grad + c, added);
#pragma unroll
      for (int k = 0; k < QUAD; ++k) added[k] *= factor;
      if (near) {
        float sums[QUAD];
        read<QUAD>(to + c, sums);
#pragma unroll
        for (int k = 0; k < QUAD; ++k) sums[k] += added[k];
        store<QUAD>(to + c, sums);
      } else {
        const int64 pixel = static_cast<int64>(row) * p.shapes[level][1] + column;
        add_shared_by_blocks<QUAD>(p.grad_value, base + pixel * stride + c, added, scale);
      }
    }
  }
}

__device__ inline void flush_level(const Problem& p, const Block& block, const Shared& s, int level, const float* window,
                                   float scale) {
  const int2 origin = s.origins[level];
  const int64 base = first_element(p, block, level), stride = static_cast<int64>(p.heads) * CHANNELS;
  for (int i = threadIdx.x * QUAD; i < windows[level][0] * windows[level][1] * CHANNELS; i += THREADS * QUAD) {
    float sums[QUAD];
    read<QUAD>(window + i, sums);
    bool any = false;
#pragma unroll
    for (int k = 0; k < QUAD; ++k) any = any || sums[k] != 0;
    if (!any) continue;  // among them all that lie outside the map
    const int at = i / CHANNELS;
    const int column = origin.x + at % windows[level][0], row = origin.y + at / windows[level][0];
    const int64 pixel = static_cast<int64>(row) * p.shapes[level][1] + column;
    add_shared_by_blocks<QUAD>(p.grad_value, base + pixel * stride + i % CHANNELS, sums, scale);
  }
}
#endif

// Gradients of offsets or locations: one sample a thread.
__device__ inline void write_samples(const Problem& p, const Block& block, const Shared& s) {
  for (int i = threadIdx.x; i < QUERIES * SAMPLES; i += THREADS) {
    const int64 query = block.query(p, i / SAMPLES);
    if (query < 0) continue;
    int width, height;
    valid_size(p, block.image, i % SAMPLES / POINTS, width, height);
    float grad[2] = {s.shift[i].x, s.shift[i].y};
#if FUSED
    const float* reference = p.reference + query * REFERENCE_SIZE;
    grad[0] *= offset_scale(reference, 0, width);
    grad[1] *= offset_scale(reference, 1, height);
#else
    grad[0] *= width;
    grad[1] *= height;
    narrow(s.weight[i], p.grad_weights[(query * p.heads + block.head) * SAMPLES + i % SAMPLES]);
#endif
    store<2>(p.grad_samples + 2 * ((query * p.heads + block.head) * SAMPLES + i % SAMPLES), grad);
  }
}

#if FUSED
// Gradients of the logits and of the reference: one query a thread, in a fixed order.
__device__ inline void write_queries(const Problem& p, const Block& block, const Shared& s) {
  for (int i = threadIdx.x; i < QUERIES; i += THREADS) {
    const int64 query = block.query(p, i);
    if (query < 0) continue;
    const int64 row = query * p.heads + block.head;
    float mean = 0;
    for (int n = i * SAMPLES; n < (i + 1) * SAMPLES; ++n) mean += s.records[n].weight * s.weight[n];
    for (int n = 0; n < SAMPLES; ++n) {
      const int at = i * SAMPLES + n;
      narrow(s.records[at].weight * (s.weight[at] - mean), p.grad_weights[row * SAMPLES + n]);
    }
    if (!p.grad_reference) continue;
    float grad[REFERENCE_SIZE] = {};
    for (int n = 0; n < SAMPLES; ++n) {
      int width, height;
      valid_size(p, block.image, n / POINTS, width, height);
      const float2 shift = s.shift[i * SAMPLES + n];
      const float x = shift.x * width, y = shift.y * height;
      grad[0] += x;
      grad[1] += y;
      if (REFERENCE_SIZE == 4) {
        float offset[2];
        load<2>(p.samples + 2 * (row * SAMPLES + n), offset);
        // An infinite offset of a sample without taps must not turn into NaN.
        if (x != 0) grad[REFERENCE_SIZE - 2] += x * offset[0] * (0.5f / POINTS);
        if (y != 0) grad[REFERENCE_SIZE - 1] += y * offset[1] * (0.5f / POINTS);
      }
    }
    for (int k = 0; k < REFERENCE_SIZE; ++k) p.grad_reference[row * REFERENCE_SIZE + k] = grad[k];
  }
}
#endif

extern "C" __global__ void __launch_bounds__(THREADS, 1024 / THREADS) ms_deform_attn_backward(const __grid_constant__ Problem p) {
  SHARED_MEMORY(memory);
  const Shared s(memory);
  const Block block(p);
  const float scale = DETERMINISTIC ? *p.scale : 1.0f;
  softmax_of_block(p, block, s.terms);
  locate_all(p, block, s);
#if TILED
  int size = 0;
  for (int level = 0; level < LEVELS; ++level) size += windows[level][0] * windows[level][1] * CHANNELS;
  for (int i = threadIdx.x; i < size; i += THREADS) s.window[i] = 0;
#endif
  __syncthreads();
  gather(p, block, s, scale);
#if TILED
  float* window = s.window;
  for (int level = 0; level < LEVELS; ++level) {
    if (level % (THREADS / 32) == threadIdx.x / 32) scatter_level(p, block, s, level, window, scale);
    window += windows[level][0] * windows[level][1] * CHANNELS;
  }
#endif
  __syncthreads();
#if TILED
  window = s.window;
  for (int level = 0; level < LEVELS; ++level) {
    flush_level(p, block, s, level, window, scale);
    window += windows[level][0] * windows[level][1] * CHANNELS;
  }
#endif
  write_samples(p, block, s);
#if FUSED
  write_queries(p, block, s);
#endif
}
