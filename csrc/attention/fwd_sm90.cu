// Attention's forward on sm_90a. Formulas: pixart_kernels/attention/README.md.
//
// One warpgroup copies; the others own 64 queries each and meet the same tiles of keys, from the
// last, which may be short, down to the first. The scores of a warpgroup's next tile are computed
// while its present one goes through the softmax, and warpgroups start their products by turns, so
// that one's softmax also runs beside the other's products.
#include "sm90.cuh"

namespace pixart::attention {
namespace {

using hopper::kWarpgroup;

constexpr int kRows = hopper::kRowsOfProduct;  // of a warpgroup
constexpr int kStages = 2;                     // tiles of keys under way

struct ForwardArgs {
  TensorMap q, k, v;
  Heads out;
  float* lse;  // [B, H, Nq]
  int Nq, Nk, tiles_of_keys;
  Tiling tiling;
};

template <int kGroups, int kKeys>
struct Shared {
  Tile<kGroups * kRows> q;
  Tile<kKeys> k[kStages], v[kStages];
  Barrier q_full, q_empty;
  Barrier k_full[kStages], k_empty[kStages], v_full[kStages], v_empty[kStages];

  __device__ __forceinline__ void init() {
    constexpr int kWarps = kGroups * kWarpgroup / 32;
    hopper::init(q_full, 1);
    hopper::init(q_empty, kWarps);
    for (int stage = 0; stage < kStages; ++stage) {
      hopper::init(k_full[stage], 1);
      hopper::init(v_full[stage], 1);
      hopper::init(k_empty[stage], kWarps);
      hopper::init(v_empty[stage], kWarps);
    }
    hopper::fence_barrier_init();
  }
};

// By one thread.
template <int kGroups, int kKeys>
__device__ void produce(const ForwardArgs& args, Shared<kGroups, kKeys>& shared) {
  Ring<kStages> keys, values;
  Ring<1> queries;
  const auto load_values = [&](const Place& place, int j) {
    hopper::wait(shared.v_empty[values.stage], values.parity ^ 1);
    Barrier& full = shared.v_full[values.stage];
    hopper::arrive_and_expect(full, Tile<kKeys>::kBytes);
    shared.v[values.stage].load(args.v, full, j * kKeys, place.head, place.batch);
    values.next();
  };
  for (uint32_t tile = blockIdx.x; tile < args.tiling.count; tile += gridDim.x) {
    const Place place(args.tiling, tile, kGroups * kRows);
    hopper::wait(shared.q_empty, queries.parity ^ 1);
    hopper::arrive_and_expect(shared.q_full, Tile<kGroups * kRows>::kBytes);
    shared.q.load(args.q, shared.q_full, place.row, place.head, place.batch);
    queries.next();
#pragma unroll 1
    for (int j = args.tiles_of_keys; j-- > 0;) {
      hopper::wait(shared.k_empty[keys.stage], keys.parity ^ 1);
      Barrier& full = shared.k_full[keys.stage];
      hopper::arrive_and_expect(full, Tile<kKeys>::kBytes);
      shared.k[keys.stage].load(args.k, full, j * kKeys, place.head, place.batch);
      keys.next();
      // in the order in which they are needed
      if (j + 1 < args.tiles_of_keys) load_values(place, j + 1);
    }
    load_values(place, 0);
  }
}

// One warpgroup's 64 queries. A thread has parts of two rows, 8 apart.
template <class T, int kGroups, int kKeys>
class Consumer {
 public:
  __device__ __forceinline__ Consumer(const ForwardArgs& args, Shared<kGroups, kKeys>& shared,
                                      int group)
      : args_(args), shared_(shared), group_(group) {}

  __device__ __forceinline__ void run() {
    if (kGroups > 1 && group_ == kGroups - 1) pass_turn();
    for (uint32_t tile = blockIdx.x; tile < args_.tiling.count; tile += gridDim.x) attend(tile);
    // so that no arrival is left behind
    if (kGroups > 1 && group_ == 0) take_turn();
  }

 private:
  static constexpr int kScores = kKeys / 2, kOut = kHeadDim / 2;  // of a thread
  static constexpr int kKeySteps = kKeys / hopper::kDepthOfProduct;

