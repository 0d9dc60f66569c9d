// Eight fp32 lanes: loads that widen, stores that round once, and a walk over a row of any length.
//
// The arithmetic is the compiler's vector extension, which GCC and Clang lower to whatever the
// target has; the 16-bit conversions name AVX2 instructions that GCC 12 does not reach by itself
// (an in-cache bf16 forward took 0.18 ms without them and 0.135 ms with).
#pragma once

#include <torch/headeronly/util/Half.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#ifdef __AVX2__
#include <immintrin.h>
#endif

#include "dtype.h"

#define PIXART_INLINE inline __attribute__((always_inline))

namespace pixart {

constexpr int kLanes = 8;

using F32x8 = float __attribute__((vector_size(32)));
using I32x8 = int32_t __attribute__((vector_size(32)));
using U32x8 = uint32_t __attribute__((vector_size(32)));
using U16x8 = uint16_t __attribute__((vector_size(16)));

// Which lanes of a vector lie inside the row.
struct All {};
struct First {
  int count;
};

PIXART_INLINE F32x8 splat(float value) {
  return F32x8{} + value;
}

PIXART_INLINE F32x8 keep(F32x8 v, All) {
  return v;
}
PIXART_INLINE F32x8 keep(F32x8 v, First lanes) {
  const I32x8 index = {0, 1, 2, 3, 4, 5, 6, 7};
  return (F32x8)((I32x8)v & (I32x8)(index < lanes.count));
}

PIXART_INLINE F32x8 widen(const float* p) {
  F32x8 v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

PIXART_INLINE F32x8 widen(const Bf16* p) {
#ifdef __AVX2__
  const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return (F32x8)_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16);
#else
  U16x8 half;
  std::memcpy(&half, p, sizeof half);
  return (F32x8)(__builtin_convertvector(half, U32x8) << 16);
#endif
}

PIXART_INLINE F32x8 widen(const Fp16* p) {
#ifdef __AVX2__
  return (F32x8)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  using torch::headeronly::Half;
  F32x8 v;
  for (int i = 0; i < kLanes; ++i) v[i] = float(Half(p[i].bits, Half::from_bits()));
  return v;
#endif
}

PIXART_INLINE void narrow(float* p, F32x8 v) {
  std::memcpy(p, &v, sizeof v);
}

// The upper half of each lane, rounded to nearest even. A NaN becomes all ones, another NaN: the
// rounding bias alone could carry it over into zero.
PIXART_INLINE U32x8 bf16_bits(F32x8 v) {
  const U32x8 bits = (U32x8)v;
  const U32x8 biased = bits + 0x7fffu + ((bits >> 16) & 1u);
  return (biased | (U32x8)(v != v)) >> 16;
}

PIXART_INLINE void narrow(Bf16* p, F32x8 v) {
  const U32x8 bits = bf16_bits(v);
#ifdef __AVX2__
  const __m256i wide = (__m256i)bits;
  const __m128i high = _mm256_extracti128_si256(wide, 1);
  const __m128i half = _mm_packus_epi32(_mm256_castsi256_si128(wide), high);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), half);
#else
  const U16x8 half = __builtin_convertvector(bits, U16x8);
  std::memcpy(p, &half, sizeof half);
#endif
}

PIXART_INLINE void narrow(Fp16* p, F32x8 v) {
#ifdef __AVX2__
  const __m128i half = _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), half);
#else
  for (int i = 0; i < kLanes; ++i) p[i].bits = torch::headeronly::Half(float(v[i])).x;
#endif
}

template <class T>
PIXART_INLINE F32x8 load(const T* p, All) {
  return widen(p);
}

// Lanes past the row's end are zero.
template <class T>
PIXART_INLINE F32x8 load(const T* p, First lanes) {
  T padded[kLanes] = {};
  std::memcpy(padded, p, lanes.count * sizeof(T));
  return widen(padded);
}

template <class T>
PIXART_INLINE void store(T* p, F32x8 v, All) {
  narrow(p, v);
}

template <class T>
PIXART_INLINE void store(T* p, F32x8 v, First lanes) {
  T padded[kLanes];
  narrow(padded, v);
  std::memcpy(p, padded, lanes.count * sizeof(T));
}

