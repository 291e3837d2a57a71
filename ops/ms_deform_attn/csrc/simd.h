// Vectors of the machine's width through the compiler's vector extension (GCC and Clang), and what is done with them.
#pragma once

#include <cstdint>
#include <cstring>
#include <cmath>
#include <utility>

#if defined(__AVX512F__)
constexpr int VECTOR_BYTES = 64;
#elif defined(__AVX__)
constexpr int VECTOR_BYTES = 32;
#else
constexpr int VECTOR_BYTES = 16;
#endif

struct bf16 { uint16_t bits; };
struct fp16 { uint16_t bits; };

template <class A> struct Lanes;
template <> struct Lanes<float> {
  typedef float V __attribute__((vector_size(VECTOR_BYTES)));
  typedef int32_t I __attribute__((vector_size(VECTOR_BYTES)));
  typedef uint32_t U __attribute__((vector_size(VECTOR_BYTES)));
  typedef uint16_t Half __attribute__((vector_size(VECTOR_BYTES / 2)));
  typedef int32_t Int;
};
template <> struct Lanes<double> {
  typedef double V __attribute__((vector_size(VECTOR_BYTES)));
  typedef int64_t I __attribute__((vector_size(VECTOR_BYTES)));
  typedef int64_t Int;
};
template <class A> using Vec = typename Lanes<A>::V;
template <class A> using IntVec = typename Lanes<A>::I;
template <class A> constexpr int WIDTH = VECTOR_BYTES / sizeof(A);

template <class To, class From> inline To bits(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "a cast of bits keeps the size");
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

template <class A> inline Vec<A> splat(A x) { return x - Vec<A>{}; }

template <class A> inline void store(A* to, Vec<A> v) { std::memcpy(to, &v, sizeof(v)); }

// Loads widen 16-bit values to float32, exactly.
inline Vec<float> load(const float* from) {
  Vec<float> v;
  std::memcpy(&v, from, sizeof(v));
  return v;
}
inline Vec<double> load(const double* from) {
  Vec<double> v;
  std::memcpy(&v, from, sizeof(v));
  return v;
}
inline Vec<float> load(const bf16* from) {
  Lanes<float>::Half half;
  std::memcpy(&half, from, sizeof(half));
  return bits<Vec<float>>(__builtin_convertvector(half, Lanes<float>::U) << 16);
}
inline Vec<float> load(const fp16* from) {
  Lanes<float>::Half half;
  std::memcpy(&half, from, sizeof(half));
  const auto wide = __builtin_convertvector(half, Lanes<float>::U);
  const Lanes<float>::U magnitude = (wide & 0x7fffu) << 13;
  Lanes<float>::U scaled = bits<Lanes<float>::U>(bits<Vec<float>>(magnitude) * 0x1p112f);
  scaled = magnitude >= 0x0f800000u ? scaled | 0x7f800000u : scaled;  // infinity and NaN
  return bits<Vec<float>>(scaled | ((wide & 0x8000u) << 16));
}

inline float scalar(float x) { return x; }
inline double scalar(double x) { return x; }
inline float scalar(bf16 x) { return bits<float>(static_cast<uint32_t>(x.bits) << 16); }
inline float scalar(fp16 x) {
  const uint32_t magnitude = (x.bits & 0x7fffu) << 13;
  uint32_t scaled = bits<uint32_t>(bits<float>(magnitude) * 0x1p112f);
  if (magnitude >= 0x0f800000u) scaled |= 0x7f800000u;
  return bits<float>(scaled | ((x.bits & 0x8000u) << 16));
}

// Lane i of the result is lane index(i) of the concatenation of a and b.
#if defined(__clang__) || __GNUC__ >= 12
template <class V, class Index, int... I>
inline V shuffle_lanes(V a, V b, Index, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, b, Index::at(I)...);
}
template <class A, class Index> inline Vec<A> shuffle(Vec<A> a, Vec<A> b, Index index) {
  return shuffle_lanes(a, b, index, std::make_integer_sequence<int, WIDTH<A>>{});
}
#else
template <class A, class Index> inline Vec<A> shuffle(Vec<A> a, Vec<A> b, Index) {
  IntVec<A> mask;
  for (int i = 0; i < WIDTH<A>; ++i) mask[i] = Index::at(i);
  return __builtin_shuffle(a, b, mask);
}
#endif

template <int parity> struct Deinterleave {
  static constexpr int at(int i) { return 2 * i + parity; }
};
// Lanes of two vectors taken in turn; part 0 is the first half of the result.
template <int width, int part> struct Interleave {
  static constexpr int at(int i) { return part * width / 2 + i / 2 + (i & 1) * width; }
};
template <int width, int step> struct Exchange {
  static constexpr int at(int i) { return i ^ step; }
};
// Out of blocks of 2*step lanes, the low (high = 0) or high half of a's block, then the same of b's.
template <int width, int step, int high> struct Halves {
  static constexpr int at(int i) {
    return (i & ~(2 * step - 1)) + (i & (step - 1)) + (high ? step : 0) + ((i & step) ? width : 0);
  }
};

template <class A, int step = 1> inline A sum(Vec<A> v) {
  if constexpr (step < WIDTH<A>)
    return sum<A, 2 * step>(v + shuffle<A>(v, v, Exchange<WIDTH<A>, step>{}));
  else
    return v[0];
}
template <class A, int step = 1> inline A maximum(Vec<A> v) {
  if constexpr (step < WIDTH<A>) {
    const Vec<A> other = shuffle<A>(v, v, Exchange<WIDTH<A>, step>{});
    return maximum<A, 2 * step>(v > other ? v : other);
  } else {
    return v[0];
  }
}

// Lane i of the result is the sum over all lanes of rows[i]: a transposition that adds on its way.
template <class A, int count = WIDTH<A>> inline Vec<A> row_sums(const Vec<A>* rows) {
  if constexpr (count == 1) {
    return rows[0];
  } else {
    constexpr int step = count / 2;
    const Vec<A> a = row_sums<A, step>(rows), b = row_sums<A, step>(rows + step);
    return shuffle<A>(a, b, Halves<WIDTH<A>, step, 0>{}) + shuffle<A>(a, b, Halves<WIDTH<A>, step, 1>{});
  }
}

// e^x for x <= 0, to 2 units in the last place: range reduction by log(2) and a polynomial of degree 6. NaN stays NaN.
inline Vec<float> exponential(Vec<float> x) {
  x = x < splat(-87.0f) ? splat(-87.0f) : x;
  const Vec<float> shifted = x * 1.44269504f + 12582912.0f;
  const Vec<float> n = shifted - 12582912.0f;
  const Vec<float> r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Vec<float> p = r * 1.3981999507e-3f + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const Lanes<float>::I scale = (bits<Lanes<float>::I>(shifted) << 23) + (127 << 23);
  return p * bits<Vec<float>>(scale);
}
inline Vec<double> exponential(Vec<double> x) {
  for (int i = 0; i < WIDTH<double>; ++i) x[i] = std::exp(x[i]);
  return x;
}
