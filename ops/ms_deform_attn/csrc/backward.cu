// Backward: a block has a tile of queries of one image and head, in passes of as many as its shared memory holds.
//
// grad_value is what costs: every tap adds a row to it. If queries are tiled, their taps fall close together, so the
// block adds up in shared memory first, in one window a level that lies around the level's samples, and flushes the sums.
// A window belongs to one warp, which goes through the samples in order, while other warps work out the dot products.
// The four taps of a sample differ in the parity of column and row, and each parity belongs to a quarter of the warp: a
// pixel is only ever added to by the same lanes, so that there are neither races nor atomics, and the sums have a fixed
// order. Taps outside the window go to memory.

#include "samples.cuh"

constexpr int STEP = VECTOR < 4 ? VECTOR : 4;          // floats that are read or added at once
constexpr int PITCH = (CHANNELS + 3) / 4 * 4;          // of the rows of the output's gradient
constexpr int WARPS = THREADS / 32;
// Warps that add to windows; the others gather.
constexpr int ADDING = !TILED ? 0 : LEVELS < WARPS / 2 ? LEVELS : WARPS / 2;
// Windows leave room for two blocks, each thread of which may then have more registers.
constexpr int BLOCKS = TILED ? 2 : 1024 / THREADS;

#if TILED
constexpr int QUAD = CHANNELS % 4 == 0 ? 4 : 1;        // the same where rows are all float32
// The same for what goes to memory: where there are no vector reductions, neighbouring lanes add to neighbouring numbers.
#if DETERMINISTIC || __CUDA_ARCH__ < 900
constexpr int FLUSHED = 1;
#else
constexpr int FLUSHED = QUAD;
#endif
__constant__ constexpr int WINDOW[LEVELS][2] = WINDOWS;  // width, height

// Floats of the windows before that of a level. Only ever called for constants: one compiler would leave the recursion.
__device__ constexpr int first_in_window(int level) {
  return level == 0 ? 0 : first_in_window(level - 1) + WINDOW[level - 1][0] * WINDOW[level - 1][1] * CHANNELS;
}
constexpr int WINDOW_FLOATS = first_in_window(LEVELS);

// What one parity of a sample adds to: an element of the window, or none (-1), or pixel -2 - target in memory.
struct alignas(8) Tap {
  int target;
  float factor;
};
#endif

struct Shared {
  float* grad;    // [QUERIES, PITCH] of the output
  float* window;  // one a level, behind each other
  int* pixels;    // [QUERIES, SAMPLES, 4] of the first of the four: see pixel_and_taps
  float* dots;    // the same memory, later: [QUERIES, SAMPLES, 4] dot products of the taps' rows with the gradient, and
                  // at last the gradients of weight, x and y
#if TILED
  Tap* taps;      // [QUERIES, SAMPLES, 4] by parity; before that column and row
#endif
  Level* levels;  // [LEVELS]
  int2* origins;  // [LEVELS] of the windows
  float2* terms;  // [QUERIES] of the softmax, at last its mean gradient
  float* parts;   // [QUERIES, SAMPLES, 3] of a pixel in x and y, and the attention weight
  float* column;  // [QUERIES, SAMPLES | 1] logits, later weights times their gradients

  __device__ explicit Shared(char* memory) {
    grad = reinterpret_cast<float*>(memory);
    window = grad + QUERIES * PITCH;
    float* behind = window;
#if TILED
    behind += (WINDOW_FLOATS + 3) / 4 * 4;
#endif
    pixels = reinterpret_cast<int*>(behind);
    dots = behind;
    levels = reinterpret_cast<Level*>(pixels + QUERIES * SAMPLES * 4);
    char* next = reinterpret_cast<char*>(levels + LEVELS);
#if TILED
    taps = reinterpret_cast<Tap*>(next);
    next = reinterpret_cast<char*>(taps + QUERIES * SAMPLES * 4);
#endif
    origins = reinterpret_cast<int2*>(next);
    terms = reinterpret_cast<float2*>(origins + LEVELS);
    parts = reinterpret_cast<float*>(terms + QUERIES);
#if TILED
    column = reinterpret_cast<float*>(taps);  // which are in use between softmax_of_block and write_samples only
#else
    column = parts + QUERIES * SAMPLES * 3;
#endif
  }
};

