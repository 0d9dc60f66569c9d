// bias_gelu on the GPU. Formulas: pixart_kernels/mlp/README.md.
//
// A thread owns eight neighbouring columns: it reads their bias once, walks down its rows, and
// keeps the sums of the backward in registers. Nothing is shared, so that no thread waits for
// another.
#include "../include/device.cuh"
#include "mlp.h"

namespace pixart::mlp {
namespace {

// Rows that a thread has under way: 64 bytes of loads in flight, in the backward of x and dy
// together.
template <class X>
constexpr int kForwardRows = 8 / sizeof(X);
template <class X>
constexpr int kBackwardRows = 4 / sizeof(X);

// Rows a block of the forward walks: its bias is read once for them.
constexpr int64_t kRowsOfBlock = 32;

// Threads of a block: at most, and about how many are aimed at.
constexpr int kMostThreads = 384, kAim = 256;

// Threads that a multiprocessor has room for, which the launch bounds ensure: the backward launches
// no more, so that each starts and writes its sums but once.
constexpr int kResidentThreads = 2 * kMostThreads;

// Columns are counted in 32 bits, past the last one as well.
constexpr int64_t kWidest = INT32_MAX - kMostThreads * kColumns;

// A block covers eight times `per_row` columns of a split's rows, `groups` rows at a time.
struct Work {
  int per_row, groups;
  uint32_t across, splits;  // 32 bits, like blockIdx: dividing 64 bits calls a routine
  int64_t split_rows;

  int threads() const { return (per_row * groups + 31) / 32 * 32; }
  int64_t blocks() const { return int64_t(across) * splits; }
};

// Splits not given yet. Tiles of columns are equally wide: D = 4608 takes three of 192 threads.
Work tiles(const Shape& shape) {
  if (shape.D > kWidest) throw std::invalid_argument("bias_gelu: D is " + std::to_string(shape.D));
  const int64_t vectors = (shape.D + kColumns - 1) / kColumns;
  const int64_t across = (vectors + kAim - 1) / kAim;
  if (across == 0) return {1, 1, 0, 0, 0};
  const int per_row = int((vectors + across - 1) / across);
  return {per_row, (kAim + per_row / 2) / per_row, uint32_t(across), 0, 0};
}

// At most `splits`, each of whole steps of `rows` rows for each group.
Work cut(const Shape& shape, Work work, int64_t splits, int rows) {
  if (shape.rows == 0) return work;
  const int64_t step = int64_t(work.groups) * rows, steps = (shape.rows + step - 1) / step;
  splits = splits < 1 ? 1 : splits < steps ? splits : steps;
  work.split_rows = (steps + splits - 1) / splits * step;
  work.splits = uint32_t((shape.rows + work.split_rows - 1) / work.split_rows);
  return work;
}

Work cut_forward(const Shape& shape) {
  const int64_t splits = (shape.rows + kRowsOfBlock - 1) / kRowsOfBlock;
  return cut(shape, tiles(shape), splits, kForwardRows<Bf16>);
}

Work cut_backward(const Shape& shape) {
  const Work work = tiles(shape);
  const int64_t blocks = int64_t(multiprocessors()) * (kResidentThreads / work.threads());
  return cut(shape, work, work.across ? blocks / work.across : 0, kBackwardRows<Bf16>);
}

struct Place {
  int64_t split, begin, end;
  int group, column, count;

