// CAME on the CPU. Formulas: pixart_kernels/came/README.md.
//
// A weight of a few hundred thousand elements stays in a core's caches while one thread takes it
// through all four passes; a larger one is shared among the threads, pass by pass.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "../include/vec.h"
#include "came.h"

namespace pixart::came {
namespace {

// Fewer elements than this are not worth waking another thread for.
constexpr int64_t kElementsPerThread = 32768;
// Weights up to this size are shared out whole.
constexpr int64_t kWholeElements = 1 << 19;
// A running sum is one of 32 over at most so many elements of a row: their rounding stays small.
constexpr int64_t kSpan = 8192;

// Sum of body(i, lanes) over a row.
template <class Body>
PIXART_INLINE double sum_over(int64_t length, Body body) {
  double total = 0;
  for (int64_t begin = 0; begin < length; begin += kSpan) {
    Sum sum;
    const int64_t here = std::min(kSpan, length - begin);
    for_lanes(here, [&](int64_t i, auto lanes, auto slot) __attribute__((always_inline)) {
      sum.slot[slot] += body(begin + i, lanes);
    });
    total += sum.total();
  }
  return total;
}

// What divides an update so that its root mean square is at most the threshold; NaN stays NaN.
float clip_of(double squares, int64_t numel, double threshold) {
  const double clip = std::sqrt(squares / numel) / threshold;
  return static_cast<float>(clip < 1 ? 1 : clip);
}

// Calls body(first, last) for parts of `count` parameters of `numel` elements, parts shared among
// torch's threads; for all of them at once if each is better shared itself.
template <class Body>
void for_parameters(int64_t count, int64_t numel, Body body) {
  const int64_t threads = torch::stable::get_num_threads();
  const bool too_few = count < std::min(threads, numel / kElementsPerThread);
  if (numel > kWholeElements || too_few) return body(0, count);
  const int64_t grain = std::max<int64_t>(1, kElementsPerThread / numel);
  torch::stable::parallel_for(0, count, grain, body);
}

// One weight's step. Rows are cut into blocks by shape alone, and what blocks sum is added in
// their order: no result depends on the number of threads.
class MatricesStep {
 public:
  explicit MatricesStep(const MatricesCall& call)
      : settings_(call.settings),
        shape_(call.shape),
        weight_dtype_(call.weight_dtype),
        gradient_dtype_(call.gradient_dtype),
        // 32 rows amortise a block's sums over columns; more where rows are short
        block_rows_(std::clamp<int64_t>(kElementsPerThread / shape_.C, 32, 256)),
        blocks_((shape_.R + block_rows_ - 1) / block_rows_),
        stride_(padded_to_lanes(shape_.C)),
        row_(shape_.count * shape_.R),
        column_(shape_.count * stride_),
        columns_(stride_),
        partial_(shape_.count * blocks_ * stride_),
        squares_(shape_.count * blocks_) {}

  void operator()(const Matrices& of) {
    visit(gradient_dtype_, [&](auto tag) { take_gradient<typename decltype(tag)::type>(of); });
    visit(weight_dtype_, [&](auto tag) { update<typename decltype(tag)::type>(of); });
  }

 private:
  // Calls body(block, its matrix in column_, first row, last row) for each block, blocks shared
  // among torch's threads.
  template <class Body>
  void for_blocks(Body body) {
    const int64_t elements = std::min(block_rows_, shape_.R) * shape_.C;
    const int64_t grain = std::max<int64_t>(1, kElementsPerThread / elements);
    torch::stable::parallel_for(0, shape_.count * blocks_, grain, [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block) {
        const int64_t matrix = block / blocks_, first = block % blocks_ * block_rows_;
        const int64_t last = std::min(first + block_rows_, shape_.R);
        body(block, matrix * stride_, matrix * shape_.R + first, matrix * shape_.R + last);
      }
    });
  }

