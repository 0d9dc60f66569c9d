// The adaLN family's forward on the GPU. Formulas: pixart_kernels/adaln/README.md.
#include <type_traits>

#include "device.cuh"

namespace pixart::adaln {
namespace {

// Rows that a thread has under way where 16-bit vectors are loaded: loads in flight, and rows that
// share a barrier. Others go one by one: an fp32 row is as many bytes as two.
#ifndef PIXART_ADALN_FWD_ROWS
#define PIXART_ADALN_FWD_ROWS 2
#endif
constexpr int kMostRows = PIXART_ADALN_FWD_ROWS;

template <class X, bool kVector>
constexpr int kRowsOf = kVector && sizeof(X) == 2 ? kMostRows : 1;

// Rows a block walks at most: composing its modulation reads as much as six bf16 rows.
constexpr int64_t kRowsOfBlock = 64;

struct Args {
  Forward call;
  Work work;
};

template <class X, class A, int kD, bool kVector, bool kResidual, bool kNorm>
__global__ void __launch_bounds__(kD ? threads_for(kD).count() : kMaxThreads, kD ? 2 : 1)
    fwd_kernel(const Args args) {
  // h has x's type if that is 16-bit; a residual in fp32 lets the branch, or t, choose
  using H = std::conditional_t<std::is_same_v<X, float>, A, X>;
  constexpr int kRows = kRowsOf<X, kVector>;
  const Forward& call = args.call;
  const Shape& shape = call.shape;
  const Place<kD> place(shape.D, args.work.threads);
  [[maybe_unused]] const float inverse = place.inverse(args.work.inverse_width);
  const int64_t b = blockIdx.x / args.work.splits, split = blockIdx.x % args.work.splits;
  const int64_t begin = split * args.work.split_rows;
  const int64_t past = begin + args.work.split_rows, end = past < shape.N ? past : shape.N;

  float gate[kColumns], shift[kColumns], scale1[kColumns];
  if constexpr (kResidual) compose(call.gate, call.gate.t ? 0.f : 1.f, b, place, gate);
  if constexpr (kNorm) {
    compose(call.shift, 0.f, b, place, shift);
    compose(call.scale, 1.f, b, place, scale1);
  }
  __shared__ typename RowSums<kRows, kD>::Buffers buffers;
  RowSums<kRows, kD> row_sums(buffers);

  for (int64_t tile = begin; tile < end; tile += int64_t(place.groups) * kRows) {
    const int64_t first = forget_pointers(tile + place.group);
    Stored<X> x[kRows];
    [[maybe_unused]] Stored<A> branch[kRows];
    int count[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int64_t n = first + r * place.groups;
      count[r] = n < end ? place.count : 0;
      x[r] = load<kVector>(at<X>(call.x, b, n, place.column), count[r]);
      if constexpr (kResidual) {
        branch[r] = load<kVector>(at<A>(call.branch, b, n, place.column), count[r]);
      }
    }
    if constexpr (kResidual) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
#pragma unroll
        for (int i = 0; i < kColumns; ++i) {
          const float sum = widen(x[r].value[i]) + gate[i] * widen(branch[r].value[i]);
          narrow(sum, x[r].value[i]);
        }
        const int64_t n = first + r * place.groups;
        store<kVector>(at<X>(call.x_new, shape, b, n, place.column), x[r], count[r]);
      }
    }
    if constexpr (kNorm) {
      // what is normalised is x_new as it was stored: the backward reads it again
      float mean[kRows], squares[kRows];
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        mean[r] = 0.f;
#pragma unroll
        for (int i = 0; i < kColumns; ++i) mean[r] += widen(x[r].value[i]);
      }
      row_sums(mean, place);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        forget_widened(x[r]);
        mean[r] *= inverse;
        squares[r] = 0.f;
#pragma unroll
        for (int i = 0; i < kColumns; ++i) {
          const float centred = widen(x[r].value[i]) - mean[r];
          if (place.has(i)) squares[r] += centred * centred;
        }
      }
      row_sums(squares, place);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        forget_widened(x[r]);
        const int64_t n = first + r * place.groups;
        const float rstd = rsqrtf(squares[r] * inverse + call.eps);
        Stored<H> h;
#pragma unroll
        for (int i = 0; i < kColumns; ++i) {
          const float normalised = (widen(x[r].value[i]) - mean[r]) * rstd;
          narrow(normalised * scale1[i] + shift[i], h.value[i]);
        }
        store<kVector>(at<H>(call.h, shape, b, n, place.column), h, count[r]);
        if (place.column == 0 && n < end) {
          const int64_t row = b * shape.N + n;
          call.stats[row] = mean[r];
          call.stats[shape.B * shape.N + row] = rstd;
        }
      }
    }
  }
}

template <class X, class A, bool kResidual, bool kNorm>
void launch_forward(const Args& args, bool vector, void* stream) {
  const int64_t blocks = args.call.shape.B * int64_t(args.work.splits);
  const int threads = args.work.threads.count();
  constexpr const char* kName = "the adaLN forward";
  if constexpr (kCommon<X, A>) {
    // a plain residual needs no sums, so nothing is gained from knowing D
    if constexpr (kNorm) {
      if (vector && args.call.shape.D == kXL) {
        return launch<fwd_kernel<X, A, kXL, true, kResidual, kNorm>, threads_for(kXL).count()>(
            kName, blocks, threads, stream, args);
      }
    }
    if (vector) {
      return launch<fwd_kernel<X, A, 0, true, kResidual, kNorm>, kMaxThreads>(
          kName, blocks, threads, stream, args);
    }
  }
  launch<fwd_kernel<X, A, 0, false, kResidual, kNorm>, kMaxThreads>(kName, blocks, threads, stream,
                                                                    args);
}

void forward(const Forward& call, void* stream) {
  const Shape& shape = call.shape;
  // empty tensors have no address, by which what is present is told from what is absent
  if (shape.B == 0 || shape.N == 0 || shape.D == 0) return;
  // short sequences: at least two blocks for each multiprocessor, if rows last
  const int64_t by_rows = shape.B * ((shape.N + kRowsOfBlock - 1) / kRowsOfBlock);
  const int64_t by_device = 2 * multiprocessors();
  const Args args{call, cut(shape, by_rows > by_device ? by_rows : by_device, kMostRows)};
  const bool residual = call.branch.data != nullptr || call.x_new.data != nullptr;
  const bool vector =
      shape.D % kColumns == 0 && aligned(call.x) && (!residual || aligned(call.branch));
  visit(call.x.dtype, [&](auto x_tag) {
    using X = typename decltype(x_tag)::type;
    visit(residual ? call.branch.dtype : call.h.dtype, [&](auto a_tag) {
      using A = typename decltype(a_tag)::type;
      if (!residual) {
        if constexpr (kCommon<X, A>) launch_forward<X, A, false, true>(args, vector, stream);
      } else if (call.scale) {
        launch_forward<X, A, true, true>(args, vector, stream);
      } else {
        launch_forward<X, A, true, false>(args, vector, stream);
      }
    });
  });
}

}  // namespace

// defined with the backward
void backward_cuda(const Backward& call, void* stream);
void fold_cuda(const Fold& call, void* stream);
int64_t chunks_cuda(const Shape& shape);

const Kernels kCuda = {chunks_cuda, forward, backward_cuda, fold_cuda};

}  // namespace pixart::adaln