// First element of grad_value that belongs to the block's image and head.
__device__ inline int64 first_element(const Problem& p, const Block& block) {
  return (block.image * p.pixels * p.heads + block.head) * CHANNELS;
}

__device__ inline void locate_all(const Problem& p, const Block& block, const Shared& s) {
  for (unsigned i = threadIdx.x; i < QUERIES * SAMPLES; i += THREADS) {
    const int query = block.query(p, i / SAMPLES);
    const Level level = s.levels[i % SAMPLES / POINTS];
    Place place = {0, 0, -2, 0};
    float weight = 0;
    if (query >= 0) {
      const int64 at = block.row(p, query, SAMPLES) + i % SAMPLES;
      float sample[2];
      load<2>(p.samples + 2 * at, sample);
      place = locate(p, query, level, sample[0], sample[1]);
      weight = weight_of(p, at, s.terms[i / SAMPLES]);
    }
    s.pixels[4 * i] = pixel_and_taps(place, level);
    s.parts[3 * i] = place.x;
    s.parts[3 * i + 1] = place.y;
    s.parts[3 * i + 2] = weight;
#if TILED
    s.taps[4 * i] = {place.column, __uint_as_float(static_cast<unsigned>(place.row))};
#endif
  }
  for (unsigned i = threadIdx.x; i < QUERIES * VECTORS; i += THREADS) {
    const unsigned channel = i % VECTORS * VECTOR;
    const int query = block.query(p, i / VECTORS);
    float row[VECTOR] = {};
    if (query >= 0) load<VECTOR>(p.grad_output + block.row(p, query, CHANNELS) + channel, row);
#pragma unroll
    for (int c = 0; c < VECTOR; c += STEP) store<STEP>(s.grad + i / VECTORS * PITCH + channel + c, row + c);
  }
}

__device__ constexpr unsigned round_up(unsigned count, unsigned step) { return (count + step - 1) / step * step; }

__device__ constexpr unsigned max_of(unsigned a, unsigned b) { return a > b ? a : b; }
__device__ constexpr unsigned min_of(unsigned a, unsigned b) { return a < b ? a : b; }
// The largest that is not more than count.
__device__ constexpr unsigned power_of_two(unsigned count) { return count < 2 ? 1 : 2 * power_of_two(count / 2); }

#if !TILED
// Adds the taps of sample i to VECTOR channels of grad_value, of which the first pixel's begin at first.
__device__ inline void add_taps(const Problem& p, const Shared& s, unsigned i, int sample, int columns, const float* grad,
                                int64 first, float scale) {
  const Place place = {s.parts[3 * i], s.parts[3 * i + 1], 0, 0};
#pragma unroll
  for (int tap = 0; tap < 4; ++tap) {
    if (!(sample >> tap & 1)) continue;
    const float factor = s.parts[3 * i + 2] * place.factor_x(tap) * place.factor_y(tap);
    const int64 at = first + static_cast<int64>(pixel_of(sample, tap, columns)) * p.heads * CHANNELS;
#pragma unroll
    for (int c = 0; c < VECTOR; c += STEP) {
      float added[STEP];
#pragma unroll
      for (int k = 0; k < STEP; ++k) added[k] = grad[c + k] * factor;
      add_shared_by_blocks<STEP>(p.grad_value, at + c, added, scale);
    }
  }
}
#endif