  template <class G>
  void take_gradient(const Matrices& of) {
    const int64_t C = shape_.C;
    const G* gradient = static_cast<const G*>(of.gradient);
    // sums of g^2
    for_blocks([&](int64_t block, int64_t, int64_t first, int64_t last) {
      float* sums = cleared_partial(block);
      for (int64_t r = first; r < last; ++r) {
        const G* g = gradient + r * C;
        row_[r] = sum_over(C, [&](int64_t d, auto lanes) __attribute__((always_inline)) {
          const F32x8 v = load(g + d, lanes), square = v * v;
          store(sums + d, load(sums + d, All{}) + square, All{});
          return square;
        });
      }
    });
    factors(of.exp_avg_sq_row, of.exp_avg_sq_col, settings_.beta_square, settings_.eps_square);

    // sums of (g r c)^2
    for_blocks([&](int64_t block, int64_t column, int64_t first, int64_t last) {
      const float* c = &column_[column];
      double total = 0;
      for (int64_t r = first; r < last; ++r) {
        const G* g = gradient + r * C;
        const double sum = sum_over(C, [&](int64_t d, auto lanes) __attribute__((always_inline)) {
          const F32x8 v = load(g + d, lanes) * load(c + d, All{});
          return v * v;
        });
        total += sum * row_[r] * row_[r];
      }
      squares_[block] = total;
    });
    double squares = 0;
    for (double square : squares_) squares += square;
    const float clip = clip_of(squares, shape_.numel(), settings_.clip_threshold);
    for (float& r : row_) r /= clip;

    // the moment, and sums of (u - m')^2
    const float beta = settings_.beta_moment, share = 1 - settings_.beta_moment;
    for_blocks([&](int64_t block, int64_t column, int64_t first, int64_t last) {
      const float* c = &column_[column];
      float* sums = cleared_partial(block);
      for (int64_t r = first; r < last; ++r) {
        const G* g = gradient + r * C;
        float* m = of.exp_avg + r * C;
        const F32x8 factor = splat(row_[r]);
        row_[r] = sum_over(C, [&](int64_t d, auto lanes) __attribute__((always_inline)) {
          const F32x8 moment = load(m + d, lanes);
          const F32x8 ahead = load(g + d, lanes) * (factor * load(c + d, All{})) - moment;
          store(m + d, moment + share * ahead, lanes);
          const F32x8 deviation = beta * ahead, square = deviation * deviation;
          store(sums + d, load(sums + d, All{}) + square, All{});
          return keep(square, lanes);
        });
      }
    });
    factors(of.exp_avg_res_row, of.exp_avg_res_col, settings_.beta_deviation,
            settings_.eps_deviation);
  }

  template <class W>
  void update(const Matrices& of) {
    const int64_t C = shape_.C;
    const float lr = settings_.lr, decay = settings_.lr * settings_.weight_decay;
    for_blocks([&](int64_t, int64_t column, int64_t first, int64_t last) {
      const float* c = &column_[column];
      for (int64_t r = first; r < last; ++r) {
        W* weight = static_cast<W*>(of.weight) + r * C;
        const float* m = of.exp_avg + r * C;
        const F32x8 factor = splat(lr * row_[r]);
        for_lanes(C, [&](int64_t d, auto lanes, auto) __attribute__((always_inline)) {
          const F32x8 change = load(m + d, lanes) * (factor * load(c + d, All{}));
          const F32x8 w = load(weight + d, lanes);
          store(weight + d, rounded_to<W>(w - decay * w) - change, lanes);
        });
      }
    });
  }

  float* cleared_partial(int64_t block) {
    float* sums = &partial_[block * stride_];
    std::fill_n(sums, stride_, 0.f);
    return sums;
  }

