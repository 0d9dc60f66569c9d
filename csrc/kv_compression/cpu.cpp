// compress_kv on the CPU. Formulas: pixart_kernels/kv_compression/README.md.
//
// k and v of a window are taken together: they share the weights, and the sums of their gradients,
// which together are larger than the first-level cache.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "../include/vec.h"
#include "kv_compression.h"

namespace pixart::kv_compression {
namespace {

// Fewer elements than this are not worth waking another thread for.
constexpr int64_t kElementsPerThread = 32768;

// Windows are cut by shape alone, so that no result depends on the number of threads. 32 of them
// amortise a chunk's sums; 64 chunks feed the largest machines.
int64_t chunk_windows(const Shape& shape) {
  return std::max<int64_t>(32, (shape.windows() + 63) / 64);
}

// Calls body(chunk, first window, last window) for each chunk, chunks shared among torch's threads.
template <class Body>
void for_chunks(const Shape& shape, Body body) {
  const int64_t rows = chunk_windows(shape), windows = shape.windows();
  const int64_t elements = std::min(rows, windows) * 2 * shape.taps() * shape.D;
  const int64_t grain = kElementsPerThread / std::max<int64_t>(1, elements) + 1;
  torch::stable::parallel_for(0, chunks_of(shape), grain, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      body(chunk, chunk * rows, std::min((chunk + 1) * rows, windows));
    }
  });
}

// The parameters in fp32, a tap of the weight after the other, zero to the end of the last vector.
struct Widened {
  int64_t stride, taps;
  std::vector<float> data;  // [taps + 3, stride]

  Widened(const Shape& shape, const Parameters& given)
      : stride(partial_stride(shape)), taps(shape.taps()), data((taps + 3) * stride) {
    std::vector<float> weight(padded_to_lanes(shape.D * taps));
    widen_into(given.weight, shape.D * taps, weight.data());
    for (int64_t d = 0; d < shape.D; ++d) {
      for (int64_t tap = 0; tap < taps; ++tap) data[tap * stride + d] = weight[d * taps + tap];
    }
    const Vector* vectors[] = {&given.bias, &given.norm_weight, &given.norm_bias};
    for (int64_t i = 0; i < 3; ++i) widen_into(*vectors[i], shape.D, &data[(taps + i) * stride]);
  }

  static void widen_into(const Vector& vector, int64_t length, float* out) {
    visit(vector.dtype, [&](auto tag) {
      const auto* in = static_cast<const typename decltype(tag)::type*>(vector.data);
      for_lanes(length, [&](int64_t d, auto lanes, auto) __attribute__((always_inline)) {
        store(out + d, load(in + d, lanes), All{});
      });
    });
  }

  const float* weight(int64_t tap) const { return &data[tap * stride]; }
  const float* bias() const { return &data[taps * stride]; }
  const float* norm_weight() const { return &data[(taps + 1) * stride]; }
  const float* norm_bias() const { return &data[(taps + 2) * stride]; }
};

// Where k of each token of a window lies.
template <class T>
struct Window {
  const Shape& shape;
  std::vector<T*> tap;

  explicit Window(const Shape& shape) : shape(shape), tap(shape.taps()) {}

  void move_to(int64_t window, T* tokens, int64_t batch_stride, int64_t token_stride) {
    const int64_t b = window / shape.each(), n = window % shape.each(), R = shape.R;
    const int64_t row = n / shape.columns() * R, column = n % shape.columns() * R;
    for (int64_t i = 0; i < shape.taps(); ++i) {
      const int64_t token = (row + i / R) * shape.width + column + i % R;
      tap[i] = tokens + b * batch_stride + token * token_stride;
    }
  }
};

// kTaps is the number of taps, or 0 where it is not known to the compiler.
template <class T, int kTaps>
struct Rows {
  const Shape& shape;
  const PairsIn& kv;
  const Widened& parameters;
  Window<const T> window;

  int64_t taps() const { return kTaps ? kTaps : shape.taps(); }

  void move_to(int64_t index) {
    const T* tokens = static_cast<const T*>(kv.data);
    window.move_to(index, tokens, kv.batch_stride, kv.token_stride);
  }

  // The convolution of k and of v in eight columns; zero past D.
  template <class Lanes, class Slot>
  PIXART_INLINE void convolve(int64_t d, Lanes lanes, Slot slot, F32x8& k, F32x8& v) const {
    k = v = load(parameters.bias() + d, All{});
    for (int64_t i = 0; i < taps(); ++i) {
      const T* tap = window.tap[i] + d;
      // of the next window
      prefetch(tap, shape.R * kv.token_stride, slot);
      prefetch(tap, shape.R * kv.token_stride + kv.pair_stride, slot);
      const F32x8 weight = load(parameters.weight(i) + d, All{});
      k += weight * load(tap, lanes);
      v += weight * load(tap + kv.pair_stride, lanes);
    }
  }
};

