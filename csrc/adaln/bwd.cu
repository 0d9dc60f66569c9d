// The adaLN family's backward on the GPU. Derivation: pixart_kernels/adaln/README.md.
#include <type_traits>

#include "device.cuh"

namespace pixart::adaln {
namespace {

// Rows that a thread has under way where 16-bit vectors are loaded; one otherwise. Sums of
// modulation gradients take 16 to 24 registers besides.
#ifndef PIXART_ADALN_BWD_ROWS
#define PIXART_ADALN_BWD_ROWS 1
#endif
constexpr int kMostRows = PIXART_ADALN_BWD_ROWS;

template <class X, bool kVector>
constexpr int kRowsOf = kVector && sizeof(X) == 2 ? kMostRows : 1;

// Blocks for each multiprocessor: what fits at once, so that each block starts and ends but once.
constexpr int64_t kBlocks = 2;

struct Args {
  Backward call;
  Work work;
};

// kBranch: there is a dbranch to write. Without a gate dbranch is dx in the branch's type.
template <class X, class A, int kD, bool kVector, bool kBranch, bool kNorm>
__global__ void __launch_bounds__(kD ? threads_for(kD).count() : kMaxThreads, kD ? kBlocks : 1)
    bwd_kernel(const Args args) {
  using H = std::conditional_t<std::is_same_v<X, float>, A, X>;
  constexpr int kRows = kRowsOf<X, kVector>;
  const Backward& call = args.call;
  const Shape& shape = call.shape;
  const Place<kD> place(shape.D, args.work.threads);
  [[maybe_unused]] const float inverse = place.inverse(args.work.inverse_width);
  const int64_t b = blockIdx.x / args.work.splits, split = blockIdx.x % args.work.splits;
  const int64_t begin = split * args.work.split_rows;
  const int64_t past = begin + args.work.split_rows, end = past < shape.N ? past : shape.N;
  const int64_t samples_rows = shape.B * shape.N;

  // beside three vectors of sums there are no registers for gate and scale as well: each thread
  // keeps its own in shared memory
  constexpr bool kCrowded = kBranch && kNorm;
  constexpr int kThreads = kD ? threads_for(kD).count() : kMaxThreads;
  __shared__ float shared[2][kCrowded ? kColumns : 1][kThreads];
  float gate[kColumns] = {}, scale1[kColumns] = {};
  if constexpr (kBranch) compose(call.gate, call.gate.t ? 0.f : 1.f, b, place, gate);
  if constexpr (kNorm) compose(call.scale, 1.f, b, place, scale1);
  if constexpr (kCrowded) {
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      shared[0][i][threadIdx.x] = gate[i];
      shared[1][i][threadIdx.x] = scale1[i];
    }
  }
  const auto gate_of = [&](int i) { return kCrowded ? shared[0][i][threadIdx.x] : gate[i]; };
  const auto scale1_of = [&](int i) { return kCrowded ? shared[1][i][threadIdx.x] : scale1[i]; };
  float dshift[kColumns] = {}, dscale[kColumns] = {}, dgate[kColumns] = {};
  __shared__ typename RowSums<2 * kRows, kD>::Buffers buffers;
  RowSums<2 * kRows, kD> row_sums(buffers);

