// bias_gelu on the CPU. Formulas: pixart_kernels/mlp/README.md.
//
// Work is cut into tiles of rows by columns: a tile's bias and sums have one size for any D, and
// few but wide rows still feed several threads. A row asks for the next one as it is read
// (fp32: 1.3 times as fast).
#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "../include/vec.h"
#include "mlp.h"

namespace pixart::mlp {
namespace {

// Fewer elements than this are not worth waking another thread for.
constexpr int64_t kElementsPerThread = 32768;

// of a tile; 256 to 8192 were equally fast
constexpr int64_t kColumns = 1024;

// Rows are cut by shape alone, so that no result depends on the number of threads.
int64_t chunk_rows(const Shape& shape) {
  return std::max<int64_t>(64, (shape.rows + 63) / 64);
}

int64_t chunks_of(const Shape& shape) {
  return (shape.rows + chunk_rows(shape) - 1) / chunk_rows(shape);
}

struct Tile {
  int64_t chunk, row, row_end, column, columns;
};

// Calls body(tile) for each tile, tiles shared among torch's threads.
template <class Body>
void for_tiles(const Shape& shape, Body body) {
  const int64_t rows = chunk_rows(shape), chunks = chunks_of(shape);
  const int64_t across = (shape.D + kColumns - 1) / kColumns;
  const int64_t elements = std::min(rows, shape.rows) * std::min(kColumns, shape.D);
  const int64_t grain = kElementsPerThread / std::max<int64_t>(1, elements) + 1;
  torch::stable::parallel_for(0, chunks * across, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t chunk = i / across, row = chunk * rows, column = i % across * kColumns;
      body(Tile{chunk, row, std::min(row + rows, shape.rows), column,
                std::min(kColumns, shape.D - column)});
    }
  });
}

// The tile's columns of the bias in fp32, zero to the end of the last vector.
struct BiasTile {
  float data[kColumns];

  BiasTile(const Bias& bias, const Tile& tile) {
    visit(bias.dtype, [&](auto tag) {
      using B = typename decltype(tag)::type;
      const B* in = static_cast<const B*>(bias.data) + tile.column;
      for_lanes(tile.columns, [&](int64_t d, auto lanes, auto) __attribute__((always_inline)) {
        store(data + d, load(in + d, lanes), All{});
      });
    });
  }
};

PIXART_INLINE F32x8 gelu(F32x8 z) {
  z = at_least(z, -kFar);
  const F32x8 e = exp(-z * (kSlope + kCubic * (z * z)));
  return z / (1.f + e);
}

// s (1 + (1 - s) z (2u)') with s = 1 / (1 + exp(-2u))
PIXART_INLINE F32x8 gelu_derivative(F32x8 z) {
  z = at_most(at_least(z, -kFar), kFar);
  const F32x8 square = z * z;
  const F32x8 e = exp(-z * (kSlope + kCubic * square));
  const F32x8 s = 1.f / (1.f + e);
  // e s rather than 1 - s, which cancels; e finite, because s is 0 where e is not
  const F32x8 rest = at_most(e, 1e38f) * s;
  return s * (1.f + rest * z * (kSlope + 3.f * kCubic * square));
}

template <class X>
const X* row_of(const RowsIn& rows, int64_t row, int64_t column) {
  return static_cast<const X*>(rows.data) + row * rows.stride + column;
}

template <class X>
void forward_tile(const Forward& call, const Tile& tile) {
  const BiasTile bias(call.bias, tile);
  for (int64_t row = tile.row; row < tile.row_end; ++row) {
    const X* x = row_of<X>(call.x, row, tile.column);
    X* y = static_cast<X*>(call.y) + row * call.shape.D + tile.column;
    for_lanes(tile.columns, [&](int64_t d, auto lanes, auto slot) __attribute__((always_inline)) {
      prefetch(x + d, call.x.stride, slot);
      store(y + d, gelu(load(x + d, lanes) + load(bias.data + d, All{})), lanes);
    });
  }
}

template <class X>
void backward_tile(const Backward& call, const Tile& tile) {
  const BiasTile bias(call.bias, tile);
  float sums[kColumns] = {};
  for (int64_t row = tile.row; row < tile.row_end; ++row) {
    const X* x = row_of<X>(call.x, row, tile.column);
    const X* dy = row_of<X>(call.dy, row, tile.column);
    X* dx = static_cast<X*>(call.dx) + row * call.shape.D + tile.column;
    for_lanes(tile.columns, [&](int64_t d, auto lanes, auto slot) __attribute__((always_inline)) {
      prefetch(x + d, call.x.stride, slot);
      prefetch(dy + d, call.dy.stride, slot);
      const F32x8 z = load(x + d, lanes) + load(bias.data + d, All{});
      const F32x8 grad = load(dy + d, lanes) * gelu_derivative(z);
      store(dx + d, grad, lanes);
      store(sums + d, load(sums + d, All{}) + grad, All{});
    });
  }
  std::copy_n(sums, tile.columns, call.partial + tile.chunk * call.shape.D + tile.column);
}

void forward(const Forward& call, void*) {
  visit(call.dtype, [&](auto tag) {
    for_tiles(call.shape,
              [&](const Tile& tile) { forward_tile<typename decltype(tag)::type>(call, tile); });
  });
}

void backward(const Backward& call, void*) {
  visit(call.dtype, [&](auto tag) {
    for_tiles(call.shape,
              [&](const Tile& tile) { backward_tile<typename decltype(tag)::type>(call, tile); });
  });
}

void fold(const Fold& call, void*) {
  const int64_t grain = kElementsPerThread / std::max<int64_t>(1, call.chunks) + 1;
  torch::stable::parallel_for(0, call.D, grain, [&](int64_t begin, int64_t end) {
    visit(call.dtype, [&](auto tag) {
      using B = typename decltype(tag)::type;
      B* dbias = static_cast<B*>(call.dbias) + begin;
      for_lanes(end - begin, [&](int64_t d, auto lanes, auto) __attribute__((always_inline)) {
        F32x8 sum = {};
        const float* in = call.partial + begin + d;
        for (int64_t c = 0; c < call.chunks; ++c) sum += load(in + c * call.D, lanes);
        store(dbias + d, sum, lanes);
      });
    });
  });
}

}  // namespace

const Kernels kCpu = {chunks_of, forward, backward, fold};

}  // namespace pixart::mlp