template <class T, int kTaps>
void forward_windows(const Forward& call, const Widened& parameters, int64_t begin, int64_t end) {
  const Shape& shape = call.shape;
  const int64_t D = shape.D, stride = partial_stride(shape);
  Rows<T, kTaps> rows{shape, call.kv, parameters, Window<const T>(shape)};
  std::vector<float> pair(2 * stride);
  const float *norm_weight = parameters.norm_weight(), *norm_bias = parameters.norm_bias();
  for (int64_t index = begin; index < end; ++index) {
    rows.move_to(index);
    Sum sums[2];
    float* convolved = pair.data();
    for_lanes(D, [&](int64_t d, auto lanes, auto slot) __attribute__((always_inline)) {
      F32x8 k, v;
      rows.convolve(d, lanes, slot, k, v);
      store(convolved + d, k, All{});
      store(convolved + stride + d, v, All{});
      sums[0].slot[slot] += k;
      sums[1].slot[slot] += v;
    });
    for (int64_t s = 0; s < 2; ++s) {
      const float* row = convolved + s * stride;
      const float mean = sums[s].total() / D;
      Sum squares;
      for_lanes(D, [&](int64_t d, auto lanes, auto slot) __attribute__((always_inline)) {
        const F32x8 centred = keep(load(row + d, All{}) - mean, lanes);
        squares.slot[slot] += centred * centred;
      });
      const float rstd = 1.f / std::sqrt(squares.total() / D + call.eps);
      const int64_t i = 2 * index + s;
      T* out = static_cast<T*>(call.out) + i * D;
      for_lanes(D, [&](int64_t d, auto lanes, auto) __attribute__((always_inline)) {
        const F32x8 normalised = (load(row + d, All{}) - mean) * rstd;
        const F32x8 scaled = normalised * load(norm_weight + d, All{});
        store(out + d, scaled + load(norm_bias + d, All{}), lanes);
      });
      call.stats[i] = mean;
      call.stats[2 * shape.windows() + i] = rstd;
    }
  }
}

template <class T, int kTaps>
void backward_windows(const Backward& call, const Widened& parameters, int64_t chunk, int64_t begin,
                      int64_t end) {
  const Shape& shape = call.shape;
  const int64_t D = shape.D, stride = partial_stride(shape), rows_of_stats = 2 * shape.windows();
  Rows<T, kTaps> rows{shape, call.kv, parameters, Window<const T>(shape)};
  const int64_t taps = rows.taps();
  Window<T> dwindow(shape);
  std::vector<float> pair(2 * stride);
  float* const dweight = call.partial + chunk * (taps + 3) * stride;
  float *dbias = dweight + taps * stride, *dnorm_weight = dbias + stride,
        *dnorm_bias = dnorm_weight + stride;
  std::fill_n(dweight, (taps + 3) * stride, 0.f);
  const float* norm_weight = parameters.norm_weight();
  for (int64_t index = begin; index < end; ++index) {
    rows.move_to(index);
    dwindow.move_to(index, static_cast<T*>(call.dkv), shape.height * shape.width * 2 * D, 2 * D);
    const int64_t b = index / shape.each(), n = index % shape.each();
    const T* dout_k = static_cast<const T*>(call.dout.data) + b * call.dout.batch_stride +
                      n * call.dout.token_stride;
    const T* dout_v = dout_k + call.dout.pair_stride;
    const float *mean = call.stats + 2 * index, *rstd = mean + rows_of_stats;
    float *normed_k = pair.data(), *normed_v = normed_k + stride;
    // of u = dout * norm_weight, and of its product with the normalised row
    Sum sum_k, sum_v, sum_kx, sum_vx;
    for_lanes(D, [&](int64_t d, auto lanes, auto slot) __attribute__((always_inline)) {
      F32x8 k, v;
      rows.convolve(d, lanes, slot, k, v);
      k = (k - mean[0]) * rstd[0];
      v = (v - mean[1]) * rstd[1];
      store(normed_k + d, k, All{});
      store(normed_v + d, v, All{});
      const F32x8 grad_k = load(dout_k + d, lanes), grad_v = load(dout_v + d, lanes);
      const F32x8 product_k = grad_k * k, product_v = grad_v * v;
      const F32x8 scale = load(norm_weight + d, All{});
      store(dnorm_weight + d, load(dnorm_weight + d, All{}) + (product_k + product_v), All{});
      store(dnorm_bias + d, load(dnorm_bias + d, All{}) + (grad_k + grad_v), All{});
      sum_k.slot[slot] += grad_k * scale;
      sum_v.slot[slot] += grad_v * scale;
      sum_kx.slot[slot] += product_k * scale;
      sum_vx.slot[slot] += product_v * scale;
    });
    const float mean_k = sum_k.total() / D, mean_kx = sum_kx.total() / D;
    const float mean_v = sum_v.total() / D, mean_vx = sum_vx.total() / D;
    for_lanes(D, [&](int64_t d, auto lanes, auto) __attribute__((always_inline)) {
      const F32x8 scale = load(norm_weight + d, All{});
      const F32x8 u_k = load(dout_k + d, lanes) * scale, u_v = load(dout_v + d, lanes) * scale;
      const F32x8 dk = rstd[0] * (u_k - mean_k - load(normed_k + d, All{}) * mean_kx);
      const F32x8 dv = rstd[1] * (u_v - mean_v - load(normed_v + d, All{}) * mean_vx);
      store(dbias + d, load(dbias + d, All{}) + (dk + dv), All{});
      for (int64_t i = 0; i < taps; ++i) {
        const T* tap = rows.window.tap[i] + d;
        const F32x8 product = dk * load(tap, lanes) + dv * load(tap + call.kv.pair_stride, lanes);
        float* sum = dweight + i * stride + d;
        store(sum, load(sum, All{}) + product, All{});
        const F32x8 weight = load(parameters.weight(i) + d, All{});
        store(dwindow.tap[i] + d, dk * weight, lanes);
        store(dwindow.tap[i] + D + d, dv * weight, lanes);
      }
    });
  }
}

