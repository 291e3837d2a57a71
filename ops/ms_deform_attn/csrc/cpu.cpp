// Multi-scale deformable attention on the host: forward and backward, fused and unfused, behind a plain C interface.

#include <atomic>
#include <memory>
#include <new>
#include <system_error>
#include <thread>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "samples.h"

namespace {

constexpr int64_t HUGE_PAGE = int64_t{1} << 21;

// Asks for huge pages in the part of a large buffer that can have them: rows far apart then share entries of the page
// table, and a buffer fresh from the system costs a few page faults instead of thousands. It is no more than a hint.
void prefer_huge_pages(void* buffer, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const auto start = reinterpret_cast<uintptr_t>(buffer), first = (start + HUGE_PAGE - 1) & -HUGE_PAGE;
  const auto last = (start + bytes) & -HUGE_PAGE;
  if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)buffer, (void)bytes;
#endif
}

// Memory that a thread keeps from one task to the next, not initialised.
template <class A> class Scratch {
 public:
  A* get(int64_t size) {
    if (size > size_) data_.reset(new A[size]);
    size_ = std::max(size, size_);
    return data_.get();
  }

 private:
  std::unique_ptr<A[]> data_;
  int64_t size_ = 0;
};

// Runs task(i, state) for every i, on this thread and others, each with a State of its own; each task must write memory
// of its own. Throws std::bad_alloc if any of them does.
template <class State, class Task> void parallel(int64_t tasks, int64_t threads, const Task& task) {
  std::atomic<int64_t> next{0};
  std::atomic<bool> exhausted{false};
  const auto work = [&] {
    try {
      State state;
      for (int64_t i = next++; i < tasks; i = next++) task(i, state);
    } catch (const std::bad_alloc&) {
      exhausted = true;
    }
  };
  std::vector<std::thread> others;
  try {
    for (int64_t i = 1; i < std::min(threads, tasks); ++i) others.emplace_back(work);
  } catch (const std::system_error&) {
    // No more threads to be had: those there are do all the work.
  }
  work();
  for (auto& other : others) other.join();
  if (exhausted) throw std::bad_alloc();
}

struct Nothing {};

template <class A> void fill_zero(A* to, int64_t size, int64_t threads) {
  const int64_t block = HUGE_PAGE / static_cast<int64_t>(sizeof(A)), blocks = (size + block - 1) / block;
  parallel<Nothing>(blocks, threads, [&](int64_t task, Nothing) {
    std::fill_n(to + task * block, std::min(block, size - task * block), A(0));
  });
}

// D channels per head, known at compile time.
template <class T, class A, int D> struct Channels {
  static constexpr int width = WIDTH<A>, vectors = D / width;

  static void gather(const Samples<A>& s, const T* value, int64_t stride, int64_t, A* out) {
    // One sum per tap, added up at the end: additions that do not wait for each other.
    Vec<A> sums[4][vectors] = {};
    const auto* active = reinterpret_cast<const typename Samples<A>::Int*>(s.active.data());
    for (int64_t n = 0; n < s.count; ++n) {
      if (!active[n]) continue;
      for (int t = 0; t < 4; ++t) {
        const T* from = value + lane(s.pixel[t], n) * stride;
        const A weight = lane(s.tap[t], n);
        for (int i = 0; i < vectors; ++i) sums[t][i] += load(from + i * width) * weight;
      }
    }
    for (int i = 0; i < vectors; ++i) store(out + i * width, (sums[0][i] + sums[1][i]) + (sums[2][i] + sums[3][i]));
  }

  // Adds to grad_value and leaves the dot product of grad with tap t of sample n in dots[t * padded + n].
  static void scatter(const Samples<A>& s, const A* value, int64_t stride, int64_t, const A* grad, A* grad_value,
                      Vec<A>* partial, Vec<A>* dots) {
    const int64_t padded = s.vectors * width;
    Vec<A> g[vectors];
    for (int i = 0; i < vectors; ++i) g[i] = load(grad + i * width);
    const auto* active = reinterpret_cast<const typename Samples<A>::Int*>(s.active.data());
    for (int64_t n = 0; n < s.count; ++n) {
      if (!active[n]) {
        for (int t = 0; t < 4; ++t) partial[t * padded + n] = Vec<A>{};
        continue;
      }
      for (int t = 0; t < 4; ++t) {
        const int64_t at = lane(s.pixel[t], n) * stride;
        const A weight = lane(s.tap[t], n);
        Vec<A> dot = {};
        for (int i = 0; i < vectors; ++i) {
          dot += load(value + at + i * width) * g[i];
          A* to = grad_value + at + i * width;
          store(to, load(to) + g[i] * weight);
        }
        partial[t * padded + n] = dot;
      }
    }
    for (int64_t i = 0; i < 4 * s.vectors; ++i) dots[i] = row_sums<A>(partial + i * width);
  }

  template <class Vector> static auto lane(const std::vector<Vector>& v, int64_t n) {
    return reinterpret_cast<const std::remove_reference_t<decltype(v[0][0] + v[0][0])>*>(v.data())[n];
  }
};

