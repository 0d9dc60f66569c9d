// Hopper's asynchronous units, as PTX names them: barriers in shared memory (mbarrier), bulk copies
// of tensor tiles (TMA), and matrix products of a warpgroup (wgmma). For sm_90a alone.
//
// Thin on purpose: each function is one instruction, so that tests/cuda_emulation/hopper.h can give
// it the same meaning on the CPU, where the kernels' own source is run.
#pragma once

#ifdef __CUDACC__
#include <cuda.h>
#include <cudaTypedefs.h>
#endif

#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "device.cuh"

namespace pixart::hopper {

constexpr int kWarpgroup = 128;  // threads that issue a product together
constexpr int kRowsOfProduct = 64, kDepthOfProduct = 16;

// Of all kernels here: what a block may have of a multiprocessor's shared memory.
constexpr int kMostShared = 227 << 10;

#ifdef __CUDACC__

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// The block's dynamic shared memory from its first address that is a multiple of 1024, as tiles
// with swizzled rows want.
__device__ __forceinline__ char* dynamic_shared() {
  extern __shared__ __align__(1024) char memory[];
  return memory;
}

// ---- barriers -----------------------------------------------------------------------------------

// A phase ends when all arrivals have come and all expected bytes too; then the next one begins.
struct alignas(8) Barrier {
  uint64_t state;
};

// By one thread, before fence_barrier_init() and a __syncthreads().
__device__ __forceinline__ void init(Barrier& barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&barrier)),
               "r"(arrivals)
               : "memory");
}

// Shows the new barriers to TMA.
__device__ __forceinline__ void fence_barrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void arrive(Barrier& barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(&barrier))
               : "memory");
}

// An arrival, and `bytes` that TMA will bring within this phase.
__device__ __forceinline__ void arrive_and_expect(Barrier& barrier, int bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&barrier)),
      "r"(bytes)
      : "memory");
}

// Until the phase of this parity has ended. Phases are numbered from 0; before the first one ends,
// parity 1 counts as ended.
__device__ __forceinline__ void wait(Barrier& barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred ended;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 ended, [%0], %1;\n"
      "@ended bra finished;\n"
      "bra again;\n"
      "finished:\n"
      "}" ::"r"(shared_address(&barrier)),
      "r"(parity)
      : "memory");
}

// The hardware's barriers of a block, 1 to 15 (0 is __syncthreads'): `threads` of it, in whole
// warps, meet; those that only arrive do not wait.
__device__ __forceinline__ void sync_named(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
__device__ __forceinline__ void arrive_named(int barrier, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// Registers per thread move from the warps that copy to those that compute; by whole warpgroups.
template <int kRegisters>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// ---- TMA ----------------------------------------------------------------------------------------

using TensorMap = CUtensorMap;

// One thread starts the copy of the map's box at (c0, c1, c2, c3) to shared memory; what lies
// outside of the tensor is zero there. The box's whole size in bytes, zeros included, is counted at
// `barrier`.
__device__ __forceinline__ void copy_box(void* shared, const TensorMap& map, Barrier& barrier,
                                         int c0, int c1, int c2, int c3) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(shared_address(shared)),
      "l"(&map), "r"(shared_address(&barrier)), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
      : "memory");
}

// A tensor of 16-bit elements in four dimensions, innermost first, and the box that a copy takes.
// `strides`, in bytes, are those of dimensions 1 to 3. The rows of the box in shared memory, as
// many bytes as `swizzle` (128, 64 or 32), have their 16-byte pieces permuted as wgmma expects
// them.
inline TensorMap tensor_map(const void* data, DType dtype, const uint64_t (&sizes)[4],
                            const uint64_t (&strides)[3], const uint32_t (&box)[4], int swizzle) {
  static const auto encode = [] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult found;
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000,
                                           cudaEnableDefault, &found),
          "asking the driver for tensor maps");
    return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(entry);
  }();
  if (encode == nullptr) throw std::runtime_error("pixart_kernels: the driver has no tensor maps");
  const CUtensorMapDataType type = dtype == DType::kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                                             : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  const CUtensorMapSwizzle mode = swizzle == 128  ? CU_TENSOR_MAP_SWIZZLE_128B
                                  : swizzle == 64 ? CU_TENSOR_MAP_SWIZZLE_64B
                                                  : CU_TENSOR_MAP_SWIZZLE_32B;
  const uint32_t every[4] = {1, 1, 1, 1};
  TensorMap map;
  const CUresult result =
      encode(&map, type, 4, const_cast<void*>(data), sizes, strides, box, every,
             CU_TENSOR_MAP_INTERLEAVE_NONE, mode, CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
             CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    throw std::runtime_error("pixart_kernels: the driver refused a tensor map, error " +
                             std::to_string(result));
  }
  return map;
}

// ---- wgmma --------------------------------------------------------------------------------------

// Products run while their warpgroup goes on. Before the first: fence_products(), so that they see
// its registers. A batch is what was started since the last commit_products().
__device__ __forceinline__ void fence_products() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void commit_products() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// The compiler knows nothing of the unit that writes these registers behind its back: it must
// neither keep copies of them nor move their uses across this place.
__device__ __forceinline__ void pin(float& value) {
  asm volatile("" : "+f"(value)::"memory");
}
__device__ __forceinline__ void pin(uint32_t& value) {
  asm volatile("" : "+r"(value)::"memory");
}
template <class T, int kCount>
__device__ __forceinline__ void pin(T (&values)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) pin(values[i]);
}

// Until at most kBatches of the latest batches are unfinished. `registers`: all accumulators and
// register operands of the batches that have ended.
template <int kBatches, class... Registers>
__device__ __forceinline__ void wait_products(Registers&... registers) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kBatches) : "memory");
  (pin(registers), ...);
}

