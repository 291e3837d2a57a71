// Forward: a block has a tile of queries of one image and head. Each sample is located once, into eight bytes of shared
// memory; then groups of lanes read the rows of its taps, 16 bytes a lane. What limits this is the load/store unit: eight lanes
// share a row of 128 bytes, and all need to know where it lies, so that every word that is read about a sample is a quarter of
// a pass. Hence few words, and none are written and read that lanes can as well have from where they lie.

#include "samples.cuh"

constexpr int PAIR = POINTS % 2 == 0 ? 2 : 1;               // samples that a thread locates at a time
constexpr int TOGETHER = POINTS % 4 == 0 ? 4 : PAIR;        // whose weights a thread reads at a time
constexpr int ROW = SAMPLES + (LANES < 8 ? PAIR : 0);       // rows that are read in one pass begin in different banks
constexpr float NEAR = 16;                                  // logits whose exponentials can be summed as they are

struct Shared {
  uint2* places;    // [QUERIES, ROW] along x and y; 0 of a sample without taps
  Level* levels;    // [LEVELS]

  __device__ explicit Shared(char* memory) {
    levels = reinterpret_cast<Level*>(memory);
    places = reinterpret_cast<uint2*>(levels + LEVELS);
  }
};

// The place of a sample along one axis in one number: the pixel of its first tap plus one; the part of a pixel behind it,
// rounded to p.shift bits; four bits. Bit n of both axes' numbers is set if tap n exists.
template <int axis> __device__ inline unsigned place_along(float x, int size, int shift) {
  const unsigned place = static_cast<unsigned>(__float2int_rn(x * (1u << shift))) + (1u << shift), pixel = place >> shift;
  return place << 4 | (pixel - 1 < size ? axis ? 3 : 5 : 0) | (pixel < size ? axis ? 12 : 10 : 0);
}

__device__ inline void locate_all(const Problem& p, const Block& block, const Shared& s) {
  constexpr unsigned steps = SAMPLES / PAIR;
  const unsigned own = threadIdx.x % steps * PAIR / POINTS;  // level of the thread's samples, unless it has others
  int width = s.levels[own].width, height = s.levels[own].height;
  for (unsigned i = threadIdx.x; i < QUERIES * steps; i += THREADS) {
    const int query = block.query(p, i / steps);
    if (query < 0) continue;
    const unsigned n = i % steps * PAIR;
    if (THREADS % steps != 0) width = s.levels[n / POINTS].width, height = s.levels[n / POINTS].height;
    float offsets[2 * PAIR], reference[REFERENCE_SIZE] = {};
    load<2 * PAIR>(p.samples + 2 * (block.row(p, query, SAMPLES) + n), offsets);
    load_reference(p, query, reference);
    Pack<unsigned, 2 * PAIR> places;
#pragma unroll
    for (int k = 0; k < PAIR; ++k) {
      const float2 at = location(reference, width, height, offsets[2 * k], offsets[2 * k + 1]);
      const bool inside = is_inside(at, width, height);
      places.items[2 * k] = inside ? place_along<0>(at.x, width, p.shift) : 0;
      places.items[2 * k + 1] = inside ? place_along<1>(at.y, height, p.shift) : 0;
    }
    *reinterpret_cast<Pack<unsigned, 2 * PAIR>::wide_t*>(s.places + i / steps * ROW + n) = places.wide;
  }
}