// Any number of channels.
template <class T, class A> struct Channels<T, A, 0> {
  static void gather(const Samples<A>& s, const T* value, int64_t stride, int64_t channels, A* out) {
    std::fill(out, out + channels, A(0));
    for (int64_t n = 0; n < s.count; ++n) {
      const int64_t i = n / WIDTH<A>, j = n % WIDTH<A>;
      if (!s.active[i][j]) continue;
      for (int t = 0; t < 4; ++t) {
        const T* from = value + s.pixel[t][i][j] * stride;
        const A weight = s.tap[t][i][j];
        for (int64_t c = 0; c < channels; ++c) out[c] += scalar(from[c]) * weight;
      }
    }
  }

  static void scatter(const Samples<A>& s, const A* value, int64_t stride, int64_t channels, const A* grad,
                      A* grad_value, Vec<A>*, Vec<A>* dots) {
    for (int64_t n = 0; n < s.count; ++n) {
      const int64_t i = n / WIDTH<A>, j = n % WIDTH<A>;
      for (int t = 0; t < 4; ++t) {
        A dot = 0;
        if (s.active[i][j]) {
          const int64_t at = s.pixel[t][i][j] * stride;
          const A weight = s.tap[t][i][j];
          for (int64_t c = 0; c < channels; ++c) {
            dot += value[at + c] * grad[c];
            grad_value[at + c] += grad[c] * weight;
          }
        }
        dots[t * s.vectors + i][j] = dot;
      }
    }
  }
};

// With many queries per pixel, a head's map is worth copying into one piece first: read in place, its rows are far apart,
// which falls into few sets of the caches and many pages. Four pixels can be copied in the time that a query takes.
bool worth_copying(const Problem& p) { return p.heads > 1 && 4 * p.queries >= p.pixels; }

// Rows of one head lie far apart in the tensors, a page for a few of them: asked for so many rows before they are
// needed, they arrive in time.
constexpr int64_t AHEAD = 8;

// Copies the channels of one head, from is the first; the copy has the accumulation type.
template <class T, class A, int D> void copy_map(const Problem& p, const T* from, A* to) {
  const int64_t stride = p.heads * p.channels;
  for (int64_t i = 0; i < p.pixels; ++i, from += stride, to += p.channels) {
    if constexpr (D > 0) {
      for (int64_t byte = 0; byte < D * static_cast<int64_t>(sizeof(T)); byte += 64)
        __builtin_prefetch(reinterpret_cast<const char*>(from + AHEAD * stride) + byte);
      for (int c = 0; c < D; c += WIDTH<A>) store(to + c, load(from + c));
    } else {
      for (int64_t c = 0; c < p.channels; ++c) to[c] = scalar(from[c]);
    }
  }
}

// Inlined by force: GCC takes a function that does nothing but this for one without effect, and drops the calls.
template <class A>
__attribute__((always_inline)) inline void prefetch(const void* tensor, int64_t row, int64_t size) {
  const char* from = reinterpret_cast<const char*>(static_cast<const A*>(tensor) + row * size);
  for (int64_t byte = 0; byte < size * static_cast<int64_t>(sizeof(A)); byte += 64) __builtin_prefetch(from + byte);
}