  __device__ __forceinline__ Place(const Shape& shape, const Work& work) {
    split = blockIdx.x / work.across;
    begin = split * work.split_rows;
    end = begin + work.split_rows < shape.rows ? begin + work.split_rows : shape.rows;
    group = threadIdx.x / work.per_row;
    const int tile = blockIdx.x % work.across;
    // 32 bits: stores beside a 64-bit column are cut into pieces of 4 bytes
    column = (tile * work.per_row + int(threadIdx.x % work.per_row)) * kColumns;
    const int left = int(shape.D) - column;
    // threads that fill the last warp own nothing
    count = group >= work.groups || left < 0 ? 0 : left < kColumns ? left : kColumns;
  }
};

__device__ __forceinline__ void load_bias(const Bias& bias, const Place& place,
                                          float (&out)[kColumns]) {
#pragma unroll
  for (int i = 0; i < kColumns; ++i) {
    out[i] = i < place.count ? widen_at(bias.data, bias.dtype, place.column + i) : 0.f;
  }
}

// Unlike fmaxf and fminf, these leave a NaN as it is.
__device__ __forceinline__ float at_least(float value, float bound) {
  return value < bound ? bound : value;
}
__device__ __forceinline__ float at_most(float value, float bound) {
  return value > bound ? bound : value;
}

__device__ __forceinline__ float gelu(float z) {
  z = at_least(z, -kFar);
  return __fdividef(z, 1.f + __expf(-z * (kSlope + kCubic * (z * z))));
}

// s (1 + (1 - s) z (2u)') with s = 1 / (1 + exp(-2u))
__device__ __forceinline__ float gelu_derivative(float z) {
  z = at_most(at_least(z, -kFar), kFar);
  const float square = z * z;
  const float e = __expf(-z * (kSlope + kCubic * square));
  const float s = __fdividef(1.f, 1.f + e);
  // e s rather than 1 - s, which cancels; e finite, because s is 0 where e is not
  const float rest = at_most(e, 1e37f) * s;
  return s * (1.f + rest * z * (kSlope + 3.f * kCubic * square));
}

template <class X>
__device__ __forceinline__ const X* at(const RowsIn& rows, int64_t row, int column) {
  return static_cast<const X*>(rows.data) + row * rows.stride + column;
}

struct ForwardArgs {
  Forward call;
  Work work;
};

template <class X, bool kVector>
__global__ void __launch_bounds__(kMostThreads, 2) fwd_kernel(const ForwardArgs args) {
  constexpr int kRows = kForwardRows<X>;
  const Forward& call = args.call;
  const Place place(call.shape, args.work);
  float bias[kColumns];
  load_bias(call.bias, place, bias);
  for (int64_t tile = place.begin; tile < place.end; tile += int64_t(args.work.groups) * kRows) {
    const int64_t first = forget_pointers(tile + place.group);
    Stored<X> x[kRows];
    int count[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int64_t row = first + r * args.work.groups;
      count[r] = row < place.end ? place.count : 0;
      x[r] = load<kVector>(at<X>(call.x, row, place.column), count[r]);
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      Stored<X> y;
#pragma unroll
      for (int i = 0; i < kColumns; ++i) {
        narrow(gelu(widen(x[r].value[i]) + bias[i]), y.value[i]);
      }
      X* out = static_cast<X*>(call.y) + (first + r * args.work.groups) * call.shape.D;
      store<kVector>(out + place.column, y, count[r]);
    }
  }
}

struct BackwardArgs {
  Backward call;
  Work work;
};

template <class X, bool kVector>
__global__ void __launch_bounds__(kMostThreads, 2) bwd_kernel(const BackwardArgs args) {
  constexpr int kRows = kBackwardRows<X>;
  const Backward& call = args.call;
  const Place place(call.shape, args.work);
  float bias[kColumns], sums[kColumns] = {};
  load_bias(call.bias, place, bias);
  for (int64_t tile = place.begin; tile < place.end; tile += int64_t(args.work.groups) * kRows) {
    const int64_t first = forget_pointers(tile + place.group);
    Stored<X> x[kRows], dy[kRows];
    int count[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int64_t row = first + r * args.work.groups;
      count[r] = row < place.end ? place.count : 0;
      x[r] = load<kVector>(at<X>(call.x, row, place.column), count[r]);
      dy[r] = load<kVector>(at<X>(call.dy, row, place.column), count[r]);
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      Stored<X> dx;
#pragma unroll
      for (int i = 0; i < kColumns; ++i) {
        const float z = widen(x[r].value[i]) + bias[i];
        const float grad = widen(dy[r].value[i]) * gelu_derivative(z);
        sums[i] += grad;
        narrow(grad, dx.value[i]);
      }
      X* out = static_cast<X*>(call.dx) + (first + r * args.work.groups) * call.shape.D;
      store<kVector>(out + place.column, dx, count[r]);
    }
  }
  // each group of rows is a chunk of its own
  const int64_t chunk = place.split * args.work.groups + place.group;
  float* out = call.partial + chunk * call.shape.D + place.column;
#pragma unroll
  for (int i = 0; i < kColumns; ++i) {
    if (i < place.count) out[i] = sums[i];
  }
}

// The second pass. A block owns 32 columns; its warps share the chunks, in a fixed order.
constexpr int kFoldColumns = 32, kFoldLanes = 16;

__global__ void __launch_bounds__(kFoldColumns* kFoldLanes) fold_kernel(const Fold call) {
  const int column = threadIdx.x % kFoldColumns, lane = threadIdx.x / kFoldColumns;
  const int64_t d = int64_t(blockIdx.x) * kFoldColumns + column;
  __shared__ float shared[kFoldLanes][kFoldColumns];
  float sum = 0.f;
  if (d < call.D) {
#pragma unroll 4
    for (int64_t c = lane; c < call.chunks; c += kFoldLanes) sum += call.partial[c * call.D + d];
  }
  shared[lane][column] = sum;
  __syncthreads();
  if (lane != 0 || d >= call.D) return;
#pragma unroll
  for (int i = 1; i < kFoldLanes; ++i) sum += shared[i][column];
  narrow_at(call.dbias, call.dtype, d, sum);
}

bool aligned(const RowsIn& rows, DType dtype) {
  return reinterpret_cast<uintptr_t>(rows.data) % 16 == 0 &&
         rows.stride * item_size(dtype) % 16 == 0;
}

void forward(const Forward& call, void* stream) {
  const ForwardArgs args{call, cut_forward(call.shape)};
  const bool vector = call.shape.D % kColumns == 0 && aligned(call.x, call.dtype);
  const int64_t blocks = args.work.blocks();
  const int threads = args.work.threads();
  visit(call.dtype, [&](auto tag) {
    using X = typename decltype(tag)::type;
    constexpr const char* kName = "bias_gelu";
    if (vector) {
      launch<fwd_kernel<X, true>, kMostThreads>(kName, blocks, threads, stream, args);
    } else {
      launch<fwd_kernel<X, false>, kMostThreads>(kName, blocks, threads, stream, args);
    }
  });
}

void backward(const Backward& call, void* stream) {
  const BackwardArgs args{call, cut_backward(call.shape)};
  const bool vector =
      call.shape.D % kColumns == 0 && aligned(call.x, call.dtype) && aligned(call.dy, call.dtype);
  const int64_t blocks = args.work.blocks();
  const int threads = args.work.threads();
  visit(call.dtype, [&](auto tag) {
    using X = typename decltype(tag)::type;
    constexpr const char* kName = "bias_gelu's backward";
    if (vector) {
      launch<bwd_kernel<X, true>, kMostThreads>(kName, blocks, threads, stream, args);
    } else {
      launch<bwd_kernel<X, false>, kMostThreads>(kName, blocks, threads, stream, args);
    }
  });
}

int64_t chunks_of(const Shape& shape) {
  const Work work = cut_backward(shape);
  return int64_t(work.splits) * work.groups;
}

void fold(const Fold& call, void* stream) {
  constexpr int kThreads = kFoldColumns * kFoldLanes;
  const int64_t blocks = (call.D + kFoldColumns - 1) / kFoldColumns;
  launch<fold_kernel, kThreads>("bias_gelu's second pass", blocks, kThreads, stream, call);
}

}  // namespace

const Kernels kCuda = {chunks_of, forward, backward, fold};

}  // namespace pixart::mlp
