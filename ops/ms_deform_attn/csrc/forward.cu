// Forward: a block has a tile of queries of one image and head. Each sample is located once, into shared memory; then
// groups of lanes read the rows of its taps, 16 bytes a lane.

#include "samples.cuh"

constexpr int ROW = SAMPLES | 1;  // odd: lanes of two queries read 16 bytes each from different banks

struct alignas(16) Sample {
  int sample;  // pixel and taps
  float x, y, weight;
};

struct Shared {
  Sample* samples;  // [QUERIES, ROW]; first of all memory for logits
  Level* levels;    // [LEVELS]
  float2* terms;    // [QUERIES] of the softmax

  __device__ explicit Shared(char* memory) {
    samples = reinterpret_cast<Sample*>(memory);
    levels = reinterpret_cast<Level*>(samples + QUERIES * ROW);
    terms = reinterpret_cast<float2*>(levels + LEVELS);
  }
};

__device__ inline void locate_all(const Problem& p, const Block& block, const Shared& s) {
  Level level = s.levels[threadIdx.x % SAMPLES / POINTS];
  for (unsigned i = threadIdx.x; i < QUERIES * SAMPLES; i += THREADS) {
    const int query = block.query(p, i / SAMPLES);
    if (query < 0) continue;
    const int64 at = block.row(p, query, SAMPLES) + i % SAMPLES;
    if (!ONE_LEVEL) level = s.levels[i % SAMPLES / POINTS];
    float sample[2];
    load<2>(p.samples + 2 * at, sample);
    const Place place = locate(p, query, level, sample[0], sample[1]);
    Pack<int, 4> pack;
    pack.items[0] = pixel_and_taps(place, level);
    pack.items[1] = __float_as_int(place.x);
    pack.items[2] = __float_as_int(place.y);
    pack.items[3] = __float_as_int(weight_of(p, at, s.terms[i / SAMPLES]));
    reinterpret_cast<uint4*>(s.samples)[i / SAMPLES * ROW + i % SAMPLES] = pack.wide;
  }
}

// Adds VECTOR channels of a sample's taps.
__device__ inline void add_sample(const Sample* from, const value_t* head, unsigned stride, int columns, float* sums) {
  Pack<int, 4> pack;
  pack.wide = *reinterpret_cast<const uint4*>(from);
  const Place place = {__int_as_float(pack.items[1]), __int_as_float(pack.items[2]), 0, 0};
  float rows[4][VECTOR];
  load_taps(head, pack.items[0], columns, stride, rows);
#pragma unroll
  for (int tap = 0; tap < 4; ++tap) {
    const float factor = __int_as_float(pack.items[3]) * place.factor_x(tap) * place.factor_y(tap);
#pragma unroll
    for (int c = 0; c < VECTOR; ++c) sums[c] += factor * rows[tap][c];
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) ms_deform_attn_forward(const __grid_constant__ Problem p) {
  SHARED_MEMORY(memory);
  const Shared s(memory);
  const Block block(p);
  describe_levels(p, block, s.levels);
  softmax_of_block(p, block, reinterpret_cast<float*>(s.samples), s.terms);
  locate_all(p, block, s);
  __syncthreads();
  const unsigned stride = p.heads * CHANNELS * sizeof(value_t);
  const unsigned lane = threadIdx.x % LANES;
  const value_t* head = p.value + (block.image * p.pixels * p.heads + block.head) * CHANNELS;
  for (unsigned i = threadIdx.x / LANES; i < QUERIES; i += THREADS / LANES) {
    const int query = block.query(p, i);
    if (query < 0) continue;
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; ++chunk) {
      const unsigned channel = (chunk * LANES + lane) * VECTOR;
      if (channel >= CHANNELS) break;
      float sums[VECTOR] = {};
#pragma unroll 1
      for (int level = 0; level < LEVELS; ++level) {
        const int columns = s.levels[level].columns;
#pragma unroll 2
        for (int n = 0; n < POINTS; ++n)
          add_sample(s.samples + i * ROW + level * POINTS + n, head + channel, stride, columns, sums);
      }
      store<VECTOR>(p.output + block.row(p, query, CHANNELS) + channel, sums);
    }
  }
}