  __device__ __forceinline__ void attend(uint32_t tile) {
    const Place place(args_.tiling, tile, kGroups * kRows);
    hopper::wait(shared_.q_full, queries_.parity);
    queries_.next();
    float scores[kScores], out[kOut], rescale[2];
    uint32_t weights[kKeySteps][4];
#pragma unroll
    for (int i = 0; i < kOut; ++i) out[i] = 0.f;

    await_keys();
    start_scores(scores);
    end_scores<0>(scores, args_.tiles_of_keys == 1);
    mask(scores, args_.Nk - (args_.tiles_of_keys - 1) * kKeys);
    max_[0] = max_[1] = -INFINITY;
    sum_[0] = sum_[1] = 0.f;
    weigh(scores, rescale);
    round(scores, weights);

    if (args_.tiles_of_keys > 1) await_keys();
    for (int j = args_.tiles_of_keys - 1; j-- > 0;) {
      take_turn();
      start_scores(scores);
      hopper::wait(shared_.v_full[values_.stage], values_.parity);
      start_out(out, weights);
      pass_turn();
      end_scores<1>(scores, j == 0);
      weigh(scores, rescale);
      // The compiler would wait for the products before it takes the weights' exponentials, which
      // are to run beside them; it moves neither across a loop, which this is.
      hopper::pin(scores);
      if (j > 0) await_keys();
      end_out(out, weights);
#pragma unroll
      for (int i = 0; i < kOut; ++i) out[i] *= rescale[i / 2 % 2];
      round(scores, weights);
    }
    hopper::wait(shared_.v_full[values_.stage], values_.parity);
    start_out(out, weights);
    end_out(out, weights);
    finish(out, place);
  }

  // Barriers 1 to kGroups: it is the turn of that group.
  __device__ __forceinline__ void take_turn() {
    if (kGroups > 1) hopper::sync_named(1 + group_, 2 * kWarpgroup);
  }
  __device__ __forceinline__ void pass_turn() {
    if (kGroups > 1) hopper::arrive_named(1 + (group_ + 1) % kGroups, 2 * kWarpgroup);
  }

  __device__ __forceinline__ void await_keys() {
    hopper::wait(shared_.k_full[keys_.stage], keys_.parity);
  }

  __device__ __forceinline__ void release(Barrier& empty) {
    if (threadIdx.x % 32 == 0) hopper::arrive(empty);
  }

  __device__ __forceinline__ void start_scores(float (&scores)[kScores]) {
    hopper::pin(scores);
    hopper::fence_products();
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      hopper::multiply<T, kKeys>(scores, shared_.q.columns(step, group_ * kRows),
                                 shared_.k[keys_.stage].columns(step), step > 0);
    }
    hopper::commit_products();
  }

  template <int kBatches>
  __device__ __forceinline__ void end_scores(float (&scores)[kScores], bool last) {
    hopper::wait_products<kBatches>(scores);
    release(shared_.k_empty[keys_.stage]);
    keys_.next();
    if (last) release(shared_.q_empty);
  }

  __device__ __forceinline__ void start_out(float (&out)[kOut], uint32_t (&weights)[kKeySteps][4]) {
    hopper::pin(out);
    hopper::pin(weights);
    hopper::fence_products();
#pragma unroll
    for (int step = 0; step < kKeySteps; ++step) {
      hopper::multiply<T, kHeadDim>(out, weights[step], shared_.v[values_.stage].rows(step), true);
    }
    hopper::commit_products();
  }

  __device__ __forceinline__ void end_out(float (&out)[kOut], uint32_t (&weights)[kKeySteps][4]) {
    hopper::wait_products<0>(out, weights);
    release(shared_.v_empty[values_.stage]);
    values_.next();
  }

  // Keys that are not there weigh nothing.
  __device__ __forceinline__ void mask(float (&scores)[kScores], int keys) {
    if (keys >= kKeys) return;
#pragma unroll
    for (int i = 0; i < kScores; ++i) {
      const int key = i / 4 * 8 + threadIdx.x % 4 * 2 + i % 2;
      if (key >= keys) scores[i] = -INFINITY;
    }
  }

  // Scores become weights, relative to the largest score so far; `rescale` is what those of earlier
  // keys, and all that was summed with them, are to be multiplied by.
  __device__ __forceinline__ void weigh(float (&scores)[kScores], float (&rescale)[2]) {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      float max = max_[row];
#pragma unroll
      for (int i = 2 * row; i < kScores; i += 4) max = fmaxf(max, fmaxf(scores[i], scores[i + 1]));
      max = fmaxf(max, __shfl_xor_sync(~0u, max, 1));
      max = fmaxf(max, __shfl_xor_sync(~0u, max, 2));
      rescale[row] = hopper::exp2_approximate(kScale * (max_[row] - max));
      max_[row] = max;
      sum_[row] *= rescale[row];
#pragma unroll
      for (int i = 2 * row; i < kScores; i += 4) {
        scores[i] = hopper::exp2_approximate(kScale * (scores[i] - max));
        scores[i + 1] = hopper::exp2_approximate(kScale * (scores[i + 1] - max));
        sum_[row] += scores[i] + scores[i + 1];
      }
    }
  }

