// The adaLN family on the CPU. Formulas: pixart_kernels/adaln/README.md.
//
// A row is walked two or three times while it sits in the first-level cache, so what is paid for
// is each tensor's one trip through memory. The first walk over a row asks for the next one: the
// hardware's own prefetching does not follow four streams (fp32 backward: 1.2 to 1.4 times as
// fast).
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "../include/vec.h"
#include "adaln.h"

namespace pixart::adaln {
namespace {

// Fewer elements than this are not worth waking another thread for.
constexpr int64_t kElementsPerThread = 32768;

template <class T>
const T* row_of(const TokensIn& tokens, int64_t b, int64_t n) {
  return static_cast<const T*>(tokens.data) + b * tokens.batch_stride + n * tokens.row_stride;
}

template <class T>
T* row_of(const TokensOut& tokens, const Shape& shape, int64_t b, int64_t n) {
  return static_cast<T*>(tokens.data) + (b * shape.N + n) * shape.D;
}

void add_vector(DType dtype, const void* data, int64_t offset, int64_t D, float* out) {
  visit(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const T* in = static_cast<const T*>(data) + offset;
    for_lanes(D, [&](int64_t d, auto lanes, auto) __attribute__((always_inline)) {
      store(out + d, load(out + d, All{}) + load(in + d, lanes), All{});
    });
  });
}

// out[d] = plus + (table[d] + t[b, d]); the lanes past D are left at `plus`.
void compose(const Row& row, float plus, int64_t b, int64_t D, float* out) {
  std::fill_n(out, padded_to_lanes(D), 0.f);
  if (row.table != nullptr) add_vector(row.table_dtype, row.table, 0, D, out);
  if (row) add_vector(row.t_dtype, row.t, b * row.t_stride, D, out);
  for (int64_t d = 0; d < padded_to_lanes(D); ++d) out[d] += plus;
}

// Rows are cut by shape alone, so that no result depends on the number of threads. 64 rows
// amortise composing the modulation; 64 chunks a sample feed the largest machines.
int64_t chunk_rows(const Shape& shape) {
  return shape.N > 64 * 64 ? (shape.N + 63) / 64 : 64;
}

int64_t chunks_of(const Shape& shape) {
  return (shape.N + chunk_rows(shape) - 1) / chunk_rows(shape);
}

// Calls body(b, chunk, first row, last row) for each chunk, chunks shared among torch's threads;
// make_body() makes each thread's own body, with its scratch.
template <class MakeBody>
void for_chunks(const Shape& shape, MakeBody make_body) {
  const int64_t chunks = chunks_of(shape), rows = chunk_rows(shape);
  if (shape.B == 0 || chunks == 0 || shape.D == 0) return;
  const int64_t elements = std::min(rows, shape.N) * shape.D;
  const int64_t grain = std::max<int64_t>(1, kElementsPerThread / elements);
  torch::stable::parallel_for(0, shape.B * chunks, grain, [&](int64_t begin, int64_t end) {
    auto body = make_body();
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i % chunks * rows;
      body(i / chunks, i % chunks, first, std::min(first + rows, shape.N));
    }
  });
}

template <class X, class Branch, class H, bool kResidual, bool kNorm>
struct ForwardRows {
  // a 16-bit row is widened once, into scratch; an fp32 row is read again where it lies
  static constexpr bool kKeeps = kNorm && !std::is_same_v<X, float>;

  const Forward& call;
  std::vector<float> gate, shift, scale1, row;

  explicit ForwardRows(const Forward& call)
      : call(call), gate(padded()), shift(padded()), scale1(padded()), row(padded()) {}

  int64_t padded() const { return padded_to_lanes(call.shape.D); }

  void operator()(int64_t b, int64_t, int64_t begin, int64_t end) {
    const int64_t D = call.shape.D;
    if constexpr (kResidual) compose(call.gate, call.gate ? 0.f : 1.f, b, D, gate.data());
    if constexpr (kNorm) {
      compose(call.shift, 0.f, b, D, shift.data());
      compose(call.scale, 1.f, b, D, scale1.data());
    }
    for (int64_t n = begin; n < end; ++n) one(b, n);
  }