// Asks for what a query of one head reads: its samples, weights and gradient, and what it writes.
template <class A>
__attribute__((always_inline)) inline void prefetch_query(const Problem& p, int64_t row, bool gradients) {
  const int64_t samples = p.levels * p.points;
  prefetch<A>(p.samples, row, 2 * samples);
  prefetch<A>(p.weights, row, samples);
  prefetch<A>(gradients ? p.grad_output : p.output, row, p.channels);
  if (!gradients) return;
  prefetch<A>(p.grad_samples, row, 2 * samples);
  prefetch<A>(p.grad_weights, row, samples);
}

// The queries of each image in the order of their work, roughly from top to bottom: those that follow each other then
// read the same rows of pixels, while caches and page tables still know them.
template <class A> std::vector<int64_t> order_of_work(const Problem& p) {
  constexpr int64_t bands = 64;
  const auto band = [&](int64_t query) -> int64_t {
    const A y = p.fused ? static_cast<const A*>(p.reference)[query * p.reference_size + 1]
                        : static_cast<const A*>(p.samples)[2 * query * p.heads * p.levels * p.points + 1];
    return y > 0 ? (y < 1 ? static_cast<int64_t>(y * bands) : bands - 1) : 0;  // 0 for NaN
  };
  std::vector<int64_t> order(p.images * p.queries);
  for (int64_t first = 0; first < p.images * p.queries; first += p.queries) {
    int64_t places[bands + 1] = {};
    for (int64_t query = first; query < first + p.queries; ++query) ++places[band(query) + 1];
    for (int64_t i = 0; i < bands; ++i) places[i + 1] += places[i];
    for (int64_t query = first; query < first + p.queries; ++query) order[first + places[band(query)]++] = query;
  }
  return order;
}

template <class T, class A, int D> void forward(const Problem& p) {
  // One image and head is a task, or a part of its queries: small ones for balance, unless each has to copy the map.
  const int64_t maps = p.images * p.heads, stride = p.heads * p.channels;
  const bool copied = worth_copying(p);
  const int64_t parts = ((copied ? 1 : 4) * p.threads + maps - 1) / maps, block = (p.queries + parts - 1) / parts;
  const std::vector<int64_t> order = order_of_work<A>(p);
  prefer_huge_pages(p.output, p.images * p.queries * stride * sizeof(A));
  parallel<Scratch<A>>(maps * parts, p.threads, [&](int64_t task, Scratch<A>& scratch) {
    const int64_t image = task / parts / p.heads, head = task / parts % p.heads;
    const T* value = static_cast<const T*>(p.value) + image * p.pixels * stride + head * p.channels;
    const A* map = nullptr;
    if (copied) {
      A* to = scratch.get(p.pixels * p.channels);
      copy_map<T, A, D>(p, value, to);
      map = to;
    }
    Samples<A> samples(p, 0, p.levels);
    samples.set_image(image);
    const int64_t first = image * p.queries + task % parts * block, end = (image + 1) * p.queries;
    for (int64_t i = first; i < std::min(first + block, end); ++i) {
      const int64_t row = order[i] * p.heads + head;
      prefetch_query<A>(p, order[std::min(i + AHEAD, end - 1)] * p.heads + head, false);
      samples.prepare(order[i], row);
      A* out = static_cast<A*>(p.output) + row * p.channels;
      if (copied)
        Channels<A, A, D>::gather(samples, map, p.channels, p.channels, out);
      else
        Channels<T, A, D>::gather(samples, value, stride, p.channels, out);
    }
  });
}

// The first lanes of a vector, all of them if there is room; a copy of known size is one instruction.
template <class A> void copy_lanes(A* to, const Vec<A>* from, int64_t room) {
  if (room >= WIDTH<A>)
    store(to, *from);
  else if (room > 0)
    std::memcpy(to, from, room * sizeof(A));
}