  for (int64_t tile = begin; tile < end; tile += int64_t(place.groups) * kRows) {
    const int64_t first = forget_pointers(tile + place.group);
    Stored<X> dx_new[kRows];
    [[maybe_unused]] Stored<X> x[kRows];
    [[maybe_unused]] Stored<H> dh[kRows];
    [[maybe_unused]] Stored<A> branch[kRows];
    [[maybe_unused]] float mean[kRows], rstd[kRows], sums[2 * kRows];
    int count[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int64_t n = first + r * place.groups;
      count[r] = n < end ? place.count : 0;
      if constexpr (kNorm) {
        x[r] = load<kVector>(at<X>(call.x, b, n, place.column), count[r]);
        dh[r] = load<kVector>(at<H>(call.dh, b, n, place.column), count[r]);
        mean[r] = n < end ? call.stats[b * shape.N + n] : 0.f;
        rstd[r] = n < end ? call.stats[samples_rows + b * shape.N + n] : 0.f;
      }
      dx_new[r] = zeros<X>();
      if (call.dx_new.data != nullptr) {
        dx_new[r] = load<kVector>(at<X>(call.dx_new, b, n, place.column), count[r]);
      }
      if constexpr (kBranch) {
        branch[r] = zeros<A>();
        if (call.branch.data != nullptr) {
          branch[r] = load<kVector>(at<A>(call.branch, b, n, place.column), count[r]);
        }
      }
    }
    if constexpr (kNorm) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        sums[2 * r] = sums[2 * r + 1] = 0.f;
#pragma unroll
        for (int i = 0; i < kColumns; ++i) {
          const float grad = widen(dh[r].value[i]);
          const float normalised = (widen(x[r].value[i]) - mean[r]) * rstd[r];
          const float product = grad * normalised;
          dshift[i] += grad;
          dscale[i] += product;
          sums[2 * r] += grad * scale1_of(i);
          sums[2 * r + 1] += product * scale1_of(i);
        }
      }
      row_sums(sums, place);
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if constexpr (kNorm) {
        forget_widened(x[r]);
        forget_widened(dh[r]);
      }
      const int64_t n = first + r * place.groups;
      Stored<X> dx;
      [[maybe_unused]] Stored<A> dbranch;
#pragma unroll
      for (int i = 0; i < kColumns; ++i) {
        float grad = widen(dx_new[r].value[i]);
        if constexpr (kNorm) {
          const float normalised = (widen(x[r].value[i]) - mean[r]) * rstd[r];
          const float g = widen(dh[r].value[i]) * scale1_of(i);
          const float c1 = sums[2 * r] * inverse, c2 = sums[2 * r + 1] * inverse;
          grad += rstd[r] * (g - c1 - normalised * c2);
          narrow(grad, dx.value[i]);
        }
        if constexpr (kBranch) {
          dgate[i] += grad * widen(branch[r].value[i]);
          narrow(grad * gate_of(i), dbranch.value[i]);
        }
      }
      if constexpr (kNorm) {
        store<kVector>(at<X>(call.dx, shape, b, n, place.column), dx, count[r]);
      }
      if constexpr (kBranch) {
        store<kVector>(at<A>(call.dbranch, shape, b, n, place.column), dbranch, count[r]);
      }
    }
  }

  // each row group is a chunk of its own
  const int64_t chunk = split * place.groups + place.group;
  const int64_t stride = partial_stride(shape);
  const int64_t vectors = 2 * kNorm + (kBranch && call.gate.t != nullptr);
  float* out = call.partial + (b * call.chunks + chunk) * vectors * stride + place.column;
  if (place.count == 0) return;
#pragma unroll
  for (int i = 0; i < kColumns; ++i) {
    // the last vector's columns past D are written too: they exist in `partial`
    if constexpr (kNorm) {
      out[i] = dshift[i];
      out[stride + i] = dscale[i];
    }
    if (kBranch && call.gate.t != nullptr) out[2 * kNorm * stride + i] = dgate[i];
  }
}

template <class X, class A, bool kBranch, bool kNorm>
void launch_backward(const Args& args, bool vector, void* stream) {
  const int64_t blocks = args.call.shape.B * int64_t(args.work.splits);
  const int threads = args.work.threads.count();
  constexpr const char* kName = "the adaLN backward";
  if constexpr (kCommon<X, A>) {
    if constexpr (kNorm) {
      if (vector && args.call.shape.D == kXL) {
        return launch<bwd_kernel<X, A, kXL, true, kBranch, kNorm>, threads_for(kXL).count()>(
            kName, blocks, threads, stream, args);
      }
    }
    if (vector) {
      return launch<bwd_kernel<X, A, 0, true, kBranch, kNorm>, kMaxThreads>(kName, blocks, threads,
                                                                            stream, args);
    }
  }
  launch<bwd_kernel<X, A, 0, false, kBranch, kNorm>, kMaxThreads>(kName, blocks, threads, stream,
                                                                  args);
}

Work cut_backward(const Shape& shape) {
  return cut(shape, kBlocks * multiprocessors(), kMostRows);
}

// The second pass. A block owns 32 columns of one row of table and t; its warps share a sample's
// chunks and, when those are few, samples. Every sum has a fixed order.
constexpr int kFoldColumns = 32, kFoldLanes = 16;