// Calls body(Type<T>{}, taps) with the type of kv and the number of taps, if it is the usual one.
template <class Body>
void specialised(DType dtype, const Shape& shape, Body body) {
  visit(dtype, [&](auto tag) {
    if (shape.R == 2) {
      body(tag, std::integral_constant<int, 4>{});
    } else {
      body(tag, std::integral_constant<int, 0>{});
    }
  });
}

}  // namespace

int64_t chunks_of(const Shape& shape) {
  return (shape.windows() + chunk_windows(shape) - 1) / chunk_windows(shape);
}

void forward(const Forward& call) {
  const Widened parameters(call.shape, call.parameters);
  specialised(call.dtype, call.shape, [&](auto tag, auto taps) {
    for_chunks(call.shape, [&](int64_t, int64_t begin, int64_t end) {
      forward_windows<typename decltype(tag)::type, taps>(call, parameters, begin, end);
    });
  });
}

void backward(const Backward& call) {
  const Widened parameters(call.shape, call.parameters);
  specialised(call.dtype, call.shape, [&](auto tag, auto taps) {
    for_chunks(call.shape, [&](int64_t chunk, int64_t begin, int64_t end) {
      backward_windows<typename decltype(tag)::type, taps>(call, parameters, chunk, begin, end);
    });
  });
}

void fold(const Fold& call) {
  const int64_t D = call.shape.D, taps = call.shape.taps(), stride = partial_stride(call.shape);
  const auto write = [](const VectorOut& out, int64_t offset, const float* sums, int64_t length) {
    visit(out.dtype, [&](auto tag) {
      auto* to = static_cast<typename decltype(tag)::type*>(out.data) + offset;
      for_lanes(length, [&](int64_t i, auto lanes, auto) __attribute__((always_inline)) {
        store(to + i, load(sums + i, All{}), lanes);
      });
    });
  };
  const VectorOut* vectors[] = {&call.dbias, &call.dnorm_weight, &call.dnorm_bias};
  const int64_t work = (call.chunks + 1) * (taps + 3) * kLanes;
  torch::stable::parallel_for(
      0, stride / kLanes, kElementsPerThread / work + 1, [&](int64_t begin, int64_t end) {
        std::vector<float> by_column(taps * kLanes);
        for (int64_t block = begin; block < end; ++block) {
          const int64_t first = block * kLanes, length = std::min<int64_t>(kLanes, D - first);
          for (int64_t vector = 0; vector < taps + 3; ++vector) {
            F32x8 sum = {};
            for (int64_t chunk = 0; chunk < call.chunks; ++chunk) {
              const int64_t slice = chunk * (taps + 3) + vector;
              sum += load(call.partial + slice * stride + first, All{});
            }
            float sums[kLanes];
            store(sums, sum, All{});
            if (vector >= taps) write(*vectors[vector - taps], first, sums, length);
            for (int64_t i = 0; vector < taps && i < kLanes; ++i) {
              by_column[i * taps + vector] = sums[i];
            }
          }
          write(call.dweight, first * taps, by_column.data(), length * taps);
        }
      });
}

}  // namespace pixart::kv_compression