// The value that a load of what was stored as T would give.
template <class T>
PIXART_INLINE F32x8 rounded_to(F32x8 v) {
  if constexpr (std::is_same_v<T, float>) {
    return v;
  } else if constexpr (std::is_same_v<T, Bf16>) {
    return (F32x8)(bf16_bits(v) << 16);
  } else {
    T stored[kLanes];
    narrow(stored, v);
    return widen(stored);
  }
}

// The bounds leave a NaN as it is.
PIXART_INLINE F32x8 at_least(F32x8 v, float bound) {
#ifdef __AVX2__
  return (F32x8)_mm256_max_ps((__m256)splat(bound), (__m256)v);
#else
  return v < bound ? splat(bound) : v;
#endif
}
PIXART_INLINE F32x8 at_most(F32x8 v, float bound) {
#ifdef __AVX2__
  return (F32x8)_mm256_min_ps((__m256)splat(bound), (__m256)v);
#else
  return v > bound ? splat(bound) : v;
#endif
}

PIXART_INLINE F32x8 square_root(F32x8 v) {
#ifdef __AVX2__
  return (F32x8)_mm256_sqrt_ps((__m256)v);
#else
  for (int i = 0; i < kLanes; ++i) v[i] = std::sqrt(v[i]);
  return v;
#endif
}

// e^v within two units in the last place; infinite from 88.4 on, and e^-87 below -87.
PIXART_INLINE F32x8 exp(F32x8 v) {
  v = at_most(at_least(v, -87.f), 89.f);
  // v = n ln 2 + r with |r| <= ln 2 / 2; adding 1.5 * 2^23 leaves n in the low bits. ln 2 in two
  // parts, the first short enough for an exact product
  constexpr float kRound = 12582912.f;
  const F32x8 shifted = v * 1.44269504f + kRound;
  const F32x8 n = shifted - kRound;
  const F32x8 r = (v - n * 0.693359375f) + n * 2.12194440e-4f;
  // (e^r - 1 - r) / r^2, minimax: e^r to 4e-9
  F32x8 p = r * 1.38145406e-3f + 8.36874545e-3f;
  p = p * r + 4.16683890e-2f;
  p = p * r + 1.66665211e-1f;
  p = p * r + 4.99999940e-1f;
  p = p * (r * r) + r + 1.f;
  const F32x8 power = (F32x8)(((U32x8)shifted << 23) + 0x3f800000u);
  return p * power;
}

// Four running sums, so that the next addition need not wait for the last.
constexpr int kSlots = 4;

struct Sum {
  F32x8 slot[kSlots] = {};

  PIXART_INLINE float total() const {
    const F32x8 v = (slot[0] + slot[1]) + (slot[2] + slot[3]);
    return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
  }
};

template <int kSlot>
using Slot = std::integral_constant<int, kSlot>;

// Calls body(i, lanes, slot) for each vector of a row; slot says which running sum to add to.
template <class Body>
PIXART_INLINE void for_lanes(int64_t length, Body body) {
  int64_t i = 0;
  for (; i + kSlots * kLanes <= length; i += kSlots * kLanes) {
    body(i, All{}, Slot<0>{});
    body(i + kLanes, All{}, Slot<1>{});
    body(i + 2 * kLanes, All{}, Slot<2>{});
    body(i + 3 * kLanes, All{}, Slot<3>{});
  }
  for (; i + kLanes <= length; i += kLanes) body(i, All{}, Slot<0>{});
  if (i < length) body(i, First{static_cast<int>(length - i)}, Slot<0>{});
}

// Asks for the cache line at p + offset where body(…, slot) is about to enter one.
template <class T, int kSlot>
PIXART_INLINE void prefetch(const T* p, int64_t offset, Slot<kSlot>) {
  constexpr int kLine = 64;
  if constexpr (kSlot * kLanes * sizeof(T) % kLine == 0) {
    // by address: the line may lie past the tensor's end, where a pointer must not
    const auto address = reinterpret_cast<uintptr_t>(p) + offset * sizeof(T);
    __builtin_prefetch(reinterpret_cast<const void*>(address));
  }
}

constexpr int64_t padded_to_lanes(int64_t length) {
  return (length + kLanes - 1) / kLanes * kLanes;
}

}  // namespace pixart
