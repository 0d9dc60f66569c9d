// Shared by the forward and the backward on sm_90a: tiles of heads in shared memory, from their
// copy out of global memory to the descriptors that products read them by, and results on their way
// back. Formulas: pixart_kernels/attention/README.md.
#pragma once

#include <cstdlib>
#include <initializer_list>
#include <stdexcept>
#include <string>

#include "../include/hopper.cuh"
#include "attention.h"

namespace pixart::attention {

using hopper::Barrier;
using hopper::TensorMap;

// log2(e) / sqrt(72): scores times this are exponents of 2.
constexpr float kScale = 0.170023241f;

// A product contracts 16 columns at a time, so that S = q k^T takes 80 of them, the last eight zero
// because TMA fills what lies outside of a head; a product whose result is a head wide takes the 72
// alone.
constexpr int kSteps = (kHeadDim + hopper::kDepthOfProduct - 1) / hopper::kDepthOfProduct;

// A tile's rows are cut into panels of this many columns: 64 (twice), 32 (three times) or 16 (five
// times). Wider ones cost TMA fewer requests, narrower ones less shared memory for columns past 72.
#ifndef PIXART_ATTENTION_PANEL
#define PIXART_ATTENTION_PANEL 64
#endif
constexpr int kPanelColumns = PIXART_ATTENTION_PANEL;
constexpr int kPanels = (kSteps * hopper::kDepthOfProduct + kPanelColumns - 1) / kPanelColumns;
constexpr int kPanelRow = 2 * kPanelColumns;  // bytes
constexpr int kRowsOfPattern = 8;             // a swizzle pattern repeats after them
constexpr int kUnusedLeading = 16;            // where no panel follows; what CUTLASS writes there

// [kRows, 72] of one head. The same bytes serve products that contract its columns and products
// that contract its rows.
template <int kRows>
struct Tile {
  static_assert(kRows % hopper::kDepthOfProduct == 0 && kRows <= 256, "as TMA takes them");
  static constexpr int kPanelBytes = kRows * kPanelRow;
  static constexpr int kBytes = kPanels * kPanelBytes;

  alignas(1024) char bytes[kBytes];

  // One thread starts the copy; kBytes will be counted at the barrier.
  __device__ __forceinline__ void load(const TensorMap& map, Barrier& full, int row, int head,
                                       int batch) {
#pragma unroll
    for (int panel = 0; panel < kPanels; ++panel) {
      hopper::copy_box(bytes + panel * kPanelBytes, map, full, panel * kPanelColumns, head, row,
                       batch);
    }
  }

  // Operand of a product over columns 16 step to 16 step + 15, of the rows from first_row on.
  __device__ __forceinline__ uint64_t columns(int step, int first_row = 0) const {
    const int column = step * hopper::kDepthOfProduct;
    const int offset = column / kPanelColumns * kPanelBytes + column % kPanelColumns * 2;
    return operand(kUnusedLeading, first_row * kPanelRow) + offset / 16;
  }

  // Operand of a product over rows 16 step to 16 step + 15, of all 72 columns.
  __device__ __forceinline__ uint64_t rows(int step) const {
    return operand(kPanelBytes, 0) + step * hopper::kDepthOfProduct * kPanelRow / 16;
  }

 private:
  // Addresses are counted in 16 bytes at the descriptor's low end, where adding to them is cheaper
  // than making one anew.
  __device__ __forceinline__ uint64_t operand(int leading, int offset) const {
    return hopper::descriptor(hopper::shared_address(bytes) + offset, leading,
                              kRowsOfPattern * kPanelRow, kPanelRow);
  }
};

// How TMA sees N rows of every head: boxes of `rows` rows and one panel. Heads come before rows, as
// they lie in memory: the driver's documentation has strides grow from one dimension to the next.
inline TensorMap map_of(const Heads& heads, DType dtype, int64_t N, const Shape& shape, int rows) {
  const uint64_t sizes[4] = {kHeadDim, uint64_t(shape.H), uint64_t(N), uint64_t(shape.B)};
  // the stride of a single element says nothing, and may be what the driver refuses
  const auto bytes = [](int64_t size, int64_t stride) {
    return size > 1 ? uint64_t(stride) * 2 : uint64_t(2 * kPanelColumns * kPanels);
  };
  const uint64_t strides[3] = {bytes(shape.H, heads.stride_h), bytes(N, heads.stride_n),
                               bytes(shape.B, heads.stride_b)};
  const uint32_t box[4] = {kPanelColumns, 1, uint32_t(rows), 1};
  return hopper::tensor_map(heads.data, dtype, sizes, strides, box, kPanelRow);
}

// One warpgroup copies, kGroups compute.
template <int kGroups>
constexpr int kThreads = (1 + kGroups) * hopper::kWarpgroup;

inline int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// The tiles of all heads. 32 bits: dividing 64 bits calls a routine.
struct Tiling {
  uint32_t H, of_head, count;