// The sums of four numbers over LANES lanes, written to four floats by some of these lanes: over what the other lanes
// have read of the sample, for which shuffles alone are no order.
__device__ inline void sum_over_lanes(float* x, unsigned lane, bool used, float* to) {
  if constexpr (LANES >= 4) {
    // Half of the numbers stay with half of the lanes, twice; then there is one left.
    const bool odd = lane & 1, upper = lane & 2;
    float a = odd ? x[2] : x[0], b = odd ? x[3] : x[1];
    a += __shfl_xor_sync(0xffffffffu, odd ? x[0] : x[2], 1);
    b += __shfl_xor_sync(0xffffffffu, odd ? x[1] : x[3], 1);
    float sum = (upper ? b : a) + __shfl_xor_sync(0xffffffffu, upper ? a : b, 2);
#pragma unroll
    for (int step = 4; step < LANES; step *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
    __syncwarp();
    if (used && lane < 4) to[2 * (lane & 1) + (lane >> 1)] = sum;
  } else {
#pragma unroll
    for (int step = 1; step < LANES; step *= 2)
#pragma unroll
      for (int tap = 0; tap < 4; ++tap) x[tap] += __shfl_xor_sync(0xffffffffu, x[tap], step);
    __syncwarp();
    if (used && lane == 0)
      for (int tap = 0; tap < 4; ++tap) to[tap] = x[tap];
  }
}

// Dot products of the taps' rows with the gradient of the output; without tiles, also adds to grad_value. Run by the
// warps that do not add to windows. Groups of lanes share a query, neighbours having neighbouring samples; each has several
// samples at once, so that many rows are on their way. All queries come before the next samples do: those lie in the same
// levels, whose rows stay in the cache.
__device__ inline void gather(const Problem& p, const Block& block, const Shared& s, float scale) {
  constexpr unsigned groups = (WARPS - ADDING) * 32 / LANES;
  constexpr unsigned share = max_of(groups / QUERIES, min_of(32 / LANES, power_of_two(SAMPLES)));
  constexpr unsigned together = TILED && CHUNKS == 1 && SAMPLES > share ? 2 : 1;
  constexpr unsigned queries = (groups + share - 1) / share, samples = share * together;  // of all groups at a time
  const unsigned lane = threadIdx.x % LANES, stride = p.heads * CHANNELS * sizeof(value_t);
  const unsigned group = (threadIdx.x - ADDING * 32) / LANES;
  const int64 first = first_element(p, block);
  // All lanes of a warp take part in the sums, whether there is a sample for them or not.
#pragma unroll 1
  for (unsigned n = group % share; n < round_up(SAMPLES, samples); n += samples) {
    int columns[together];
#pragma unroll
    for (unsigned t = 0; t < together; ++t) columns[t] = s.levels[min_of(n + t * share, SAMPLES - 1) / POINTS].columns;
#pragma unroll 1
    for (unsigned i = group / share; i < round_up(QUERIES, queries); i += queries) {
      unsigned at[together];
      bool used[together];
      int sample[together];
      float dots[together][4] = {};
#pragma unroll
      for (unsigned t = 0; t < together; ++t) {
        at[t] = i * SAMPLES + n + t * share;
        used[t] = (QUERIES % queries == 0 || i < QUERIES) && (SAMPLES % samples == 0 || n + t * share < SAMPLES);
        sample[t] = used[t] ? s.pixels[4 * at[t]] : 0;
      }
#pragma unroll
      for (int chunk = 0; chunk < CHUNKS; ++chunk) {
        const unsigned channel = (chunk * LANES + lane) * VECTOR;
        if (channel >= CHANNELS || !used[0]) break;
        float rows[together][4][VECTOR], grad[VECTOR];
#pragma unroll
        for (unsigned t = 0; t < together; ++t)
          load_taps(p.value + first + channel, sample[t], columns[t], stride, rows[t]);
#pragma unroll
        for (int c = 0; c < VECTOR; c += STEP) read<STEP>(s.grad + i * PITCH + channel + c, grad + c);
#pragma unroll
        for (unsigned t = 0; t < together; ++t)
#pragma unroll
          for (int tap = 0; tap < 4; ++tap)
#pragma unroll
            for (int c = 0; c < VECTOR; ++c) dots[t][tap] += rows[t][tap][c] * grad[c];
#if !TILED
        add_taps(p, s, at[0], sample[0], columns[0], grad, first + channel, scale);
#endif
      }
#pragma unroll
      for (unsigned t = 0; t < together; ++t) sum_over_lanes(dots[t], lane, used[t], s.dots + 4 * at[t]);
    }
  }
}

#if TILED
// Lays the level's window around the mean of the samples of this pass; every lane of the warp takes part.
__device__ inline void lay_window(const Shared& s, int level) {
  int count = 0, columns = 0, rows = 0;
  for (unsigned i = threadIdx.x % 32; i < QUERIES * POINTS; i += 32) {
    const Tap& place = s.taps[4 * (i / POINTS * SAMPLES + level * POINTS + i % POINTS)];
    if (place.target < -1) continue;
    ++count;
    columns += place.target;
    rows += static_cast<int>(__float_as_uint(place.factor));
  }
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    count += __shfl_xor_sync(0xffffffffu, count, step);
    columns += __shfl_xor_sync(0xffffffffu, columns, step);
    rows += __shfl_xor_sync(0xffffffffu, rows, step);
  }
  count = max(count, 1);
  if (threadIdx.x % 32 == 0)
    s.origins[level] = make_int2(columns / count + 1 - WINDOW[level][0] / 2, rows / count + 1 - WINDOW[level][1] / 2);
}

