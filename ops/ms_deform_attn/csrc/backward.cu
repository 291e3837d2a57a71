// Backward: a block has a tile of queries of one image and head. If queries are pixels, their taps fall close together and
// are sorted; otherwise each tap adds to memory.

#if SORTED
#include "sorted.cuh"
#else
#include "direct.cuh"
#endif

// From the dot products to the gradients of weights and locations; one sample a thread.
__device__ inline void write_samples(const Problem& p, const Block& block, const Shared& s) {
  for_own<QUERIES * SAMPLES>([&](unsigned i, unsigned) {
    const int query = block.query(p, i / SAMPLES);
    if (query < 0) return;
    const unsigned place = place_of(i);
    // If sorted, dot products lie by the parities of column and row.
    const int turn = SORTED ? s.samples[place] & 3 : 0;
    float dots[4];
#pragma unroll
    for (int tap = 0; tap < 4; ++tap) dots[tap] = s.dots[(tap ^ turn) * DOT_PITCH + place];
    const float x = s.x[place], y = s.y[place], attention = s.weights[place];
    const float upper = (1 - x) * dots[0] + x * dots[1], lower = (1 - x) * dots[2] + x * dots[3];
    const float weight = (1 - y) * upper + y * lower;
    const float along_x = attention * ((1 - y) * (dots[1] - dots[0]) + y * (dots[3] - dots[2]));
    const float along_y = attention * (lower - upper);
    float reference[REFERENCE_SIZE];
    load_reference(p, query, reference);
    const Level& level = s.levels[i % SAMPLES / POINTS];
    const float2 scale = offset_scale(reference, level.width, level.height);
    const float grad[2] = {along_x * scale.x, along_y * scale.y};
    const int64 at = block.row(p, query, SAMPLES) + i % SAMPLES;
    store<2>(p.grad_samples + 2 * at, grad);
#if FUSED
    s.dots[place] = weight;
    if (p.grad_reference) s.dots[DOT_PITCH + place] = along_x, s.dots[2 * DOT_PITCH + place] = along_y;
    s.samples[place] = __float_as_int(attention * weight);
#else
    narrow(weight, p.grad_weights[at]);
#endif
  });
}

#if FUSED
// The mean gradient that the softmax takes off, and the gradient of the reference: one query a thread, in a fixed order.
__device__ inline void write_queries(const Problem& p, const Block& block, const Shared& s) {
  for (unsigned i = threadIdx.x; i < QUERIES; i += THREADS) {
    const int query = block.query(p, i);
    if (query < 0) continue;
    float mean = 0;
    for (int n = 0; n < SAMPLES; n += NEIGHBOURS) {
      float products[NEIGHBOURS];
      read<NEIGHBOURS>(reinterpret_cast<const float*>(s.samples) + place_of(i * SAMPLES + n), products);
#pragma unroll
      for (int k = 0; k < NEIGHBOURS; ++k) mean += products[k];
    }
    s.means[i] = mean;
    if (!p.grad_reference) continue;
    float grad[REFERENCE_SIZE] = {};
#pragma unroll 1
    for (int n = 0; n < SAMPLES; ++n) {
      const Level level = s.levels[n / POINTS];
      const unsigned place = place_of(i * SAMPLES + n);
      const float x = s.dots[DOT_PITCH + place] * level.width, y = s.dots[2 * DOT_PITCH + place] * level.height;
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
  for_own<QUERIES * SAMPLES>([&](unsigned i, unsigned) {
    const int query = block.query(p, i / SAMPLES);
    if (query < 0) return;
    const unsigned place = place_of(i);
    const float grad = s.weights[place] * (s.dots[place] - s.means[i / SAMPLES]);
    narrow(grad, p.grad_weights[block.row(p, query, SAMPLES) + i % SAMPLES]);
  });
}
#endif

// From sm_100 on, float32 needs more registers than three or four blocks leave its threads.
#if __CUDA_ARCH__ >= 1000 && SORTED && VALUE_TYPE == 0 && BLOCKS > 2
constexpr int RESIDENT = 2;
#else
constexpr int RESIDENT = BLOCKS;
#endif

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT) ms_deform_attn_backward(const __grid_constant__ Problem p) {
  SHARED_MEMORY(memory);
  const Shared s(memory);
  const Block block(p);
  const float scale = DETERMINISTIC ? *p.scale : 1.0f;
  describe_levels(p, block, s.levels);
  softmax_of_block(p, block, s);
  locate_all(p, block, s);
  __syncthreads();
#if SORTED
#pragma unroll 1
  for (int part = threadIdx.x / 32; part < 4 * LEVELS; part += WARPS) {
    const unsigned count = sort_taps(s, part / 4, part % 4);
    walk(p, block, s, part / 4, part % 4, count, scale);
    __syncwarp();  // before the next list takes the memory of this one
  }
#else
  gather(p, block, s, scale);
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
