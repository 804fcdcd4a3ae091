/* Vectors of floats: what the processor has, and the few functions of them that the attention needs.

   VL floats make a vector, and a matrix product keeps MR rows of NV vectors in registers. Arithmetic is the compiler's
   vector extension; AVX-512 gets intrinsics where that extension has no good word for what it can do. */

#ifndef BSBR_VECTOR_H
#define BSBR_VECTOR_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__)
#include <immintrin.h>
enum { VL = 16, NV = 4 };
#elif defined(__AVX__)
enum { VL = 8, NV = 2 };
#elif defined(__aarch64__)
enum { VL = 4, NV = 4 };
#else
enum { VL = 4, NV = 2 };
#endif
enum { MR = 6, TILE = NV * VL };

typedef float vec __attribute__((vector_size(VL * 4), may_alias));
typedef float loose_vec __attribute__((vector_size(VL * 4), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(VL * 4), may_alias));

#define INLINE static inline __attribute__((always_inline))

/* Stands for the maximum of nothing: finite, so that differences of two are never no number. */
#define NOTHING (-3.4028234663852886e38f)

INLINE vec load(const float *x) { return *(const loose_vec *)x; }
INLINE void store(float *x, vec v) { *(loose_vec *)x = v; }
INLINE vec spread(float x) { return x - (vec){0}; }

/* a > b ? x : y, lane by lane; y where a or b is no number. */
INLINE vec where_greater(vec a, vec b, vec x, vec y) {
#if defined(__AVX512F__)
  return (vec)_mm512_mask_blend_ps(_mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GT_OQ), (__m512)y, (__m512)x);
#else
  ivec mask = a > b;
  return (vec)((mask & (ivec)x) | (~mask & (ivec)y));
#endif
}

/* The larger one; b where a or b is no number. */
INLINE vec maximum(vec a, vec b) {
#if defined(__AVX512F__)
  return (vec)_mm512_max_ps((__m512)a, (__m512)b);
#else
  return where_greater(a, b, a, b);
#endif
}

INLINE float largest_lane(vec v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)v);
#else
  float x = v[0];
  for (int i = 1; i < VL; i++) x = v[i] > x ? v[i] : x;
  return x;
#endif
}

INLINE float sum_of_lanes(vec v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)v);
#else
  float x = v[0];
  for (int i = 1; i < VL; i++) x += v[i];
  return x;
#endif
}

/* 2^f for f in [-1/2, 1/2]; the relative error is below 2^-22. */
INLINE vec power_of_fraction(vec f) {
  vec p = 1.5403530e-4f * f + 1.33335581e-3f;
  p = p * f + 9.61812910e-3f;
  p = p * f + 5.55041086e-2f;
  p = p * f + 2.40226507e-1f;
  p = p * f + 6.93147181e-1f;
  return p * f + 1.0f;
}

/* 2^x for x <= 0. What would not be a normal number is 0: numbers below the normal ones are slow, and weigh nothing.
   What is no number stays none. */
INLINE vec power_of_two(vec x) {
#if defined(__AVX512F__)
  __m512 whole = _mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __mmask16 normal = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ);
  return (vec)_mm512_maskz_scalef_ps(normal, (__m512)power_of_fraction(x - (vec)whole), whole);
#else
  const float half_bits = 12582912.0f; /* 1.5 * 2^23: adding it rounds to an integer, which then is in the low bits */
  vec clamped = where_greater(spread(-126.0f), x, spread(-127.0f), x);
  vec shifted = clamped + half_bits;
  return power_of_fraction(clamped - (shifted - half_bits)) * (vec)(((ivec)shifted + 127) << 23);
#endif
}

/* The lanes of a and b in turns: the first halves of both, or the second halves. */
#if defined(__clang__)
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (ivec){__VA_ARGS__})
#endif
INLINE vec first_in_turns(vec a, vec b) {
#if defined(__AVX512F__)
  return SHUFFLE(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
#elif defined(__AVX__)
  return SHUFFLE(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
#else
  return SHUFFLE(a, b, 0, 4, 1, 5);
#endif
}
INLINE vec second_in_turns(vec a, vec b) {
#if defined(__AVX512F__)
  return SHUFFLE(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
#elif defined(__AVX__)
  return SHUFFLE(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
#else
  return SHUFFLE(a, b, 2, 6, 3, 7);
#endif
}

/* Transpose VL rows of VL floats, times a factor: log2 VL rounds that shuffle each row with the one half the rows on. */
INLINE void transpose_square(const float *from, long from_row, float *to, long to_row, float factor) {
  vec x[VL], y[VL];
  for (int i = 0; i < VL; i++) x[i] = load(from + i * from_row) * factor;
  for (int step = 1; step < VL; step *= 2) {
    for (int i = 0; i < VL / 2; i++) {
      y[2 * i] = first_in_turns(x[i], x[i + VL / 2]);
      y[2 * i + 1] = second_in_turns(x[i], x[i + VL / 2]);
    }
    for (int i = 0; i < VL; i++) x[i] = y[i];
  }
  for (int i = 0; i < VL; i++) store(to + i * to_row, x[i]);
}

#endif