// Decides for each tap whether it adds to the window; by parity.
__device__ inline void aim_all(const Shared& s) {
  for (unsigned i = threadIdx.x; i < QUERIES * SAMPLES; i += THREADS) {
    const int level = i % SAMPLES / POINTS;
    const int2 origin = s.origins[level];
    const int sample = s.pixels[4 * i], columns = s.levels[level].columns;
    const Place place = {s.parts[3 * i], s.parts[3 * i + 1], s.taps[4 * i].target,
                         static_cast<int>(__float_as_uint(s.taps[4 * i].factor))};
    Pack<Tap, 2> taps[2];
#pragma unroll
    for (int parity = 0; parity < 4; ++parity) {
      const int right = (place.column ^ parity) & 1, below = (place.row ^ parity >> 1) & 1;
      const int x = place.column + right - origin.x, y = place.row + below - origin.y;
      const bool near = x >= 0 && x < WINDOW[level][0] && y >= 0 && y < WINDOW[level][1];
      const int inside = (y * WINDOW[level][0] + x) * CHANNELS;
      const float factor = s.parts[3 * i + 2] * place.factor_x(right) * place.factor_y(2 * below);
      const int target = near ? inside : -2 - pixel_of(sample, 2 * below + right, columns);
      taps[parity / 2].items[parity % 2] = {sample >> (2 * below + right) & 1 ? target : -1, factor};
    }
    // Lanes that are four apart write the halves in opposite order, lest they meet in the same banks.
    uint4* to = reinterpret_cast<uint4*>(s.taps + 4 * i);
    const int half = threadIdx.x / 4 % 2;
    to[half] = half ? taps[1].wide : taps[0].wide;
    to[1 - half] = half ? taps[0].wide : taps[1].wide;
  }
}

// Adds the same taps of count samples of one query to the window, and returns their lowest target. All are read before
// the first is written, so that they wait for each other once.
template <int count> __device__ inline int add_to_window(const Tap* taps, const float* grad, float* window) {
  Tap tap[count];
  float sums[count][QUAD];
#pragma unroll
  for (int n = 0; n < count; ++n) {
    tap[n] = taps[4 * n];
    if (tap[n].target >= 0) read<QUAD>(window + tap[n].target, sums[n]);
  }
#pragma unroll
  for (int n = 0; n < count; ++n) {
    const bool again = n > 0 && tap[n].target == tap[0].target;
#pragma unroll
    for (int k = 0; k < QUAD; ++k) sums[n][k] = (again ? sums[0][k] : sums[n][k]) + grad[k] * tap[n].factor;
    if (tap[n].target >= 0) store<QUAD>(window + tap[n].target, sums[n]);
  }
  return min(tap[0].target, tap[count - 1].target);
}