  void one(int64_t b, int64_t n) {
    const int64_t D = call.shape.D;
    const X* x = row_of<X>(call.x, b, n);
    float* __restrict__ kept = row.data();
    Sum sum;
    if constexpr (kResidual) {
      const Branch* branch = row_of<Branch>(call.branch, b, n);
      const float* g = gate.data();
      X* x_new = row_of<X>(call.x_new, call.shape, b, n);
      for_lanes(D, [&](int64_t d, auto lanes, auto slot) __attribute__((always_inline)) {
        prefetch(x + d, call.x.row_stride, slot);
        prefetch(branch + d, call.branch.row_stride, slot);
        const F32x8 v = load(x + d, lanes) + load(g + d, All{}) * load(branch + d, lanes);
        store(x_new + d, v, lanes);
        if constexpr (kNorm) {
          const F32x8 stored = rounded_to<X>(v);
          if constexpr (kKeeps) store(kept + d, stored, All{});
          sum.slot[slot] += stored;
        }
      });
    } else {
      for_lanes(D, [&](int64_t d, auto lanes, auto slot) __attribute__((always_inline)) {
        prefetch(x + d, call.x.row_stride, slot);
        const F32x8 v = load(x + d, lanes);
        if constexpr (kKeeps) store(kept + d, v, All{});
        sum.slot[slot] += v;
      });
    }
    if constexpr (kNorm) {
      const float* normed = kept;
      if constexpr (!kKeeps) normed = kResidual ? row_of<X>(call.x_new, call.shape, b, n) : x;
      const float mean = sum.total() / D;
      Sum squares;
      for_lanes(D, [&](int64_t d, auto lanes, auto slot) __attribute__((always_inline)) {
        const F32x8 centred = keep(load(normed + d, lanes) - mean, lanes);
        squares.slot[slot] += centred * centred;
      });
      const float rstd = 1.f / std::sqrt(squares.total() / D + call.eps);
      H* h = row_of<H>(call.h, call.shape, b, n);
      const float *s = shift.data(), *s1 = scale1.data();
      for_lanes(D, [&](int64_t d, auto lanes, auto) __attribute__((always_inline)) {
        const F32x8 normalised = (load(normed + d, lanes) - mean) * rstd;
        store(h + d, normalised * load(s1 + d, All{}) + load(s + d, All{}), lanes);
      });
      const int64_t i = b * call.shape.N + n, rows = call.shape.B * call.shape.N;
      call.stats[i] = mean;
      call.stats[rows + i] = rstd;
    }
  }
};

template <class X, class Branch, class H, bool kGate, bool kNorm>
struct BackwardRows {
  // a plain residual in one dtype has dbranch = dx, so only dx is written
  static constexpr bool kBranchOut = kGate || !std::is_same_v<X, Branch>;
  static constexpr int64_t kVectors = 2 * kNorm + kGate;

  const Backward& call;
  std::vector<float> gate, scale1;
  std::vector<X> zeros;

  explicit BackwardRows(const Backward& call)
      : call(call), gate(padded()), scale1(padded()), zeros(padded()) {}

  int64_t padded() const { return padded_to_lanes(call.shape.D); }

  void operator()(int64_t b, int64_t chunk, int64_t begin, int64_t end) {
    const int64_t D = call.shape.D;
    float* sums = call.partial + (b * call.chunks + chunk) * kVectors * padded();
    std::fill_n(sums, kVectors * padded(), 0.f);
    if constexpr (kGate) compose(call.gate, 0.f, b, D, gate.data());
    if constexpr (kNorm) compose(call.scale, 1.f, b, D, scale1.data());
    for (int64_t n = begin; n < end; ++n) one(b, n, sums);
  }

  void one(int64_t b, int64_t n, float* __restrict__ sums) {
    const int64_t D = call.shape.D;
    const X* dx_new = call.dx_new.data ? row_of<X>(call.dx_new, b, n) : zeros.data();
    const X* x = nullptr;
    const H* dh = nullptr;
    F32x8 mean = {}, rstd = {}, c1 = {}, c2 = {};
    if constexpr (kNorm) {
      const int64_t i = b * call.shape.N + n, rows = call.shape.B * call.shape.N;
      mean = splat(call.stats[i]);
      rstd = splat(call.stats[rows + i]);
      x = row_of<X>(call.x, b, n);
      dh = row_of<H>(call.dh, b, n);
      float* dshift = sums;
      float* dscale = sums + padded();
      Sum sum_g, sum_gx;
      for_lanes(D, [&](int64_t d, auto lanes, auto slot) __attribute__((always_inline)) {
        prefetch(dh + d, call.dh.row_stride, slot);
        prefetch(x + d, call.x.row_stride, slot);
        const F32x8 grad = load(dh + d, lanes);
        const F32x8 normalised = (load(x + d, lanes) - mean) * rstd;
        const F32x8 product = grad * normalised;
        const F32x8 s1 = load(scale1.data() + d, All{});
        store(dshift + d, load(dshift + d, All{}) + grad, All{});
        store(dscale + d, load(dscale + d, All{}) + product, All{});
        sum_g.slot[slot] += grad * s1;
        sum_gx.slot[slot] += product * s1;
      });
      c1 = splat(sum_g.total() / D);
      c2 = splat(sum_gx.total() / D);
    }
    X* dx = kNorm ? row_of<X>(call.dx, call.shape, b, n) : nullptr;
    const Branch* branch = kGate ? row_of<Branch>(call.branch, b, n) : nullptr;
    Branch* dbranch = kBranchOut ? row_of<Branch>(call.dbranch, call.shape, b, n) : nullptr;
    float* dgate = sums + 2 * kNorm * padded();
    for_lanes(D, [&](int64_t d, auto lanes, auto slot) __attribute__((always_inline)) {
      prefetch(dx_new + d, call.dx_new.row_stride, slot);
      if constexpr (kGate) prefetch(branch + d, call.branch.row_stride, slot);
      F32x8 grad = load(dx_new + d, lanes);
      if constexpr (kNorm) {
        const F32x8 normalised = (load(x + d, lanes) - mean) * rstd;
        const F32x8 g = load(dh + d, lanes) * load(scale1.data() + d, All{});
        grad += rstd * (g - c1 - normalised * c2);
        store(dx + d, grad, lanes);
      }
      if constexpr (kGate) {
        store(dgate + d, load(dgate + d, All{}) + grad * load(branch + d, lanes), All{});
        store(dbranch + d, grad * load(gate.data() + d, All{}), lanes);
      } else if constexpr (kBranchOut) {
        store(dbranch + d, grad, lanes);
      }
    });
  }
};

