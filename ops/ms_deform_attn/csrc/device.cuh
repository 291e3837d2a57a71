// What the kernels need of the device: 16-bit types, wide loads and reductions. No CUDA header is included, so that NVRTC
// needs nothing but itself.
//
// Set when compiled: VALUE_TYPE and SAMPLE_TYPE (0 float32, 1 bfloat16, 2 float16), HEADS, CHANNELS, LEVELS, POINTS, FUSED,
// REFERENCE_SIZE (2 points, 4 boxes), TILED, TILE_WIDTH, TILE_HEIGHT, THREADS, BLOCKS, and for the backward DETERMINISTIC and
// SORTED.
#pragma once

typedef long long int64;
typedef unsigned long long uint64;

struct bf16 { unsigned short bits; };
struct fp16 { unsigned short bits; };

template <int type> struct Type;
template <> struct Type<0> { typedef float t; };
template <> struct Type<1> { typedef bf16 t; };
template <> struct Type<2> { typedef fp16 t; };
typedef Type<VALUE_TYPE>::t value_t;
typedef Type<SAMPLE_TYPE>::t sample_t;

__device__ inline float widen(float x) { return x; }
__device__ inline float widen(bf16 x) { return __uint_as_float(static_cast<unsigned>(x.bits) << 16); }
__device__ inline float widen(fp16 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}

__device__ inline float exponential(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x * 1.44269504f));
  return y;
}

// Rounding to nearest, ties to even.
__device__ inline void narrow(float x, float& y) { y = x; }
__device__ inline void narrow(float x, bf16& y) {
  const unsigned bits = __float_as_uint(x);
  y.bits = x != x ? 0x7fffu : static_cast<unsigned short>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
__device__ inline void narrow(float x, fp16& y) {
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
}

// count consecutive values as one access of up to 16 bytes; the address is a multiple of its size.
template <int bytes> struct Wide;
template <> struct Wide<16> { typedef uint4 t; };
template <> struct Wide<8> { typedef uint2 t; };
template <> struct Wide<4> { typedef unsigned t; };
template <> struct Wide<2> { typedef unsigned short t; };

template <class T, int count> union Pack {
  typedef typename Wide<sizeof(T) * count>::t wide_t;
  wide_t wide;
  T items[count];
  unsigned words[(sizeof(T) * count + 3) / 4];
  __device__ Pack() {}
};
template <class T> constexpr bool IS_BF16 = false;
template <> constexpr bool IS_BF16<bf16> = true;
// To float32; pairs of bfloat16 by a shift and a mask, for which compilers find nothing as short by themselves.
template <int count, class T> __device__ inline void widen_all(const Pack<T, count>& pack, float* to) {
  if constexpr (IS_BF16<T> && count % 2 == 0) {
#pragma unroll
    for (int i = 0; i < count; i += 2) {
      to[i] = __uint_as_float(pack.words[i / 2] << 16);
      to[i + 1] = __uint_as_float(pack.words[i / 2] & 0xffff0000u);
    }
  } else {
#pragma unroll
    for (int i = 0; i < count; ++i) to[i] = widen(pack.items[i]);
  }
}
template <int count, class T> __device__ inline void load(const T* from, float* to) {
  Pack<T, count> pack;
  pack.wide = __ldg(reinterpret_cast<const typename Pack<T, count>::wide_t*>(from));
  widen_all<count>(pack, to);
}
// The same as they are, or zeros, or anything.
template <bool anything = false, class T, int count> __device__ inline void load_if(bool is, const T* from, Pack<T, count>& pack) {
  if (!anything) pack.wide = {};
  if (is) pack.wide = __ldg(reinterpret_cast<const typename Pack<T, count>::wide_t*>(from));
}
template <int count, class T> __device__ inline void store(T* to, const float* from) {
  Pack<T, count> pack;
#pragma unroll
  for (int i = 0; i < count; ++i) narrow(from[i], pack.items[i]);
  *reinterpret_cast<typename Pack<T, count>::wide_t*>(to) = pack.wide;
}

// The same of what this block has written to shared memory.
template <int count, class T> __device__ inline void read(const T* from, float* to) {
  Pack<T, count> pack;
  pack.wide = *reinterpret_cast<const typename Pack<T, count>::wide_t*>(from);
  widen_all<count>(pack, to);
}

constexpr bool VECTOR_REDUCTIONS = !DETERMINISTIC && __CUDA_ARCH__ >= 900;
// Adds count floats to memory that other blocks add to. Without DETERMINISTIC in whatever order they come, by vector
// reductions where there are any; with it as 64-bit fixed-point numbers, whose sum does not depend on the order.
#if DETERMINISTIC
typedef uint64 sum_t;
#else
typedef float sum_t;
#endif
template <int count> __device__ inline void add_shared_by_blocks(sum_t* to, const float* x, float scale) {
#if DETERMINISTIC
#pragma unroll
  for (int i = 0; i < count; ++i)
    asm volatile("red.global.add.u64 [%0], %1;" ::"l"(to + i), "l"(__float2ll_rn(x[i] * scale)) : "memory");
#else
#if __CUDA_ARCH__ >= 900
  if constexpr (count == 4) {
    asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to), "f"(x[0]), "f"(x[1]), "f"(x[2]), "f"(x[3])
                 : "memory");
  } else
#endif
  {
#pragma unroll
    for (int i = 0; i < count; ++i) asm volatile("red.global.add.f32 [%0], %1;" ::"l"(to + i), "f"(x[i]) : "memory");
  }
#endif
}