// Adds all taps of one level, in the order of the samples; run by one warp.
__device__ inline void scatter_level(const Problem& p, const Block& block, const Shared& s, int level, float* window,
                                     float scale) {
  const int parity = threadIdx.x % 32 / 8, lane = threadIdx.x % 8;
  for (int c = lane * QUAD; c < CHANNELS; c += 8 * QUAD) {
#pragma unroll 1
    for (int i = 0; i < QUERIES; ++i) {
      const Tap* taps = s.taps + 4 * (i * SAMPLES + level * POINTS) + parity;
      float grad[QUAD];
      read<QUAD>(s.grad + i * PITCH + c, grad);
      int lowest = -1;
#pragma unroll
      for (int n = 0; n + 1 < POINTS; n += 2) lowest = min(lowest, add_to_window<2>(taps + 4 * n, grad, window + c));
      if (POINTS % 2 == 1) lowest = min(lowest, add_to_window<1>(taps + 4 * (POINTS - 1), grad, window + c));
      if (lowest == -1) continue;
#pragma unroll 1
      for (int n = 0; n < POINTS; ++n) {
        const Tap tap = taps[4 * n];
        if (tap.target >= -1) continue;
        float added[QUAD];
#pragma unroll
        for (int k = 0; k < QUAD; ++k) added[k] = grad[k] * tap.factor;
        const int64 at = first_element(p, block) + static_cast<int64>(-2 - tap.target) * p.heads * CHANNELS + c;
        add_shared_by_blocks<QUAD>(p.grad_value, at, added, scale);
      }
    }
  }
}

template <int level>
__device__ inline void flush(const Problem& p, const Block& block, const Shared& s, float scale) {
  if constexpr (level < LEVELS) {
    constexpr unsigned width = WINDOW[level][0], height = WINDOW[level][1], before = first_in_window(level);
    const int2 origin = s.origins[level];
    const float* window = s.window + before;
    const int columns = s.levels[level].columns, start = s.levels[level].start;
    const int64 first = first_element(p, block);
    for (unsigned i = threadIdx.x * FLUSHED; i < width * height * CHANNELS; i += THREADS * FLUSHED) {
      float sums[FLUSHED];
      read<FLUSHED>(window + i, sums);
      bool any = false;
#pragma unroll
      for (int k = 0; k < FLUSHED; ++k) any = any || sums[k] != 0;
      if (!any) continue;  // among them all that lie outside the map
      const int column = origin.x + static_cast<int>(i / CHANNELS % width), row = origin.y + static_cast<int>(i / CHANNELS / width);
      const int64 pixel = start + row * columns + column;
      add_shared_by_blocks<FLUSHED>(p.grad_value, first + pixel * p.heads * CHANNELS + i % CHANNELS, sums, scale);
    }
    flush<level + 1>(p, block, s, scale);
  }
}
#endif

// From the dot products to the gradients of weights and locations; one sample a thread.
__device__ inline void write_samples(const Problem& p, const Block& block, const Shared& s) {
  for (unsigned i = threadIdx.x; i < QUERIES * SAMPLES; i += THREADS) {
    const int query = block.query(p, i / SAMPLES);
    if (query < 0) continue;
    float dots[4];
    read<4>(s.dots + 4 * i, dots);
    const float x = s.parts[3 * i], y = s.parts[3 * i + 1], attention = s.parts[3 * i + 2];
    const float upper = (1 - x) * dots[0] + x * dots[1], lower = (1 - x) * dots[2] + x * dots[3];
    const float weight = (1 - y) * upper + y * lower;
    const float gradients[4] = {
        weight, attention * ((1 - y) * (dots[1] - dots[0]) + y * (dots[3] - dots[2])), attention * (lower - upper), 0};
    float reference[REFERENCE_SIZE];
    load_reference(p, query, reference);
    const float2 scale = offset_scale(reference, s.levels[i % SAMPLES / POINTS]);
    const float grad[2] = {gradients[1] * scale.x, gradients[2] * scale.y};
    const int64 at = block.row(p, query, SAMPLES) + i % SAMPLES;
    store<2>(p.grad_samples + 2 * at, grad);
#if FUSED
    store<4>(s.dots + 4 * i, gradients);
    s.column[i / SAMPLES * (SAMPLES | 1) + i % SAMPLES] = attention * weight;
#else
    narrow(weight, p.grad_weights[at]);
#endif
  }
}

