// Forward: a block has a tile of queries of one image and head. Each sample is located once, into shared memory; then
// groups of lanes read the rows of its taps, 16 bytes a lane.

#include "samples.cuh"

struct Shared {
  int4* pixels;     // [QUERIES, SAMPLES] of the taps, -1 for those that do not exist; first of all memory for logits
  float4* factors;  // [QUERIES, SAMPLES] with which they are summed
  Level* levels;    // [LEVELS]
  float2* terms;    // [QUERIES] of the softmax

  __device__ explicit Shared(char* memory) {
    pixels = reinterpret_cast<int4*>(memory);
    factors = reinterpret_cast<float4*>(pixels + QUERIES * SAMPLES);
    levels = reinterpret_cast<Level*>(factors + QUERIES * SAMPLES);
    terms = reinterpret_cast<float2*>(levels + LEVELS);
  }
};

__device__ inline void locate_all(const Problem& p, const Block& block, const Shared& s) {
  for (unsigned i = threadIdx.x; i < QUERIES * SAMPLES; i += THREADS) {
    const int query = block.query(p, i / SAMPLES);
    if (query < 0) continue;
    const int64 at = block.row(p, query, SAMPLES) + i % SAMPLES;
    const Level level = s.levels[i % SAMPLES / POINTS];
    float sample[2];
    load<2>(p.samples + 2 * at, sample);
    const Place place = locate(p, query, level, sample[0], sample[1]);
    const float weight = weight_of(p, at, s.terms[i / SAMPLES]);
    int pixel[4];
    float factor[4];
#pragma unroll
    for (int tap = 0; tap < 4; ++tap) {
      const bool has = place.has(tap, level);
      pixel[tap] = has ? place.pixel(tap, level) : -1;
      factor[tap] = has ? weight * place.factor_x(tap) * place.factor_y(tap) : 0.0f;
    }
    s.pixels[i] = make_int4(pixel[0], pixel[1], pixel[2], pixel[3]);
    s.factors[i] = make_float4(factor[0], factor[1], factor[2], factor[3]);
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1024 / THREADS) ms_deform_attn_forward(const __grid_constant__ Problem p) {
  SHARED_MEMORY(memory);
  const Shared s(memory);
  const Block block(p);
  describe_levels(p, block, s.levels);
  softmax_of_block(p, block, reinterpret_cast<float*>(s.pixels), s.terms);
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
#pragma unroll 2
      for (int n = 0; n < SAMPLES; ++n) {
        const int4 pixel4 = s.pixels[i * SAMPLES + n];
        const float4 factor4 = s.factors[i * SAMPLES + n];
        const int pixel[4] = {pixel4.x, pixel4.y, pixel4.z, pixel4.w};
        const float factor[4] = {factor4.x, factor4.y, factor4.z, factor4.w};
        float rows[4][VECTOR];
#pragma unroll
        for (int tap = 0; tap < 4; ++tap) load_row<VECTOR>(head + channel, pixel[tap], stride, rows[tap]);
#pragma unroll
        for (int tap = 0; tap < 4; ++tap)
#pragma unroll
          for (int c = 0; c < VECTOR; ++c) sums[c] += factor[tap] * rows[tap][c];
      }
      store<VECTOR>(p.output + block.row(p, query, CHANNELS) + channel, sums);
    }
  }
}