// clang-format off
#define PIXART_D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define PIXART_D16(i) PIXART_D4(i), PIXART_D4(i + 4), PIXART_D4(i + 8), PIXART_D4(i + 12)
#define PIXART_D32 PIXART_D16(0), PIXART_D16(16)
#define PIXART_D36 PIXART_D32, PIXART_D4(32)
#define PIXART_D64 PIXART_D32, PIXART_D16(32), PIXART_D16(48)
#define PIXART_D88 PIXART_D64, PIXART_D16(64), PIXART_D4(80), PIXART_D4(84)
#define PIXART_N32 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define PIXART_N36 PIXART_N32 ", %32, %33, %34, %35"
#define PIXART_N64 PIXART_N36 \
  ", %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, " \
  "%52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define PIXART_N88 PIXART_N64 \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
  "%80, %81, %82, %83, %84, %85, %86, %87"
// clang-format on

// a and b are the numbers of operands that follow the accumulators, `keep` of the one after them.
#define PIXART_WGMMA_SS(N, TYPE, COUNT, A, B, KEEP)                             \
  asm volatile("{\n.reg .pred keep;\nsetp.ne.b32 keep, %" #KEEP                 \
               ", 0;\n"                                                         \
               "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE  \
               " {" PIXART_N##COUNT "}, %" #A ", %" #B ", keep, 1, 1, 0, 0;\n}" \
               : PIXART_D##COUNT                                                \
               : "l"(a), "l"(b), "r"(int(accumulate)))
#define PIXART_WGMMA_RS(N, TYPE, COUNT, A0, A1, A2, A3, B, KEEP)                        \
  asm volatile("{\n.reg .pred keep;\nsetp.ne.b32 keep, %" #KEEP                         \
               ", 0;\n"                                                                 \
               "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE          \
               " {" PIXART_N##COUNT "}, {%" #A0 ", %" #A1 ", %" #A2 ", %" #A3 "}, %" #B \
                                    ", keep, 1, 1, 1;\n}"                               \
               : PIXART_D##COUNT                                                        \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(accumulate)))

// d (+)= a b^T over 16 columns of both: a is [64, 16] and b [kN, 16], each a descriptor of a tile
// whose rows hold the columns side by side. T is Bf16 or Fp16; d lies as wgmma lays it out: thread
// t of the warpgroup has, for j < kN / 8 and i < 4,
//   d[4 j + i] = D[16 (t / 32) + t % 32 / 4 + 8 (i / 2)][8 j + 2 (t % 4) + i % 2].
template <class T, int kN>
__device__ __forceinline__ void multiply(float (&d)[kN / 2], uint64_t a, uint64_t b,
                                         bool accumulate) {
  constexpr bool kBf16 = std::is_same_v<T, Bf16>;
  static_assert(kN == 64 || kN == 128 || kN == 176, "write its operands out above");
  if constexpr (kN == 64 && kBf16) PIXART_WGMMA_SS(64, "bf16", 32, 32, 33, 34);
  if constexpr (kN == 64 && !kBf16) PIXART_WGMMA_SS(64, "f16", 32, 32, 33, 34);
  if constexpr (kN == 128 && kBf16) PIXART_WGMMA_SS(128, "bf16", 64, 64, 65, 66);
  if constexpr (kN == 128 && !kBf16) PIXART_WGMMA_SS(128, "f16", 64, 64, 65, 66);
  if constexpr (kN == 176 && kBf16) PIXART_WGMMA_SS(176, "bf16", 88, 88, 89, 90);
  if constexpr (kN == 176 && !kBf16) PIXART_WGMMA_SS(176, "f16", 88, 88, 89, 90);
}

// d (+)= a b over 16 rows of b: b is [16, kN], a descriptor of a tile whose *rows* are contracted.
// a is [64, 16] in registers, two 16-bit elements each: thread t has in a[i], i < 4,
//   A[16 (t / 32) + t % 32 / 4 + 8 (i % 2)][2 (t % 4) + 8 (i / 2)] and its right neighbour,
// so that four neighbouring pairs of an accumulator, 16 columns of it, are such an operand.
template <class T, int kN>
__device__ __forceinline__ void multiply(float (&d)[kN / 2], const uint32_t (&a)[4], uint64_t b,
                                         bool accumulate) {
  constexpr bool kBf16 = std::is_same_v<T, Bf16>;
  static_assert(kN == 72, "write its operands out above");
  if constexpr (kBf16) PIXART_WGMMA_RS(72, "bf16", 36, 36, 37, 38, 39, 40, 41);
  if constexpr (!kBf16) PIXART_WGMMA_RS(72, "f16", 36, 36, 37, 38, 39, 40, 41);
}

#undef PIXART_WGMMA_SS
#undef PIXART_WGMMA_RS

__device__ __forceinline__ float exp2_approximate(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Two values rounded to T, the first in the low half.
template <class T>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  uint32_t both;
  if constexpr (std::is_same_v<T, Bf16>) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  }
  return both;
}

#endif  // __CUDACC__

// Where a product finds a tile in shared memory (PTX, "Matrix Descriptor"). The tile's rows are cut
// into panels of `swizzle` bytes, each panel [rows, swizzle / 2] and a multiple of 1024 bytes from
// where its swizzle pattern repeats.
constexpr uint64_t descriptor(uint32_t address, int leading, int stride, int swizzle) {
  const uint64_t mode = swizzle == 128 ? 1 : swizzle == 64 ? 2 : 3;
  return uint64_t(address & 0x3ffff) >> 4 | uint64_t(leading >> 4) << 16 |
         uint64_t(stride >> 4) << 32 | mode << 62;
}

}  // namespace pixart::hopper