  Tiling(const Shape& shape, int64_t N, int rows_of_tile)
      : H(uint32_t(shape.H)), of_head(uint32_t(ceil_div(N, rows_of_tile))) {
    const int64_t all = shape.B * shape.H * ceil_div(N, rows_of_tile);
    if (all > INT32_MAX) throw std::invalid_argument("attention: too many heads and tokens");
    count = uint32_t(all);
  }

  int blocks() const { return int(count) < multiprocessors() ? int(count) : multiprocessors(); }
};

// A block's tiles are those whose number leaves its own by the number of blocks. Neighbours share a
// head, and with it what they stream, in the cache.
struct Place {
  int batch, head, row;

  __device__ __forceinline__ Place(const Tiling& tiling, uint32_t tile, int rows_of_tile) {
    const uint32_t heads = tile / tiling.of_head;
    batch = int(heads / tiling.H);
    head = int(heads % tiling.H);
    row = int(tile % tiling.of_head) * rows_of_tile;
  }
};

// Warpgroups of a block, 64 rows each, and how many rows of the other side they meet at once.
struct Cut {
  int groups, rows;
};

// For blocks that own rows of heads of N. Two warpgroups share what they meet; where each can have
// a multiprocessor of its own, it does. Either way a row meets the same steps, so that a sample
// does not depend on its batch. None of this was measured: docs/hardware.md says how.
inline Cut choose(const Shape& shape, int64_t N) {
  const int64_t warpgroups = shape.B * shape.H * ceil_div(N, hopper::kRowsOfProduct);
  return {N <= hopper::kRowsOfProduct || warpgroups <= multiprocessors() ? 1 : 2, 128};
}

// What an environment variable says, for measurements, or what is chosen.
inline Cut asked_or_chosen(const char* variable, std::initializer_list<Cut> accepted,
                           const Shape& shape, int64_t N) {
  const char* asked = std::getenv(variable);
  if (asked == nullptr) return choose(shape, N);
  std::string names;
  for (const Cut cut : accepted) {
    const std::string name = std::to_string(cut.groups) + "x" + std::to_string(cut.rows);
    if (asked == name) return cut;
    names += (names.empty() ? "" : ", ") + name;
  }
  throw std::invalid_argument(std::string(variable) + " is '" + asked + "'; accepted: " + names);
}

// A place in a ring of kStages buffers, and the parity of the phase that its barriers are in.
template <int kStages>
struct Ring {
  int stage = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ void next() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// A turn of a 4 x 4 matrix over the four threads that share a row of a product: the thread that
// held word q of pieces 0 to 3 then holds all of piece q.
__device__ __forceinline__ void gather_pieces(uint32_t (&words)[4]) {
  const bool odd = threadIdx.x & 1, upper = threadIdx.x & 2;
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    const uint32_t got = __shfl_xor_sync(~0u, odd ? words[i] : words[i + 1], 1);
    words[i] = odd ? got : words[i];
    words[i + 1] = odd ? words[i + 1] : got;
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t got = __shfl_xor_sync(~0u, upper ? words[i] : words[i + 2], 2);
    words[i] = upper ? got : words[i];
    words[i + 2] = upper ? words[i + 2] : got;
  }
}

// Stores d, [64, 72] as products leave it, rounded to T and times factor[0] in a thread's first row
// and factor[1] in its second, to the rows of `out` from `row` on that are below N.
template <class T>
__device__ __forceinline__ void store_rows(const float (&d)[kHeadDim / 2], const float (&factor)[2],
                                           const Heads& out, int batch, int head, int row, int N) {
  constexpr int kPieces = kHeadDim / kColumns;
  const int thread = threadIdx.x % hopper::kWarpgroup, quarter = thread % 4;
  row += thread / 32 * 16 + thread % 32 / 4;
  T* first = static_cast<T*>(out.data) + batch * out.stride_b + head * out.stride_h;
#pragma unroll
  for (int half = 0; half < 2; ++half, row += 8) {
    T* to = first + row * out.stride_n;
    uint32_t words[kPieces];
#pragma unroll
    for (int j = 0; j < kPieces; ++j) {
      const int i = 4 * j + 2 * half;
      words[j] = hopper::pack<T>(d[i] * factor[half], d[i + 1] * factor[half]);
    }
#pragma unroll
    for (int piece = 0; piece + 4 <= kPieces; piece += 4) {
      uint32_t four[4] = {words[piece], words[piece + 1], words[piece + 2], words[piece + 3]};
      gather_pieces(four);
      if (row < N) {
        // assigned in place, some would become four stores
        const uint4 whole = {four[0], four[1], four[2], four[3]};
        reinterpret_cast<uint4*>(to)[piece + quarter] = whole;
      }
    }
    static_assert(kPieces % 4 == 1, "one piece is left");
    if (row < N) {
      *reinterpret_cast<uint32_t*>(to + (kPieces - 1) * kColumns + 2 * quarter) =
          words[kPieces - 1];
    }
  }
}

}  // namespace pixart::attention
