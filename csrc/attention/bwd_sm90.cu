// The attention ops' backward on sm_90a. Formulas: pixart_kernels/attention/README.md.
//
// Two kernels, so that each sum belongs to one warpgroup: dq_kernel owns queries and streams keys,
// dkdv_kernel owns keys and streams queries. A block holds its own rows of two tensors, and steps
// of the other side's two come by, from the last, which may be short, down to the first. Products
// are [own rows, streamed rows], so that weights and dS lie in the registers where the next product
// wants them. Tiles are named after the product that they enter: s (q and k) and dp (dout and v).
//
// One warp copies; the other warpgroups own 64 rows each. They start the scores of the next step
// before they add up this one's sums, and take exponentials while the tensor cores are at those.
#include <type_traits>

#include "sm90.cuh"

namespace pixart::attention {
namespace {

using namespace hopper;

constexpr float kSigma = 0.117851130f;  // 1 / sqrt(72)

constexpr int kWarp = 32, kWarps = kWarpgroup / kWarp;

// What is streamed for s is read again, for sums, after the next scores have been started.
constexpr int kStagesS = 3, kStagesDp = 2;

struct Work {
  TensorMap own_s, own_dp, s, dp;
  Tiling tiling;
  int steps;
};

struct BackwardArgs {
  Work work;
  Backward call;
};

template <class T>
__device__ __forceinline__ T* start_of(const Heads& heads, const Place& place) {
  return static_cast<T*>(heads.data) + place.batch * heads.stride_b + place.head * heads.stride_h;
}

// Of lse or delta.
template <class T>
__device__ __forceinline__ T* start_of(T* rows, const Shape& shape, const Place& place) {
  return rows + (place.batch * shape.H + place.head) * shape.Nq;
}

// A buffer's barriers.
struct Handover {
  Barrier full, empty;
};

// kRows: of a step.
template <int kGroups, int kRows>
struct Shared {
  static constexpr int kOwnRows = kGroups * kRowsOfProduct;

  Tile<kOwnRows> own_s, own_dp;
  Tile<kRows> s[kStagesS], dp[kStagesDp];
  float lse[kStagesS][kRows], delta[kStagesDp][kRows];  // of streamed queries
  Handover own, of_s[kStagesS], of_dp[kStagesDp];

  // By all threads of the block.
  __device__ __forceinline__ void begin(int arrivals_of_step) {
    if (threadIdx.x == 0) {
      const auto begin = [](Handover& handover, int arrivals) {
        init(handover.full, arrivals);
        init(handover.empty, kGroups * kWarps);
      };
      begin(own, 1);
      for (Handover& handover : of_s) begin(handover, arrivals_of_step);
      for (Handover& handover : of_dp) begin(handover, arrivals_of_step);
      fence_barrier_init();
    }
    __syncthreads();
  }
};

// By warps that have waited for products, which no lane starts before it has read `lse` or `delta`.
__device__ __forceinline__ void release(Handover& handover) {
  if (threadIdx.x % kWarp == 0) arrive(handover.empty);
}

// One for each row of a step, by a warp. Beyond the last query it is 0, like q and dout: then p is
// 1, met by a dout of 0, and dS is 0.
template <int kRows>
struct Numbers {
  float value[kRows / kWarp];

  __device__ __forceinline__ void load(const float* head, int first, int64_t N) {
#pragma unroll
    for (int i = 0; i < kRows / kWarp; ++i) {
      const int64_t n = first + i * kWarp + int(threadIdx.x);
      value[i] = n < N ? head[n] : 0.f;
    }
  }