// Adds VECTOR channels of a sample's taps. Of its level, first is where they begin for a tap at (-1, -1).
__device__ inline void add_sample(const char* first, int columns, uint2 place, float weight, int shift, float* sums) {
  // Behind an exponent, the part of a pixel is what a number has more than a power of two.
  const unsigned part = (1u << shift) - 1 << 4, exponent = 146 - shift << 23;
  const float x = __uint_as_float(place.x & part | exponent) - __uint_as_float(exponent);
  const float y = __uint_as_float(place.y & part | exponent) - __uint_as_float(exponent);
  const unsigned pixel = (place.y >> shift + 4) * columns + (place.x >> shift + 4);
  const char* upper = first + static_cast<uint64>(pixel) * STRIDE;
  const char* lower = upper + static_cast<uint64>(static_cast<unsigned>(columns)) * STRIDE;
  Pack<value_t, VECTOR> rows[4];
#pragma unroll
  for (int tap = 0; tap < 4; ++tap) {
    const char* from = (tap & 2 ? lower : upper) + (tap & 1) * STRIDE;
    load_if<true>(place.x & place.y & 1 << tap, reinterpret_cast<const value_t*>(from), rows[tap]);
  }
  const float right = weight * x, left = weight - right, lower_right = right * y, lower_left = left * y;
  const float factors[4] = {left - lower_left, right - lower_right, lower_left, lower_right};
#pragma unroll
  for (int tap = 0; tap < 4; ++tap) {
    if (!(place.x & place.y & 1 << tap)) continue;
    float row[VECTOR];
    widen_all<VECTOR>(rows[tap], row);
#pragma unroll
    for (int c = 0; c < VECTOR; ++c) sums[c] += factors[tap] * row[c];
  }
}

// VECTOR channels of a query, of which value begins with the first of the image's and head's.
__device__ inline void gather(const Problem& p, const uint2* from, const sample_t* weights, const value_t* value,
                              value_t* output) {
  float sums[VECTOR], highest = 0;
#pragma unroll 1
  for (bool again = true; again;) {
    float total = 0, seen = __int_as_float(0xff800000);
#pragma unroll
    for (int c = 0; c < VECTOR; ++c) sums[c] = 0;
#pragma unroll 1
    for (int level = 0; level < LEVELS; ++level) {
      const int columns = p.shapes[level][1];
      const char* first = reinterpret_cast<const char*>(value) + static_cast<int64>(p.shapes[level][2] - columns - 1) * STRIDE;
#pragma unroll 1
      for (int n = level * POINTS; n < (level + 1) * POINTS; n += TOGETHER) {
        float weight[TOGETHER];
        Pack<unsigned, 2 * PAIR> places;
        load<TOGETHER>(weights + n, weight);
#pragma unroll
        for (int k = 0; k < TOGETHER; ++k) {
          if (k % PAIR == 0) places.wide = *reinterpret_cast<const Pack<unsigned, 2 * PAIR>::wide_t*>(from + n + k);
#if FUSED
          seen = fmaxf(seen, weight[k]);
          weight[k] = exponential(weight[k] - highest);
          total += weight[k];
#endif
          add_sample(first, columns, make_uint2(places.items[k % PAIR * 2], places.items[k % PAIR * 2 + 1]), weight[k], p.shift,
                     sums);
        }
      }
    }
#if FUSED
    // A softmax does not change if all logits are taken less their highest, which it is too late to know.
    again = highest == 0 && !(fabsf(seen) <= NEAR);
    highest = seen;
    total = __fdividef(1.0f, total);
#pragma unroll
    for (int c = 0; c < VECTOR; ++c) sums[c] *= total;
#else
    again = false;
#endif
  }
  store<VECTOR>(output, sums);
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) ms_deform_attn_forward(const __grid_constant__ Problem p) {
  SHARED_MEMORY(memory);
  const Shared s(memory);
  const Block block(p);
  describe_levels(p, block, s.levels);
  __syncthreads();
  locate_all(p, block, s);
  __syncthreads();
  const unsigned lane = threadIdx.x % LANES;
  const value_t* head = p.value + (block.image * p.pixels * HEADS + block.head) * CHANNELS;
  for (unsigned i = threadIdx.x / LANES; i < QUERIES; i += THREADS / LANES) {
    const int query = block.query(p, i);
    if (query < 0) continue;
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; ++chunk) {
      const unsigned channel = (chunk * LANES + lane) * VECTOR;
      if (channel >= CHANNELS) break;
      gather(p, s.places + i * ROW, p.weights + block.row(p, query, SAMPLES), head + channel,
             p.output + block.row(p, query, CHANNELS) + channel);
    }
  }
}
