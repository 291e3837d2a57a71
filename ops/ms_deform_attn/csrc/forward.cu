// Forward: a block has a tile of queries of one image and head. Each sample is located once, into shared memory; then
// groups of lanes read the rows of its taps, 16 bytes a lane.

#include "samples.cuh"

extern "C" __global__ void __launch_bounds__(THREADS, 1024 / THREADS) ms_deform_attn_forward(const __grid_constant__ Problem p) {
  SHARED_MEMORY(memory);
  int4* pixels = reinterpret_cast<int4*>(memory);
  float4* factors = reinterpret_cast<float4*>(pixels + QUERIES * SAMPLES);
  float2* terms = reinterpret_cast<float2*>(factors + QUERIES * SAMPLES);
  const Block block(p);
  softmax_of_block(p, block, terms);
  for (int i = threadIdx.x; i < QUERIES * SAMPLES; i += THREADS) {
    const int64 query = block.query(p, i / SAMPLES);
    if (query < 0) continue;
    const int level = i % SAMPLES / POINTS;
    const int64 at = (query * p.heads + block.head) * SAMPLES + i % SAMPLES;
    float sample[2];
    load<2>(p.samples + 2 * at, sample);
    const Place place = locate(p, block.image, query, level, sample[0], sample[1]);
    const float weight = weight_of(p, at, terms[i / SAMPLES]);
    int pixel[4];
    float factor[4];
#pragma unroll
    for (int tap = 0; tap < 4; ++tap) {
      const int64 index = static_cast<int64>(place.row + (tap >> 1)) * p.shapes[level][1] + place.column + (tap & 1);
      pixel[tap] = place.has(tap) ? static_cast<int>(p.shapes[level][2] + index) : -1;
      factor[tap] = weight * place.factor_x(tap) * place.factor_y(tap);
    }
    pixels[i] = make_int4(pixel[0], pixel[1], pixel[2], pixel[3]);
    factors[i] = make_float4(factor[0], factor[1], factor[2], factor[3]);
  }
  __syncthreads();
  const int lane = threadIdx.x % LANES;
  const int64 stride = static_cast<int64>(p.heads) * CHANNELS;
  const value_t* value = p.value + block.image * p.pixels * stride + block.head * CHANNELS;
  for (int i = threadIdx.x / LANES; i < QUERIES; i += THREADS / LANES) {
    const int64 query = block.query(p, i);
    if (query < 0) continue;
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; ++chunk) {
      const int channel = (chunk * LANES + lane) * VECTOR;
      if (channel >= CHANNELS) break;
      float sums[VECTOR] = {};
#pragma unroll 4
      for (int n = 0; n < SAMPLES; ++n) {
        const int4 pixel4 = pixels[i * SAMPLES + n];
        const float4 factor4 = factors[i * SAMPLES + n];
        const int pixel[4] = {pixel4.x, pixel4.y, pixel4.z, pixel4.w};
        const float factor[4] = {factor4.x, factor4.y, factor4.z, factor4.w};
#pragma unroll
        for (int tap = 0; tap < 4; ++tap) {
          if (pixel[tap] < 0) continue;
          float row[VECTOR];
          load<VECTOR>(value + pixel[tap] * stride + channel, row);
#pragma unroll
          for (int c = 0; c < VECTOR; ++c) sums[c] += factor[tap] * row[c];
        }
      }
      store<VECTOR>(p.output + (query * p.heads + block.head) * CHANNELS + channel, sums);
    }
  }
}