// Gradients of the weights and of the locations in pixels (fused) or in the map's unit (unfused) of one row.
template <class A> void sample_gradients(const Problem& p, const Samples<A>& s, const Vec<A>* dots, int64_t row) {
  using V = Vec<A>;
  const int64_t at = row * p.levels * p.points + s.begin;
  A* grad_weights = static_cast<A*>(p.grad_weights) + at;
  A* grad_samples = static_cast<A*>(p.grad_samples) + 2 * at;
  for (int64_t i = 0; i < s.vectors; ++i) {
    const V zero = {}, d0 = dots[i], d1 = dots[s.vectors + i], d2 = dots[2 * s.vectors + i], d3 = dots[3 * s.vectors + i];
    const V upper = s.left[i] * d0 + s.right[i] * d1, lower = s.left[i] * d2 + s.right[i] * d3;
    V weight = s.top[i] * upper + s.bottom[i] * lower;
    V x = s.weight[i] * (s.top[i] * (s.d_left[i] * d0 + s.d_right[i] * d1) +
                         s.bottom[i] * (s.d_left[i] * d2 + s.d_right[i] * d3));
    V y = s.weight[i] * (s.d_top[i] * upper + s.d_bottom[i] * lower);
    if (!p.fused) {
      x *= s.limit_x[i];
      y *= s.limit_y[i];
    }
    weight = s.active[i] ? weight : zero;
    x = s.active[i] ? x : zero;
    y = s.active[i] ? y : zero;
    const V pairs[2] = {shuffle<A>(x, y, Interleave<WIDTH<A>, 0>{}), shuffle<A>(x, y, Interleave<WIDTH<A>, 1>{})};
    copy_lanes(grad_weights + i * WIDTH<A>, &weight, s.count - i * WIDTH<A>);
    copy_lanes(grad_samples + 2 * i * WIDTH<A>, pairs, 2 * s.count - 2 * i * WIDTH<A>);
    copy_lanes(grad_samples + (2 * i + 1) * WIDTH<A>, pairs + 1, 2 * s.count - (2 * i + 1) * WIDTH<A>);
  }
}

// From the gradients of weights and pixel locations to those of logits, offsets and reference, in place.
template <class A> void finish_fused(const Problem& p, Samples<A>& samples, int64_t query) {
  const int64_t size = p.reference_size, all = p.levels * p.points;
  const A* reference = static_cast<const A*>(p.reference) + query * size;
  const A scale = size == 4 ? A(0.5) / static_cast<A>(p.points) : A(0);
  A grad_reference[4] = {};
  for (int64_t head = 0; head < p.heads; ++head) {
    const int64_t row = query * p.heads + head;
    const A* weights = samples.softmax(row);
    A* grad_weights = static_cast<A*>(p.grad_weights) + row * all;
    A mean = 0;
    for (int64_t n = 0; n < all; ++n) mean += weights[n] * grad_weights[n];
    for (int64_t n = 0; n < all; ++n) grad_weights[n] = weights[n] * (grad_weights[n] - mean);
    const A* offsets = static_cast<const A*>(p.samples) + 2 * row * all;
    A* grad_offsets = static_cast<A*>(p.grad_samples) + 2 * row * all;
    if (size == 2 && !p.grad_reference) continue;  // offsets are in pixels already
    for (int64_t n = 0; n < all; ++n) {
      const A limits[2] = {samples.limit_x[n / WIDTH<A>][n % WIDTH<A>], samples.limit_y[n / WIDTH<A>][n % WIDTH<A>]};
      for (int64_t axis = 0; axis < 2; ++axis) {
        A& grad = grad_offsets[2 * n + axis];
        const A unit = grad * limits[axis];
        grad_reference[axis] += unit;
        if (size == 2) continue;
        // An infinite offset of a sample that contributes nothing must not turn into NaN.
        if (unit != 0) grad_reference[2 + axis] += unit * offsets[2 * n + axis] * scale;
        grad = unit * reference[2 + axis] * scale;
      }
    }
  }
  if (p.grad_reference)
    std::copy(grad_reference, grad_reference + size, static_cast<A*>(p.grad_reference) + query * size);
}

template <class A> struct Maps {
  Scratch<A> value, grad_value;
};