  // Takes means of the squares that row_ and partial_ hold the sums of into the averages; leaves
  // 1 / sqrt of these in row_ and column_, the row's relative to the mean of its matrix.
  void factors(float* row_average, float* column_average, double beta, float eps) {
    const int64_t R = shape_.R, C = shape_.C;
    const float share = 1 - beta;
    for (int64_t matrix = 0; matrix < shape_.count; ++matrix) {
      std::fill_n(columns_.data(), C, 0.);
      for (int64_t block = matrix * blocks_; block < (matrix + 1) * blocks_; ++block) {
        const float* sums = &partial_[block * stride_];
        for (int64_t d = 0; d < C; ++d) columns_[d] += sums[d];
      }
      float *average = column_average + matrix * C, *factor = &column_[matrix * stride_];
      for (int64_t d = 0; d < C; ++d) {
        const float mean = static_cast<float>(columns_[d]) / R + eps;
        average[d] += share * (mean - average[d]);
        factor[d] = 1.f / std::sqrt(average[d]);
      }
      average = row_average + matrix * R;
      factor = &row_[matrix * R];
      for (int64_t r = 0; r < R; ++r) average[r] += share * (factor[r] / C + eps - average[r]);
      const float mean =
          sum_over(R, [&](int64_t r, auto lanes) { return load(average + r, lanes); }) / R;
      for (int64_t r = 0; r < R; ++r) factor[r] = 1.f / std::sqrt(average[r] / mean);
    }
  }

  const Settings& settings_;
  const Shape& shape_;
  const DType weight_dtype_, gradient_dtype_;
  const int64_t block_rows_, blocks_, stride_;
  std::vector<float> row_;       // [count, R]
  std::vector<float> column_;    // [count, stride]
  std::vector<double> columns_;  // [stride]
  std::vector<float> partial_;   // [count, blocks, stride]
  std::vector<double> squares_;  // [count, blocks]
};

template <class W, class G>
void step_vector(const VectorsCall& call, const Vector& of) {
  const Settings& settings = call.settings;
  const auto* gradient = static_cast<const G*>(of.gradient);
  auto* weight = static_cast<W*>(of.weight);
  const int64_t N = call.N, spans = (N + kSpan - 1) / kSpan;
  const auto for_spans = [&](auto body) {
    const auto several = [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) body(i, i * kSpan, std::min(kSpan, N - i * kSpan));
    };
    torch::stable::parallel_for(0, spans, kElementsPerThread / kSpan, several);
  };
  std::vector<double> squares(spans);
  const float eps = settings.eps_square, share = 1 - settings.beta_square;
  for_spans([&](int64_t i, int64_t first, int64_t length) {
    const G* g = gradient + first;
    float* averages = of.exp_avg_sq + first;
    squares[i] = sum_over(length, [&](int64_t d, auto lanes) __attribute__((always_inline)) {
      const F32x8 v = load(g + d, lanes), square = v * v;
      F32x8 average = load(averages + d, lanes);
      average += share * (square + eps - average);
      store(averages + d, average, lanes);
      return keep(square / average, lanes);
    });
  });
  double total = 0;
  for (double square : squares) total += square;
  const float clip = clip_of(total, N, settings.clip_threshold);
  const float lr = settings.lr, decay = settings.lr * settings.weight_decay;
  const float moment_share = 1 - settings.beta_moment;
  for_spans([&](int64_t, int64_t first, int64_t length) {
    const G* g = gradient + first;
    const float* averages = of.exp_avg_sq + first;
    float* m = of.exp_avg + first;
    W* w = weight + first;
    for_lanes(length, [&](int64_t d, auto lanes, auto) __attribute__((always_inline)) {
      const F32x8 update = load(g + d, lanes) / (clip * square_root(load(averages + d, lanes)));
      F32x8 moment = load(m + d, lanes);
      moment += moment_share * (update - moment);
      store(m + d, moment, lanes);
      const F32x8 v = load(w + d, lanes);
      store(w + d, rounded_to<W>(v - decay * v) - lr * moment, lanes);
    });
  });
}

}  // namespace

void step(const MatricesCall& call) {
  for_parameters(call.parameters.size(), call.shape.numel(), [&](int64_t begin, int64_t end) {
    MatricesStep step(call);
    for (int64_t i = begin; i < end; ++i) step(call.parameters[i]);
  });
}

void step(const VectorsCall& call) {
  for_parameters(call.parameters.size(), call.N, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      visit(call.weight_dtype, [&](auto w) {
        visit(call.gradient_dtype, [&](auto g) {
          step_vector<typename decltype(w)::type, typename decltype(g)::type>(call,
                                                                              call.parameters[i]);
        });
      });
    }
  });
}

}  // namespace pixart::came