template <class Rows, class Call>
void run(const Call& call) {
  for_chunks(call.shape, [&] { return Rows(call); });
}

// h has x's dtype if that is 16-bit; a residual in fp32 lets the branch (or t) choose.
void forward(const Forward& call, void*) {
  const bool norm = bool(call.scale);
  visit(call.x.dtype, [&](auto x_tag) {
    using X = typename decltype(x_tag)::type;
    if (call.branch.data == nullptr) {
      visit(call.h.dtype, [&](auto h_tag) {
        using H = typename decltype(h_tag)::type;
        if constexpr (std::is_same_v<X, float> || std::is_same_v<X, H>) {
          run<ForwardRows<X, float, H, false, true>>(call);
        }
      });
      return;
    }
    visit(call.branch.dtype, [&](auto branch_tag) {
      using Branch = typename decltype(branch_tag)::type;
      using H = std::conditional_t<std::is_same_v<X, float>, Branch, X>;
      if (norm) {
        run<ForwardRows<X, Branch, H, true, true>>(call);
      } else {
        run<ForwardRows<X, Branch, H, true, false>>(call);
      }
    });
  });
}

void backward(const Backward& call, void*) {
  const bool norm = bool(call.scale), gated = bool(call.gate);
  const DType x_dtype = norm ? call.dx.dtype : call.dx_new.dtype;
  visit(x_dtype, [&](auto x_tag) {
    using X = typename decltype(x_tag)::type;
    if (call.dbranch.data == nullptr && !gated) {
      visit(call.dh.dtype, [&](auto h_tag) {
        using H = typename decltype(h_tag)::type;
        if constexpr (std::is_same_v<X, float> || std::is_same_v<X, H>) {
          run<BackwardRows<X, X, H, false, true>>(call);
        }
      });
      return;
    }
    visit(call.dbranch.dtype, [&](auto branch_tag) {
      using Branch = typename decltype(branch_tag)::type;
      using H = std::conditional_t<std::is_same_v<X, float>, Branch, X>;
      if (norm && gated) {
        run<BackwardRows<X, Branch, H, true, true>>(call);
      } else if (norm) {
        run<BackwardRows<X, Branch, H, false, true>>(call);
      } else {
        run<BackwardRows<X, Branch, H, true, false>>(call);
      }
    });
  });
}

void fold(const Fold& call, void*) {
  constexpr int64_t kColumns = 64;
  const auto [B, N, D] = call.shape;
  const int64_t R = call.table_rows, chunks = call.chunks;
  const int64_t stride = partial_stride(call.shape);
  const int64_t blocks = (D + kColumns - 1) / kColumns;
  const int64_t work = std::max<int64_t>(1, B * (chunks * call.used + R) * kColumns);
  const int64_t grain = std::max<int64_t>(1, kElementsPerThread / work);
  const auto write = [](DType dtype, void* data, int64_t offset, const float* values, int64_t n) {
    visit(dtype, [&](auto tag) {
      using T = typename decltype(tag)::type;
      T* out = static_cast<T*>(data) + offset;
      for_lanes(n, [&](int64_t d, auto lanes, auto) __attribute__((always_inline)) {
        store(out + d, load(values + d, All{}), lanes);
      });
    });
  };
  torch::stable::parallel_for(0, blocks, grain, [&, B = B, D = D](int64_t first, int64_t last) {
    for (int64_t block = first; block < last; ++block) {
      const int64_t begin = block * kColumns, n = std::min(kColumns, D - begin);
      for (int64_t r = 0; r < R; ++r) {
        float over_batch[kColumns] = {};
        for (int64_t b = 0; b < B; ++b) {
          float over_chunks[kColumns] = {};
          for (int u = 0; u < call.used; ++u) {
            if (call.uses[u].row != r) continue;
            for (int64_t c = 0; c < chunks; ++c) {
              const int64_t slice = (b * chunks + c) * call.vectors + call.uses[u].vector;
              const float* in = call.partial + slice * stride + begin;
              for (int64_t d = 0; d < n; ++d) over_chunks[d] += in[d];
            }
          }
          for (int64_t d = 0; d < n; ++d) over_batch[d] += over_chunks[d];
          write(call.dt_dtype, call.dt, (b * R + r) * D + begin, over_chunks, n);
        }
        if (call.dtable) write(call.dtable_dtype, call.dtable, r * D + begin, over_batch, n);
      }
    }
  });
}

}  // namespace

const Kernels kCpu = {chunks_of, forward, backward, fold};

}  // namespace pixart::adaln