template <class A, int D> void backward(const Problem& p) {
  // One image, head and level of grad_value belongs to one task, which adds in a fixed order: no races, and the same
  // result to the bit for any number of threads. Levels of a head cost nearly as much as all of it, so that heads are
  // split only if there are fewer than threads.
  const int64_t maps = p.images * p.heads, stride = p.heads * p.channels, all = p.levels * p.points;
  const bool split = maps < p.threads, copied = worth_copying(p);
  const std::vector<int64_t> order = order_of_work<A>(p);
  prefer_huge_pages(p.grad_value, p.images * p.pixels * stride * sizeof(A));
  prefer_huge_pages(p.grad_samples, 2 * p.images * p.queries * p.heads * all * sizeof(A));
  prefer_huge_pages(p.grad_weights, p.images * p.queries * p.heads * all * sizeof(A));
  if (!copied) fill_zero(static_cast<A*>(p.grad_value), p.images * p.pixels * stride, p.threads);
  const int64_t parts = split ? p.levels : 1, levels = p.levels / parts;
  parallel<Maps<A>>(maps * parts, p.threads, [&](int64_t task, Maps<A>& copies) {
    const int64_t part = task % parts, image = task / parts / p.heads, head = task / parts % p.heads;
    Samples<A> samples(p, part * levels, (part + 1) * levels);
    samples.set_image(image);
    std::vector<Vec<A>> partial(4 * samples.vectors * WIDTH<A>), dots(4 * samples.vectors);
    const int64_t base = image * p.pixels * stride + head * p.channels;
    const A* value = static_cast<const A*>(p.value) + base;
    A* grad_value = static_cast<A*>(p.grad_value) + base;
    A *map = nullptr, *grad_map = nullptr;
    if (copied) {
      const int64_t size = p.pixels * p.channels;
      map = copies.value.get(size), grad_map = copies.grad_value.get(size);
      copy_map<A, A, D>(p, value, map);
      std::fill_n(grad_map, size, A(0));
    }
    const int64_t first = image * p.queries, end = first + p.queries;
    for (int64_t i = first; i < end; ++i) {
      const int64_t row = order[i] * p.heads + head;
      prefetch_query<A>(p, order[std::min(i + AHEAD, end - 1)] * p.heads + head, true);
      samples.prepare(order[i], row);
      Channels<A, A, D>::scatter(samples, copied ? map : value, copied ? p.channels : stride, p.channels,
                                 static_cast<const A*>(p.grad_output) + row * p.channels,
                                 copied ? grad_map : grad_value, partial.data(), dots.data());
      sample_gradients(p, samples, dots.data(), row);
    }
    if (!copied) return;
    const auto [begin, last] = samples.pixel_range();
    for (int64_t i = begin; i < last; ++i)
      std::copy_n(grad_map + i * p.channels, p.channels, grad_value + i * stride);
  });
  if (!p.fused) return;
  constexpr int64_t block = 64;
  const int64_t blocks = (p.queries + block - 1) / block;
  parallel<Nothing>(p.images * blocks, p.threads, [&](int64_t task, Nothing) {
    const int64_t image = task / blocks, first = task % blocks * block;
    Samples<A> samples(p, 0, p.levels);
    samples.set_image(image);
    for (int64_t q = first; q < std::min(first + block, p.queries); ++q)
      finish_fused(p, samples, image * p.queries + q);
  });
}

template <class T> void forward_float(const Problem& p) {
  switch (p.channels) {
    case 16: return forward<T, float, 16>(p);
    case 32: return forward<T, float, 32>(p);
    case 64: return forward<T, float, 64>(p);
    default: return forward<T, float, 0>(p);
  }
}

void forward(const Problem& p) {
  switch (p.value_type) {
    case 0: return forward_float<float>(p);
    case 1: return forward_float<bf16>(p);
    case 2: return forward_float<fp16>(p);
    default: return forward<double, double, 0>(p);
  }
}

// The value has the accumulation type here.
void backward(const Problem& p) {
  if (p.value_type == 3) return backward<double, 0>(p);
  switch (p.channels) {
    case 16: return backward<float, 16>(p);
    case 32: return backward<float, 32>(p);
    case 64: return backward<float, 64>(p);
    default: return backward<float, 0>(p);
  }
}

}  // namespace

// Whether there was enough memory.
extern "C" {
bool ms_deform_attn_forward(const Problem* problem) try {
  forward(*problem);
  return true;
} catch (const std::bad_alloc&) {
  return false;
}

bool ms_deform_attn_backward(const Problem* problem) try {
  backward(*problem);
  return true;
} catch (const std::bad_alloc&) {
  return false;
}
}
