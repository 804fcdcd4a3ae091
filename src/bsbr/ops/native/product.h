/* Matrix products of small tiles that stay in cache.

   Every element of a product is one sum in the order of k, whatever the number of rows: what later tokens do to the
   number of rows cannot change an earlier result by a bit. */

#ifndef BSBR_PRODUCT_H
#define BSBR_PRODUCT_H

#include "vector.h"

/* c[i] = keep[i] * c[i] + sum over p of a[i][p * a_step] * b[p * b_row ...], MR rows i of `vectors` vectors.
   Without `keep` the former content of c does not matter. */
INLINE void product_tile(int vectors, long k, const float *const a[MR], long a_step, const float *b, long b_row,
                         float *const c[MR], const float *keep) {
  vec sum[MR][NV];
#pragma GCC unroll 8
  for (int i = 0; i < MR; i++)
#pragma GCC unroll 4
    for (int j = 0; j < vectors; j++) {
      sum[i][j] = spread(0);
      if (keep) sum[i][j] = load(c[i] + j * VL) * keep[i];
    }
  const float *a0 = a[0], *a1 = a[1], *a2 = a[2], *a3 = a[3], *a4 = a[4], *a5 = a[5];
  for (long p = 0, at = 0; p < k; p++, at += a_step, b += b_row) {
    vec column[NV];
#pragma GCC unroll 4
    for (int j = 0; j < vectors; j++) column[j] = load(b + j * VL);
    const float x[MR] = {a0[at], a1[at], a2[at], a3[at], a4[at], a5[at]};
#pragma GCC unroll 8
    for (int i = 0; i < MR; i++)
#pragma GCC unroll 4
      for (int j = 0; j < vectors; j++) sum[i][j] += x[i] * column[j];
  }
#pragma GCC unroll 8
  for (int i = 0; i < MR; i++)
#pragma GCC unroll 4
    for (int j = 0; j < vectors; j++) store(c[i] + j * VL, sum[i][j]);
}

/* The same for any number of vectors. */
static void product_rows(long vectors, long k, const float *const a[MR], long a_step, const float *b, long b_row,
                         float *const c[MR], const float *keep) {
  for (long j = 0; j < vectors; j += NV, b += TILE) {
    float *part[MR];
    for (int i = 0; i < MR; i++) part[i] = c[i] + j * VL;
    switch (vectors - j) {
    case 1: product_tile(1, k, a, a_step, b, b_row, part, keep); break;
    case 2: product_tile(2, k, a, a_step, b, b_row, part, keep); break;
    case 3: product_tile(NV < 3 ? NV : 3, k, a, a_step, b, b_row, part, keep); break;
    default: product_tile(NV, k, a, a_step, b, b_row, part, keep);
    }
  }
}

/* c[m, vectors] = keep * c + a b, with element (i, p) of a at a[i * a_row + p * a_step]; `spare` takes rows of c that
   are there only to fill a tile. */
static void product(long m, long vectors, long k, const float *a, long a_row, long a_step, const float *b, long b_row,
                    float *c, long c_row, const float *keep, float *spare) {
  for (long i = 0; i < m; i += MR) {
    const float *from[MR];
    float *to[MR], kept[MR];
    for (long r = 0; r < MR; r++) {
      int real = i + r < m;
      from[r] = a + (real ? i + r : 0) * a_row;
      to[r] = real ? c + (i + r) * c_row : spare;
      kept[r] = keep && real ? keep[i + r] : 0;
    }
    product_rows(vectors, k, from, a_step, b, b_row, to, keep ? kept : 0);
  }
}

#endif