  __device__ __forceinline__ void round(const float (&scores)[kScores],
                                        uint32_t (&weights)[kKeySteps][4]) {
#pragma unroll
    for (int i = 0; i < kScores; i += 2) {
      weights[i / 8][i / 2 % 4] = hopper::pack<T>(scores[i], scores[i + 1]);
    }
  }

  __device__ __forceinline__ void finish(const float (&out)[kOut], const Place& place) {
    const int first = place.row + group_ * kRows;
    const int thread = threadIdx.x % kWarpgroup;
    float factor[2];
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      sum_[row] += __shfl_xor_sync(~0u, sum_[row], 1);
      sum_[row] += __shfl_xor_sync(~0u, sum_[row], 2);
      factor[row] = __fdividef(1.f, sum_[row]);
      const int query = first + thread / 32 * 16 + thread % 32 / 4 + 8 * row;
      if (thread % 4 == 0 && query < args_.Nq) {
        const int64_t of_head = int64_t(place.batch) * args_.tiling.H + place.head;
        args_.lse[of_head * args_.Nq + query] = kScale * max_[row] + log2f(sum_[row]);
      }
    }
    store_rows<T>(out, factor, args_.out, place.batch, place.head, first, args_.Nq);
  }

  const ForwardArgs& args_;
  Shared<kGroups, kKeys>& shared_;
  const int group_;
  Ring<1> queries_;
  Ring<kStages> keys_, values_;
  float max_[2], sum_[2];
};

template <class T, int kGroups, int kKeys>
__global__ void __launch_bounds__(kThreads<kGroups>, 1)
    fwd_kernel(const __grid_constant__ ForwardArgs args) {
  auto& shared = *reinterpret_cast<Shared<kGroups, kKeys>*>(hopper::dynamic_shared());
  if (threadIdx.x == 0) shared.init();
  __syncthreads();
  // two warpgroups leave registers for all
  constexpr bool kScarce = kGroups > 1;
  constexpr int kProducer = kGroups == 2 ? 24 : 32, kConsumer = kGroups == 2 ? 240 : 160;
  // from lane 0, so that the compiler knows that it is one number for all
  const int group = __shfl_sync(~0u, int(threadIdx.x / kWarpgroup), 0) - 1;
  if (group < 0) {
    if constexpr (kScarce) hopper::give_registers<kProducer>();
    if (threadIdx.x == 0) produce(args, shared);
  } else {
    if constexpr (kScarce) hopper::take_registers<kConsumer>();
    Consumer<T, kGroups, kKeys>(args, shared, group).run();
  }
}

template <class T, int kGroups, int kKeys>
void launch_forward(const Forward& call, void* stream) {
  constexpr int kQueries = kGroups * kRows;
  constexpr int kBytes = sizeof(Shared<kGroups, kKeys>);
  static_assert(kBytes <= hopper::kMostShared);
  const Shape& shape = call.shape;
  const ForwardArgs args{
      map_of(call.q, call.dtype, shape.Nq, shape, kQueries),
      map_of(call.k, call.dtype, shape.Nk, shape, kKeys),
      map_of(call.v, call.dtype, shape.Nk, shape, kKeys),
      call.out,
      call.lse,
      int(shape.Nq),
      int(shape.Nk),
      int(ceil_div(shape.Nk, kKeys)),
      Tiling(shape, shape.Nq, kQueries),
  };
  launch<fwd_kernel<T, kGroups, kKeys>, kThreads<kGroups>, kBytes>(
      "attention", args.tiling.blocks(), kThreads<kGroups>, stream, args);
}

template <class T>
void forward(const Forward& call, void* stream) {
  // Tiles of 128 queries divide the powers of two that images have tokens, and 1024 tokens of 32
  // heads fill 97 % of two waves of 132 multiprocessors, where 192 queries fill 73 %.
  const Cut cut = asked_or_chosen("PIXART_ATTENTION_TILE", {{1, 128}, {2, 128}, {3, 128}, {2, 176}},
                                  call.shape, call.shape.Nq);
  if (cut.rows == 176) return launch_forward<T, 2, 176>(call, stream);
  if (cut.groups == 1) return launch_forward<T, 1, 128>(call, stream);
  if (cut.groups == 2) return launch_forward<T, 2, 128>(call, stream);
  return launch_forward<T, 3, 128>(call, stream);
}

}  // namespace

void forward_sm90(const Forward& call, void* stream) {
  if (call.dtype == DType::kBFloat16) {
    forward<Bf16>(call, stream);
  } else {
    forward<Fp16>(call, stream);
  }
}

}  // namespace pixart::attention