  __device__ __forceinline__ void store(float (&shared)[kRows], Barrier& full) const {
#pragma unroll
    for (int i = 0; i < kRows / kWarp; ++i) shared[i * kWarp + threadIdx.x] = value[i];
    arrive(full);
  }
};

// kQueries: it is queries that are streamed, and each comes with its lse and delta.
template <bool kQueries>
constexpr int kArrivals = kQueries ? 1 + kWarp : 1;  // TMA's, and the lanes' of a warp

// By one warp.
template <bool kQueries, int kGroups, int kRows>
__device__ __forceinline__ void produce(const BackwardArgs& args, Shared<kGroups, kRows>& shared) {
  const Work& work = args.work;
  const Shape& shape = args.call.shape;
  const bool leads = threadIdx.x == 0;
  Ring<1> own;
  Ring<kStagesS> s_ring;
  Ring<kStagesDp> dp_ring;
  for (uint32_t tile = blockIdx.x; tile < work.tiling.count; tile += gridDim.x) {
    const Place place(work.tiling, tile, shared.kOwnRows);
    wait(shared.own.empty, own.parity ^ 1);
    own.next();
    if (leads) {
      Barrier& full = shared.own.full;
      arrive_and_expect(full, shared.own_s.kBytes + shared.own_dp.kBytes);
      shared.own_s.load(work.own_s, full, place.row, place.head, place.batch);
      shared.own_dp.load(work.own_dp, full, place.row, place.head, place.batch);
    }
#pragma unroll 1
    for (int step = work.steps; step-- > 0;) {
      const int row = step * kRows;
      const auto stream = [&](auto& ring, auto& handovers, auto& tiles, const TensorMap& map,
                              auto& numbers, const Numbers<kRows>& brought) {
        Handover& handover = handovers[ring.stage];
        wait(handover.empty, ring.parity ^ 1);
        if (leads) {
          arrive_and_expect(handover.full, Tile<kRows>::kBytes);
          tiles[ring.stage].load(map, handover.full, row, place.head, place.batch);
        }
        if constexpr (kQueries) brought.store(numbers[ring.stage], handover.full);
        ring.next();
      };
      // on their way while the warp waits for a buffer
      Numbers<kRows> lse, delta;
      if constexpr (kQueries) {
        lse.load(start_of(args.call.lse, shape, place), row, shape.Nq);
        delta.load(start_of(args.call.delta, shape, place), row, shape.Nq);
      }
      stream(s_ring, shared.of_s, shared.s, work.s, shared.lse, lse);
      stream(dp_ring, shared.of_dp, shared.dp, work.dp, shared.delta, delta);
    }
  }
}

template <int kRows>
using Scores = float[kRows / 2];  // [64, kRows]
template <int kRows>
using Weights = uint32_t[kRows / kDepthOfProduct][4];  // the same in 16 bits, to multiply from left
using Sums = float[kHeadDim / 2];                      // [64, 72]

// scores = (the group's rows of own) streamed^T
template <class T, int kOwnRows, int kRows>
__device__ __forceinline__ void start_scores(Scores<kRows>& scores, const Tile<kOwnRows>& own,
                                             int group, const Tile<kRows>& streamed) {
  pin(scores);
  fence_products();
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    multiply<T, kRows>(scores, own.columns(step, group * kRowsOfProduct), streamed.columns(step),
                       step > 0);
  }
  commit_products();
}

// sums += weights streamed
template <class T, int kRows>
__device__ __forceinline__ void start_sums(Sums& sums, Weights<kRows>& weights,
                                           const Tile<kRows>& streamed) {
  pin(sums);
  pin(weights);
  fence_products();
#pragma unroll
  for (int step = 0; step < kRows / kDepthOfProduct; ++step) {
    multiply<T, kHeadDim>(sums, weights[step], streamed.rows(step), true);
  }
  commit_products();
}

// A thread has two rows of a product, this one and the eighth after it, and of every eight columns
// this one and its neighbour.
__device__ __forceinline__ int row_of_thread() {
  return threadIdx.x % kWarpgroup / kWarp * 16 + threadIdx.x % kWarp / 4;
}
__device__ __forceinline__ int column_of_thread() {
  return threadIdx.x % 4 * 2;
}

// Fused, it might overflow where a score's last place is worth hundreds. With the product rounded,
// no weight exceeds 1: lse is at least that of the largest score.
__device__ __forceinline__ float weight(float score, float lse) {
  return exp2_approximate(__fmul_rn(kScale, score) - lse);
}

// A row's sum of dout * out, by the four threads that share it.
template <class T>
__device__ __forceinline__ float delta_of(const T* dout, const T* out, bool exists) {
  constexpr int kVectors = kHeadDim / kColumns;
  float sum = 0.f;
#pragma unroll
  for (int first = 0; first < kVectors; first += 4) {
    const int vector = first + threadIdx.x % 4;
    const int count = exists && vector < kVectors ? kColumns : 0;
    const Stored<T> a = load<true>(dout + vector * kColumns, count);
    const Stored<T> b = load<true>(out + vector * kColumns, count);
#pragma unroll
    for (int i = 0; i < kColumns; ++i) sum += widen(a.value[i]) * widen(b.value[i]);
  }
  sum += __shfl_xor_sync(~0u, sum, 1);
  return sum + __shfl_xor_sync(~0u, sum, 2);
}

// Rows are queries.
template <class T, int kGroups, int kKeys>
__device__ __forceinline__ void compute_dq(const BackwardArgs& args, Shared<kGroups, kKeys>& shared,
                                           int group) {
  const Work& work = args.work;
  const Backward& call = args.call;
  const Shape& shape = call.shape;
  Ring<1> own;
  Ring<kStagesS> s_ring;
  Ring<kStagesDp> dp_ring;
  for (uint32_t tile = blockIdx.x; tile < work.tiling.count; tile += gridDim.x) {
    const Place place(work.tiling, tile, shared.kOwnRows);
    const int row = place.row + group * kRowsOfProduct;
    Scores<kKeys> s, dp;
    Weights<kKeys> ds;
    Sums dq = {};

    const auto start_s = [&] {
      wait(shared.of_s[s_ring.stage].full, s_ring.parity);
      start_scores<T>(s, shared.own_s, group, shared.s[s_ring.stage]);
    };
    const auto start_dp = [&] {
      wait(shared.of_dp[dp_ring.stage].full, dp_ring.parity);
      start_scores<T>(dp, shared.own_dp, group, shared.dp[dp_ring.stage]);
    };

    wait(shared.own.full, own.parity);
    own.next();
    start_s();
    start_dp();
    float lse[2], delta[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t n = row + row_of_thread() + 8 * half;
      const bool exists = n < shape.Nq;
      delta[half] = delta_of(start_of<const T>(call.dout, place) + n * call.dout.stride_n,
                             start_of<const T>(call.out, place) + n * call.out.stride_n, exists);
      lse[half] = exists ? start_of(call.lse, shape, place)[n] : 0.f;
      if (exists && threadIdx.x % 4 == 0) start_of(call.delta, shape, place)[n] = delta[half];
    }
    const auto take_weights = [&] {
#pragma unroll
      for (int i = 0; i < kKeys / 2; ++i) s[i] = weight(s[i], lse[i / 2 % 2]);
    };
    const auto take_ds = [&] {
#pragma unroll
      for (int i = 0; i < kKeys / 2; ++i) s[i] *= dp[i] - delta[i / 2 % 2];
#pragma unroll
      for (int i = 0; i < kKeys / 4; ++i) ds[i / 4][i % 4] = pack<T>(s[2 * i], s[2 * i + 1]);
    };

    wait_products<0>(s, dp);
    release(shared.of_dp[dp_ring.stage]);
    dp_ring.next();
    take_weights();
    // the score of no key is 0, whose weight may overflow where all others are far below
    const int left = int(shape.Nk - int64_t(work.steps - 1) * kKeys) - column_of_thread();
#pragma unroll
    for (int i = 0; i < kKeys / 2; ++i) {
      if (i / 4 * 8 + i % 2 >= left) s[i] = 0.f;
    }
    take_ds();
    for (int step = 1; step < work.steps; ++step) {
      const int last = s_ring.stage;
      s_ring.next();
      start_s();
      start_sums<T, kKeys>(dq, ds, shared.s[last]);
      start_dp();
      wait_products<2>(s);
      take_weights();
      pin(s);
      // has come; but the compiler, which would put exponentials off until all products have ended,
      // does not put them off past a loop
      wait(shared.of_dp[dp_ring.stage].full, dp_ring.parity);
      wait_products<0>(dp, dq, ds);
      release(shared.of_s[last]);
      release(shared.of_dp[dp_ring.stage]);
      dp_ring.next();
      take_ds();
    }
    release(shared.own);
    start_sums<T, kKeys>(dq, ds, shared.s[s_ring.stage]);
    wait_products<0>(dq, ds);
    release(shared.of_s[s_ring.stage]);
    s_ring.next();
    store_rows<T>(dq, {kSigma, kSigma}, call.dq, place.batch, place.head, row, int(shape.Nq));
  }
}

// Rows are keys.
template <class T, int kGroups, int kQueries>
__device__ __forceinline__ void compute_dkdv(const BackwardArgs& args,
                                             Shared<kGroups, kQueries>& shared, int group) {
  const Work& work = args.work;
  Ring<1> own;
  Ring<kStagesS> s_ring;
  Ring<kStagesDp> dp_ring;
  for (uint32_t tile = blockIdx.x; tile < work.tiling.count; tile += gridDim.x) {
    const Place place(work.tiling, tile, shared.kOwnRows);
    Scores<kQueries> s, dp;
    Weights<kQueries> p, ds;
    Sums dk = {}, dv = {};

    const auto start_s = [&] {
      wait(shared.of_s[s_ring.stage].full, s_ring.parity);
      start_scores<T>(s, shared.own_s, group, shared.s[s_ring.stage]);
    };
    const auto take_weights = [&] {
      const float* lse = shared.lse[s_ring.stage] + column_of_thread();
#pragma unroll
      for (int i = 0; i < kQueries / 2; ++i) s[i] = weight(s[i], lse[i / 4 * 8 + i % 2]);
    };
    const auto take_dp_and_ds = [&] {
      start_scores<T>(dp, shared.own_dp, group, shared.dp[dp_ring.stage]);
      wait_products<0>(dp);
      const float* delta = shared.delta[dp_ring.stage] + column_of_thread();
#pragma unroll
      for (int i = 0; i < kQueries / 4; ++i) {
        const int column = i / 2 * 8;
        p[i / 4][i % 4] = pack<T>(s[2 * i], s[2 * i + 1]);
        ds[i / 4][i % 4] = pack<T>(s[2 * i] * (dp[2 * i] - delta[column]),
                                   s[2 * i + 1] * (dp[2 * i + 1] - delta[column + 1]));
      }
    };

    wait(shared.own.full, own.parity);
    own.next();
    start_s();
    wait_products<0>(s);
    take_weights();
    wait(shared.of_dp[dp_ring.stage].full, dp_ring.parity);
    take_dp_and_ds();
    for (int step = 1; step < work.steps; ++step) {
      const int last_s = s_ring.stage, last_dp = dp_ring.stage;
      s_ring.next();
      dp_ring.next();
      start_s();
      start_sums<T, kQueries>(dv, p, shared.dp[last_dp]);
      start_sums<T, kQueries>(dk, ds, shared.s[last_s]);
      wait_products<2>(s);
      take_weights();
      pin(s);
      // here and not after the wait for products, for the same reason as in compute_dq
      wait(shared.of_dp[dp_ring.stage].full, dp_ring.parity);
      wait_products<0>(dv, dk, p, ds);
      release(shared.of_s[last_s]);
      release(shared.of_dp[last_dp]);
      take_dp_and_ds();
    }
    release(shared.own);
    start_sums<T, kQueries>(dv, p, shared.dp[dp_ring.stage]);
    start_sums<T, kQueries>(dk, ds, shared.s[s_ring.stage]);
    wait_products<0>(dv, dk, p, ds);
    release(shared.of_s[s_ring.stage]);
    release(shared.of_dp[dp_ring.stage]);
    s_ring.next();
    dp_ring.next();
    const int row = place.row + group * kRowsOfProduct;
    const Backward& call = args.call;
    const int Nk = int(call.shape.Nk);
    store_rows<T>(dk, {kSigma, kSigma}, call.dk, place.batch, place.head, row, Nk);
    store_rows<T>(dv, {1.f, 1.f}, call.dv, place.batch, place.head, row, Nk);
  }
}

// The first warpgroup copies, the others call compute(shared, group). Two of them take registers
// from it; with one there are enough for all.
template <bool kQueries, int kGroups, int kRows, class Compute>
__device__ __forceinline__ void run(const BackwardArgs& args, Compute compute) {
  auto& shared = *reinterpret_cast<Shared<kGroups, kRows>*>(dynamic_shared());
  shared.begin(kArrivals<kQueries>);
  // from lane 0, so that the compiler knows that it is one number for all
  const int group = __shfl_sync(~0u, int(threadIdx.x / kWarpgroup), 0) - 1;
  if (group < 0) {
    if constexpr (kGroups > 1) give_registers<24>();
    if (threadIdx.x < kWarp) produce<kQueries>(args, shared);
  } else {
    if constexpr (kGroups > 1) take_registers<240>();
    compute(shared, group);
  }
}

template <class T, int kGroups, int kKeys>
__global__ void __launch_bounds__(kThreads<kGroups>, 1)
    dq_kernel(const __grid_constant__ BackwardArgs args) {
  run<false, kGroups, kKeys>(args,
                             [&](auto& shared, int group) { compute_dq<T>(args, shared, group); });
}

template <class T, int kGroups, int kQueries>
__global__ void __launch_bounds__(kThreads<kGroups>, 1)
    dkdv_kernel(const __grid_constant__ BackwardArgs args) {
  run<true, kGroups, kQueries>(
      args, [&](auto& shared, int group) { compute_dkdv<T>(args, shared, group); });
}

// What a kernel owns or streams: two tensors of N rows to a head.
struct Side {
  const Heads &s, &dp;
  int64_t N;
};

template <auto kKernel, int kGroups, int kRows>
void launch_for(const char* name, const Backward& call, const Side& own, const Side& streamed,
                void* stream) {
  using Memory = Shared<kGroups, kRows>;
  static_assert(sizeof(Memory) <= kMostShared);
  const Shape& shape = call.shape;
  const BackwardArgs args{
      {map_of(own.s, call.dtype, own.N, shape, Memory::kOwnRows),
       map_of(own.dp, call.dtype, own.N, shape, Memory::kOwnRows),
       map_of(streamed.s, call.dtype, streamed.N, shape, kRows),
       map_of(streamed.dp, call.dtype, streamed.N, shape, kRows),
       Tiling(shape, own.N, Memory::kOwnRows), int(ceil_div(streamed.N, kRows))},
      call};
  launch<kKernel, kThreads<kGroups>, int(sizeof(Memory))>(name, args.work.tiling.blocks(),
                                                          kThreads<kGroups>, stream, args);
}

// Steps of 128 rows fit into the registers of two warpgroups, and their products read less shared
// memory, for what they compute, than those of 64.
Cut cut_of(const Shape& shape, int64_t N) {
  return asked_or_chosen("PIXART_ATTENTION_BWD_TILE", {{1, 128}, {2, 128}, {2, 64}}, shape, N);
}

// Calls f(groups, rows) with constants.
template <class F>
void visit(const Cut& cut, F f) {
  using std::integral_constant;
  using Two = integral_constant<int, 2>;
  if (cut.rows == 64) return f(Two{}, integral_constant<int, 64>{});
  if (cut.groups == 2) return f(Two{}, integral_constant<int, 128>{});
  f(integral_constant<int, 1>{}, integral_constant<int, 128>{});
}

template <class T>
void backward(const Backward& call, void* stream) {
  const Side queries{call.q, call.dout, call.shape.Nq}, keys{call.k, call.v, call.shape.Nk};
  visit(cut_of(call.shape, queries.N), [&](auto groups, auto rows) {
    launch_for<dq_kernel<T, groups, rows>, groups, rows>("attention's dq", call, queries, keys,
                                                         stream);
  });
  visit(cut_of(call.shape, keys.N), [&](auto groups, auto rows) {
    launch_for<dkdv_kernel<T, groups, rows>, groups, rows>("attention's dk and dv", call, keys,
                                                           queries, stream);
  });
}

}  // namespace

void backward_sm90(const Backward& call, void* stream) {
  if (call.dtype == DType::kBFloat16) {
    backward<Bf16>(call, stream);
  } else {
    backward<Fp16>(call, stream);
  }
}

}  // namespace pixart::attention