struct FoldArgs {
  Fold call;
  int lanes_per_sample;  // a power of two, at most kFoldLanes
  uint32_t column_blocks;
};

__global__ void __launch_bounds__(kFoldColumns* kFoldLanes) fold_kernel(const FoldArgs args) {
  const Fold& call = args.call;
  const auto [B, N, D] = call.shape;
  const int64_t stride = partial_stride(call.shape);
  const int64_t r = blockIdx.x / args.column_blocks;
  const int64_t d = blockIdx.x % args.column_blocks * kFoldColumns + threadIdx.x % kFoldColumns;
  const int lane = threadIdx.x / kFoldColumns, lanes = args.lanes_per_sample;
  const int chunk_lane = lane % lanes, sample_lane = lane / lanes, samples = kFoldLanes / lanes;
  __shared__ float shared[kFoldLanes][kFoldColumns];
  float over_batch = 0.f;
  for (int64_t first = 0; first < B; first += samples) {
    const int64_t b = first + sample_lane;
    float sum = 0.f;
#pragma unroll
    for (int use = 0; use < 2; ++use) {
      if (use >= call.used || call.uses[use].row != r || b >= B || d >= D) continue;
      const float* in = call.partial + call.uses[use].vector * stride + d;
#pragma unroll 4
      for (int64_t c = chunk_lane; c < call.chunks; c += lanes) {
        sum += in[(b * call.chunks + c) * call.vectors * stride];
      }
    }
    shared[lane][threadIdx.x % kFoldColumns] = sum;
    __syncthreads();
    if (chunk_lane == 0 && b < B && d < D) {
      for (int i = 1; i < lanes; ++i) sum += shared[lane + i][threadIdx.x % kFoldColumns];
      over_batch += sum;
      narrow_at(call.dt, call.dt_dtype, (b * call.table_rows + r) * D + d, sum);
    }
    __syncthreads();
  }
  if (call.dtable == nullptr) return;
  shared[lane][threadIdx.x % kFoldColumns] = over_batch;
  __syncthreads();
  if (lane == 0 && d < D) {
    for (int i = 1; i < samples; ++i) {
      over_batch += shared[i * lanes][threadIdx.x % kFoldColumns];
    }
    narrow_at(call.dtable, call.dtable_dtype, r * D + d, over_batch);
  }
}

}  // namespace

int64_t chunks_cuda(const Shape& shape) {
  const Work work = cut_backward(shape);
  return work.splits * work.threads.groups;
}

void backward_cuda(const Backward& call, void* stream) {
  const Shape& shape = call.shape;
  if (shape.B == 0 || shape.N == 0 || shape.D == 0) return;
  const Args args{call, cut_backward(shape)};
  const bool norm = bool(call.scale), branch = call.dbranch.data != nullptr || bool(call.gate);
  bool vector = shape.D % kColumns == 0;
  for (const TokensIn& tokens : {call.dh, call.dx_new, call.x, call.branch}) {
    vector = vector && (tokens.data == nullptr || aligned(tokens));
  }
  visit(norm ? call.dx.dtype : call.dx_new.dtype, [&](auto x_tag) {
    using X = typename decltype(x_tag)::type;
    visit(branch ? call.dbranch.dtype : call.dh.dtype, [&](auto a_tag) {
      using A = typename decltype(a_tag)::type;
      if (!branch) {
        if constexpr (kCommon<X, A>) launch_backward<X, A, false, true>(args, vector, stream);
      } else if (norm) {
        launch_backward<X, A, true, true>(args, vector, stream);
      } else {
        launch_backward<X, A, true, false>(args, vector, stream);
      }
    });
  });
}

void fold_cuda(const Fold& call, void* stream) {
  const auto column_blocks = uint32_t((call.shape.D + kFoldColumns - 1) / kFoldColumns);
  FoldArgs args{call, 1, column_blocks};
  while (args.lanes_per_sample < kFoldLanes && args.lanes_per_sample < call.chunks) {
    args.lanes_per_sample *= 2;
  }
  constexpr int kThreads = kFoldColumns * kFoldLanes;
  launch<fold_kernel, kThreads>("the adaLN backward's second pass", column_blocks * call.table_rows,
                                kThreads, stream, args);
}

}  // namespace pixart::adaln