#if FUSED
// The mean gradient that the softmax takes off, and the gradient of the reference: one query a thread, in a fixed order.
__device__ inline void write_queries(const Problem& p, const Block& block, const Shared& s) {
  for (unsigned i = threadIdx.x; i < QUERIES; i += THREADS) {
    const int query = block.query(p, i);
    if (query < 0) continue;
    float mean = 0;
    for (int n = 0; n < SAMPLES; ++n) mean += s.column[i * (SAMPLES | 1) + n];
    s.terms[i].x = mean;
    if (!p.grad_reference) continue;
    float grad[REFERENCE_SIZE] = {};
#pragma unroll 1
    for (int n = 0; n < SAMPLES; ++n) {
      const Level level = s.levels[n / POINTS];
      const float x = s.dots[4 * (i * SAMPLES + n) + 1] * level.width, y = s.dots[4 * (i * SAMPLES + n) + 2] * level.height;
      grad[0] += x;
      grad[1] += y;
      if (REFERENCE_SIZE == 4) {
        float offset[2];
        load<2>(p.samples + 2 * (block.row(p, query, SAMPLES) + n), offset);
        // An infinite offset of a sample without taps must not turn into NaN.
        if (x != 0) grad[REFERENCE_SIZE - 2] += x * offset[0] * (0.5f / POINTS);
        if (y != 0) grad[REFERENCE_SIZE - 1] += y * offset[1] * (0.5f / POINTS);
      }
    }
    for (int k = 0; k < REFERENCE_SIZE; ++k) p.grad_reference[block.row(p, query, REFERENCE_SIZE) + k] = grad[k];
  }
}

__device__ inline void write_logits(const Problem& p, const Block& block, const Shared& s) {
  for (unsigned i = threadIdx.x; i < QUERIES * SAMPLES; i += THREADS) {
    const int query = block.query(p, i / SAMPLES);
    if (query < 0) continue;
    const float grad = s.parts[3 * i + 2] * (s.dots[4 * i] - s.terms[i / SAMPLES].x);
    narrow(grad, p.grad_weights[block.row(p, query, SAMPLES) + i % SAMPLES]);
  }
}
#endif

// Memory of one sample (pixels, dots, taps, parts) is written and read by the same thread except between the barriers
// around gather and scatter, so that no other barriers are needed for it; column has its own.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) ms_deform_attn_backward(const __grid_constant__ Problem p) {
  SHARED_MEMORY(memory);
  const Shared s(memory);
  Block block(p);
  const float scale = DETERMINISTIC ? *p.scale : 1.0f;
  const int warp = threadIdx.x / 32;
  describe_levels(p, block, s.levels);
#if TILED
  for (int i = threadIdx.x; i < WINDOW_FLOATS; i += THREADS) s.window[i] = 0;
#endif
#pragma unroll 1
  for (; block.pass < PASSES; ++block.pass) {
    softmax_of_block(p, block, s.column, s.terms);
    locate_all(p, block, s);
#if TILED
    if (block.pass == 0) {
      __syncthreads();
      for (int level = warp; level < LEVELS; level += WARPS) lay_window(s, level);
      __syncthreads();
    }
    aim_all(s);
#endif
    __syncthreads();
    if (warp >= ADDING) gather(p, block, s, scale);
#if TILED
    float* window = s.window;
    for (int level = 0; level < LEVELS; ++level) {
      if (warp < ADDING && level % ADDING == warp) scatter_level(p, block, s, level, window, scale);
      window += WINDOW[level][0] * WINDOW[level][1] * CHANNELS;
    }
#endif
    __syncthreads();
    write_samples(p, block, s);
#if FUSED
    __syncthreads();
    write_queries(p, block, s);
    __syncthreads();
    write_logits(p, block, s);
#endif
  }
#if TILED
  flush<0>(p, block, s, scale);
#endif
}
