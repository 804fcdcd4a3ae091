/* Block sparse attention with block retrieval of one query head, forward, in float32.

   docs/method.md says what is computed, ops/reference.py is the definition. In here:
   - scores are powers of two, so that only 2^x is needed;
   - every query carries the largest score so far, the sum of its weights and the weighted sum of values (`Softmax`), and
     each piece of keys is folded into them, after Milakov and Gimelshein (arXiv 1805.02867);
   - keys come in pieces that are transposed once for all queries that read them: the local block (and the dense prefix,
     which is read the same way) for a run of queries, a retrieved block for those that chose it;
   - block scores are [block, query], so that choosing among blocks runs along queries, a vector of them at a time. */

#include <pthread.h>

#include "product.h"

enum { PIECE = 128, ROWS = 4 * MR }; /* keys of a piece; queries that meet it at once, so that scores stay near */
enum { BIAS, MEAN_SCALE, VAR_SCALE, VALUE_SCALE, STATE_SCALE };

static const float LOG2_E = 1.44269504088896340736f;

/* A call, and then each of its query heads, with pointers to its own. Strides are in floats; a row is that of a query
   or a token. The layout is repeated in forward.py. */
typedef struct {
  const float *q, *k, *v, *calibration;
  float *o, *lse;
  int64_t *chosen;       /* [batch, heads, top_k, sparse queries] */
  const int64_t *top_ks; /* of each key head, none above top_k; or 0. Then what is chosen is not kept for anybody */
  char *scratch;
  int64_t q_row, k_row, v_row, o_row, lse_row;
  int64_t q_head, k_head, v_head, o_head, lse_head;
  int64_t q_batch, k_batch, v_batch, o_batch, lse_batch;
  int64_t batch, heads, key_heads;
  int64_t q_start, stop, sparse_start; /* positions of queries; those before sparse_start read their whole past */
  int64_t width, value_width, block_size, unit, top_k;
  int64_t given;   /* chosen is input */
  int64_t moments; /* the variance of keys counts */
  int64_t far;     /* past blocks not read are entries */
  int64_t state;   /* their mean first-order state is read */
  float scale;
} Head;

/* Where everything is kept while a head is worked on. */
typedef struct {
  float *sum, *top, *total; /* Softmax: [queries, values], [queries], [queries] */
  float *keys, *values;     /* a piece: [width, PIECE], [PIECE, values] */
  float *scores;            /* of a piece: [ROWS, PIECE] */
  float *score_keys;        /* what queries are multiplied with for block scores: [blocks, 1 or 2 widths] */
  float *mean_values;       /* [blocks, values] */
  float *masses;            /* of a tile of queries: [blocks, TILE] */
  float *queries;           /* the tile and its squares, transposed: [2 widths, TILE] */
  float *best, *place;      /* [top_k, TILE] */
  float *centred;           /* a piece of keys less their mean, [PIECE, width] */
  float *mean;              /* of a block: keys, their variance, values */
  float *state, *read;      /* of one block, or the mean of past blocks as it is read: [width, values] */
  double *states;           /* sum of past blocks': [width, values] */
  float *spare;             /* a row that nobody reads */
  int32_t *starts, *readers;
} Work;

static long round_up(long x, long step) { return (x + step - 1) / step * step; }
static long least(long a, long b) { return a < b ? a : b; }
static long most(long a, long b) { return a > b ? a : b; }

static long values_row(const Head *h) { return round_up(h->value_width, VL); }
static long num_queries(const Head *h) { return h->stop - h->q_start; }
static long num_sparse(const Head *h) { return h->stop - h->sparse_start; }
static long score_width(const Head *h) { return h->width * (h->moments ? 2 : 1); }
static long num_past(const Head *h) { return (h->stop - 1) / h->block_size * (h->block_size / h->unit); }

static void *take(char **at, long bytes) {
  char *taken = *at;
  *at += round_up(bytes, 64);
  return taken;
}

/* Hand out the scratch memory; returns where it ends. */
static char *lay_out(const Head *h, Work *w) {
  char *at = (char *)round_up((intptr_t)h->scratch, 64);
  long f = sizeof(float), queries = num_queries(h), blocks = num_sparse(h) ? num_past(h) : 0, values = values_row(h);
  long width = round_up(h->width, VL);
  w->sum = take(&at, queries * values * f);
  w->top = take(&at, queries * f);
  w->total = take(&at, queries * f);
  w->keys = take(&at, width * PIECE * f);
  w->values = take(&at, PIECE * values * f);
  w->scores = take(&at, ROWS * PIECE * f);
  w->score_keys = take(&at, blocks * score_width(h) * f);
  w->mean_values = take(&at, blocks * values * f);
  w->masses = take(&at, blocks * TILE * f);
  w->queries = take(&at, 2 * width * TILE * f);
  w->best = take(&at, h->top_k * TILE * f);
  w->place = take(&at, h->top_k * TILE * f);
  w->centred = take(&at, PIECE * width * f);
  w->mean = take(&at, (2 * width + values) * f);
  w->state = take(&at, h->width * values * f);
  w->read = take(&at, h->width * values * f);
  w->states = take(&at, h->width * values * sizeof(double));
  w->spare = take(&at, most(values, most(PIECE, TILE)) * f);
  w->starts = take(&at, (blocks + 1) * sizeof(int32_t));
  w->readers = take(&at, num_sparse(h) * h->top_k * sizeof(int32_t));
  return at;
}

/* Copy rows to rows of whole vectors, filled with zeros. */
static void copy_rows(const float *from, long from_row, long rows, long width, float *to, long to_row) {
  for (long r = 0; r < rows; r++, from += from_row, to += to_row) {
    memcpy(to, from, width * sizeof(float));
    memset(to + width, 0, (to_row - width) * sizeof(float));
  }
}

/* to[d, r] = factor * from[r, d]; rows up to the next whole vector become columns of zeros. */
static void transpose(const float *from, long from_row, long rows, long width, float *to, long to_row, float factor) {
  long whole_rows = rows / VL * VL, whole_width = width / VL * VL;
  for (long r = 0; r < whole_rows; r += VL)
    for (long d = 0; d < whole_width; d += VL)
      transpose_square(from + r * from_row + d, from_row, to + d * to_row + r, to_row, factor);
  if (whole_rows == rows && whole_width == width) return;
  for (long d = 0; d < width; d++)
    for (long r = d < whole_width ? whole_rows : 0; r < round_up(rows, VL); r++)
      to[d * to_row + r] = r < rows ? factor * from[r * from_row + d] : 0;
}

/* Start reading from memory what is wanted soon. */
static void fetch(const float *x, long count) {
  for (long i = 0; i < count; i += 16) __builtin_prefetch(x + i);
}

/* Fold `count` keys from position `start` into queries: those listed, or the ones from position `first` on. A query
   sees no key after it. Rows are counted from the first query. */
static void read_keys(const Head *h, Work *w, long start, long count, const int32_t *listed, long first, long rows) {
  long values = values_row(h);
  transpose(h->k + start * h->k_row, h->k_row, count, h->width, w->keys, PIECE, h->scale * LOG2_E);
  copy_rows(h->v + start * h->v_row, h->v_row, count, h->value_width, w->values, values);
  for (long tile = 0; tile < rows; tile += ROWS) {
    long used = least(ROWS, rows - tile), row[ROWS], seen[ROWS];
    float top[ROWS], keep[ROWS + VL] = {0};
    for (long r = 0; r < used; r++) {
      row[r] = listed ? listed[tile + r] : first - h->q_start + tile + r;
      seen[r] = most(0, least(count, h->q_start + row[r] - start + 1));
    }
    long visible = seen[0];
    for (long r = 1; r < used; r++) visible = most(visible, seen[r]);
    long vectors = (visible + VL - 1) / VL;

    for (long r = 0; r < used; r += MR) {
      const float *q[MR];
      float *s[MR];
      for (long i = 0; i < MR; i++) {
        q[i] = h->q + row[r + i < used ? r + i : 0] * h->q_row;
        s[i] = w->scores + (r + i) * PIECE;
      }
      for (long i = r; i < least(used, r + MR); i++) fetch(w->sum + row[i] * values, values);
      for (long i = tile + ROWS + r; listed && i < least(rows, tile + ROWS + r + MR); i++)
        fetch(h->q + listed[i] * h->q_row, h->width);
      product_rows(vectors, h->width, q, 1, w->keys, PIECE, s, 0);
    }

    for (long r = 0; r < used; r++) {
      float *s = w->scores + r * PIECE;
      for (long i = seen[r]; i < vectors * VL; i++) s[i] = -INFINITY;
      vec highest = spread(w->top[row[r]]);
      for (long j = 0; j < vectors; j++) highest = maximum(load(s + j * VL), highest);
      top[r] = largest_lane(highest);
      keep[r] = w->top[row[r]] - top[r];
      w->top[row[r]] = top[r];
    }
    for (long r = 0; r < used; r += VL) store(keep + r, power_of_two(load(keep + r)));
    for (long r = 0; r < used; r++) {
      float *s = w->scores + r * PIECE;
      vec total = {0};
      for (long j = 0; j < vectors; j++) {
        vec weight = power_of_two(load(s + j * VL) - top[r]);
        store(s + j * VL, weight);
        total += weight;
      }
      w->total[row[r]] = w->total[row[r]] * keep[r] + sum_of_lanes(total);
    }

    for (long r = 0; r < used; r += MR) {
      const float *s[MR];
      float *o[MR];
      for (long i = 0; i < MR; i++) {
        s[i] = w->scores + (r + i < used ? r + i : 0) * PIECE;
        o[i] = r + i < used ? w->sum + row[r + i] * values : w->spare;
      }
      product_rows(values / VL, visible, s, 1, w->values, values, o, keep + r);
    }
  }
}

/* Summarise one block: scores are products with `score_keys`, its values' mean is kept, its state joins the sum. */
static void summarise(const Head *h, Work *w, long block) {
  long start = block * h->unit, width = round_up(h->width, VL), values = values_row(h);
  const float *k = h->k + start * h->k_row, *v = h->v + start * h->v_row;
  float *mean = w->mean, *variance = mean + width, *mean_value = variance + width, share = 1.0f / h->unit;
  memset(w->mean, 0, (2 * width + values) * sizeof(float));
  for (long r = 0; r < h->unit; r++) {
    for (long d = 0; d < h->width; d++) mean[d] += k[r * h->k_row + d];
    for (long d = 0; d < h->value_width; d++) mean_value[d] += v[r * h->v_row + d];
  }
  for (long d = 0; d < width; d++) mean[d] *= share;
  for (long d = 0; d < values; d++) mean_value[d] *= share;

  for (long piece = 0; piece < h->unit && (h->moments || h->state); piece += PIECE) {
    long rows = least(PIECE, h->unit - piece);
    for (long r = 0; r < rows; r++) {
      const float *from = k + (piece + r) * h->k_row;
      float *to = w->centred + r * width;
      for (long d = 0; d < h->width; d++) {
        to[d] = from[d] - mean[d];
        variance[d] += to[d] * to[d];
      }
    }
    if (!h->state) continue;
    for (long r = 0; r < rows; r++) {
      const float *from = v + (piece + r) * h->v_row;
      float *to = w->values + r * values;
      for (long d = 0; d < h->value_width; d++) to[d] = from[d] - mean_value[d];
      for (long d = h->value_width; d < values; d++) to[d] = 0;
    }
    product(h->width, values / VL, rows, w->centred, 1, width, w->values, values, w->state, values, 0, w->spare);
    for (long i = 0; i < h->width * values; i++) w->states[i] += w->state[i];
  }

  float linear = h->scale * LOG2_E * h->calibration[MEAN_SCALE];
  float square = h->scale * h->scale * LOG2_E / 2 * h->calibration[VAR_SCALE] * share;
  float *keys = w->score_keys + block * score_width(h), *value = w->mean_values + block * values;
  for (long d = 0; d < h->width; d++) keys[d] = linear * mean[d];
  for (long d = 0; d < h->width && h->moments; d++) keys[h->width + d] = square * variance[d];
  for (long d = 0; d < values; d++) value[d] = h->calibration[VALUE_SCALE] * mean_value[d];
}

/* The `top_k` best blocks of a vector of queries, best first. A block goes before the first one that it is better than,
   and all from there on move down by one, the last one out: of equal scores the lower block stays in front. */
INLINE void take_best(long top_k, const float *masses, long blocks, float *best, float *place) {
  for (long j = 0; j < top_k; j++) store(best + j * TILE, spread(-INFINITY));
  for (long n = 0; n < blocks; n++) {
    vec mass = maximum(load(masses + n * TILE), spread(NOTHING)); /* no number counts as nothing */
    vec moved = mass, block = spread(n);
    for (long j = 0; j < top_k; j++) {
      vec held = load(best + j * TILE), held_block = load(place + j * TILE);
      store(best + j * TILE, where_greater(mass, held, moved, held));
      store(place + j * TILE, where_greater(mass, held, block, held_block));
      block = where_greater(mass, held, held_block, block);
      moved = where_greater(mass, held, held, moved);
    }
  }
}

/* Choose blocks for a tile of queries, or look up what was chosen for them, and take the chosen out of the masses. */
static void choose(const Head *h, Work *w, long past, long first, long rows) {
  int64_t *chosen = h->chosen + first - h->sparse_start;
  long sparse = num_sparse(h);
  if (!h->given) {
    for (long r = 0; r < rows; r += VL) take_best(h->top_k, w->masses + r, past, w->best + r, w->place + r);
    for (long j = 0; j < h->top_k; j++)
      for (long r = 0; r < rows; r++) chosen[j * sparse + r] = (int64_t)w->place[j * TILE + r];
  }
  for (long j = 0; j < h->top_k; j++)
    for (long r = 0; r < rows; r++) {
      int64_t block = chosen[j * sparse + r];
      if (block >= 0 && block < past) w->masses[block * TILE + r] = -INFINITY;
    }
}

/* Start a tile of sparse queries of one local block with their far field, and choose the blocks that they read. */
static void read_summaries(const Head *h, Work *w, long past, long first, long rows) {
  long row = first - h->q_start, values = values_row(h), vectors = (rows + VL - 1) / VL;
  const float *q = h->q + row * h->q_row;
  float *squares = w->queries + h->width * TILE, *sum = w->sum + row * values, *top = w->top + row;
  float *total = w->total + row;
  if (h->far || (h->top_k && !h->given)) {
    transpose(q, h->q_row, rows, h->width, w->queries, TILE, 1);
    for (long d = 0; d < h->width && h->moments; d++)
      for (long r = 0; r < vectors * VL; r++) squares[d * TILE + r] = w->queries[d * TILE + r] * w->queries[d * TILE + r];
    product(past, vectors, score_width(h), w->score_keys, score_width(h), 1, w->queries, TILE, w->masses, TILE, 0,
            w->spare);
  }
  if (h->top_k) choose(h, w, past, first, rows);
  if (!h->far) {
    memset(sum, 0, rows * values * sizeof(float));
    for (long r = 0; r < rows; r++) top[r] = NOTHING, total[r] = 0;
    return;
  }
  float bias = log2f(h->unit) + LOG2_E * h->calibration[BIAS], mass[TILE], weight[TILE];
  for (long r = 0; r < rows; r += VL) {
    vec highest = spread(NOTHING), summed = {0};
    for (long n = 0; n < past; n++) highest = maximum(load(w->masses + n * TILE + r), highest);
    for (long n = 0; n < past; n++) {
      float *at = w->masses + n * TILE + r;
      vec each = power_of_two(load(at) - highest);
      store(at, each);
      summed += each;
    }
    store(mass + r, highest);
    store(weight + r, summed);
  }
  for (long r = 0; r < rows; r++) {
    top[r] = weight[r] == 0 ? NOTHING : mass[r] + bias; /* an empty field keeps the maximum of nothing */
    total[r] = weight[r];
  }
  if (h->state)
    product(rows, values / VL, h->width, q, h->q_row, 1, w->read, values, sum, values, 0, w->spare);
  product(rows, values / VL, past, w->masses, 1, TILE, w->mean_values, values, sum, values, h->state ? total : 0,
          w->spare);
}

/* Fold in the chosen blocks: all pairs sorted by block, then each block is read by those who chose it. */
static void read_chosen(const Head *h, Work *w) {
  long sparse = num_sparse(h), blocks = num_past(h), per_block = h->block_size / h->unit;
  int32_t *starts = w->starts;
  memset(starts, 0, (blocks + 1) * sizeof(int32_t));
  for (int fill = 0; fill < 2; fill++) {
    for (long s = 0; s < sparse; s++) {
      long past = (h->sparse_start + s) / h->block_size * per_block;
      for (long j = 0; j < h->top_k; j++) {
        int64_t block = h->chosen[j * sparse + s];
        if (block < 0 || block >= past) continue;
        if (fill) w->readers[starts[block]] = s + h->sparse_start - h->q_start;
        starts[block]++;
      }
    }
    if (fill) break;
    int32_t start = 0;
    for (long n = 0; n <= blocks; n++) {
      int32_t count = starts[n];
      starts[n] = start;
      start += count;
    }
  }
  for (long n = 0; n < blocks; n++) { /* starts[n] has moved on to where the next block's readers start */
    int32_t from = n ? starts[n - 1] : 0;
    for (long piece = 0; piece < h->unit && starts[n] > from; piece += PIECE)
      read_keys(h, w, n * h->unit + piece, least(PIECE, h->unit - piece), w->readers + from, 0, starts[n] - from);
  }
}

/* Bytes of scratch memory that a thread needs. */
int64_t bsbr_scratch(const Head *h) {
  Head from_zero = *h;
  Work w;
  from_zero.scratch = 0;
  return (intptr_t)lay_out(&from_zero, &w) + 64;
}

static void attend_head(const Head *h) {
  Work work, *w = &work;
  long values = values_row(h), per_block = h->block_size / h->unit, last = (h->stop - 1) / h->block_size;
  long num_dense = h->sparse_start - h->q_start;
  lay_out(h, w);
  memset(w->sum, 0, num_dense * values * sizeof(float));
  for (long r = 0; r < num_dense; r++) w->top[r] = NOTHING, w->total[r] = 0;
  if (h->state) memset(w->states, 0, h->width * values * sizeof(double));

  for (long block = 0; block <= last; block++) {
    long start = block * h->block_size, stop = least(h->stop, start + h->block_size), past = block * per_block;
    long first_sparse = most(start, h->sparse_start);
    if (first_sparse < stop && h->state) {
      double factor = past ? (double)h->calibration[STATE_SCALE] * h->scale / h->unit / past : 0;
      for (long i = 0; i < h->width * values; i++) w->read[i] = factor * w->states[i];
    }
    for (long first = first_sparse; first < stop; first += TILE)
      read_summaries(h, w, past, first, least(TILE, stop - first));
    for (long piece = start; piece < stop; piece += PIECE) {
      long first = most(piece, h->q_start), end = most(stop, h->sparse_start);
      if (first < end) read_keys(h, w, piece, least(PIECE, stop - piece), 0, first, end - first);
    }
    if (block < last && num_sparse(h))
      for (long n = past; n < past + per_block; n++) summarise(h, w, n);
  }
  if (h->top_k && num_sparse(h)) read_chosen(h, w);

  for (long r = 0; r < num_queries(h); r++) {
    float *o = h->o + r * h->o_row, *sum = w->sum + r * values, share = 1 / w->total[r];
    for (long d = 0; d < h->value_width; d++) o[d] = sum[d] * share;
    h->lse[r * h->lse_row] = (w->top[r] + log2f(w->total[r])) / LOG2_E;
  }
}

/* What threads share: the next thread's number, and the next head that nobody works on yet. */
typedef struct {
  const Head *call;
  int64_t started, next;
} Queue;

/* One thread: take heads until there is none left. */
static void work_on_heads(void *queue_) {
  Queue *queue = queue_;
  const Head *call = queue->call;
  char *scratch = call->scratch + __atomic_fetch_add(&queue->started, 1, __ATOMIC_RELAXED) * bsbr_scratch(call);
  for (;;) {
    int64_t i = __atomic_fetch_add(&queue->next, 1, __ATOMIC_RELAXED);
    if (i >= call->batch * call->heads) return;
    int64_t row = i / call->heads, head = i % call->heads, key_head = head / (call->heads / call->key_heads);
    Head h = *call;
    h.q += row * h.q_batch + head * h.q_head;
    h.k += row * h.k_batch + key_head * h.k_head;
    h.v += row * h.v_batch + key_head * h.v_head;
    h.o += row * h.o_batch + head * h.o_head;
    h.lse += row * h.lse_batch + head * h.lse_head;
    h.calibration += head * 5;
    h.chosen += i * h.top_k * num_sparse(&h);
    h.scratch = scratch;
    if (h.top_ks) {
      h.top_k = h.top_ks[key_head];
      h.sparse_start = least(h.stop, most(h.sparse_start, (h.top_k * h.unit / h.block_size + 1) * h.block_size));
    }
    attend_head(&h);
  }
}

static void *start_thread(void *queue) {
  work_on_heads(queue);
  return 0;
}

/* Compute o, lse and, if it is not given, the choice of blocks: every head by one of `threads` threads, this one
   included. `scratch` has room for all of them. Which thread takes a head changes nothing.

   `parallel` is libgomp's GOMP_parallel, or 0: PyTorch's threads spin for a while after its own operations, and would
   take the processors from threads that are not the same ones. */
void bsbr_forward(const Head *call, int64_t threads, void (*parallel)(void (*)(void *), void *, unsigned, unsigned)) {
  enum { MANY = 256 };
  Queue queue = {call, 0, 0};
  pthread_t others[MANY];
  int64_t started = 0;
  if (parallel && threads > 1) {
    parallel(work_on_heads, &queue, threads, 0);
    return;
  }
  while (started < least(threads, MANY) - 1 && !pthread_create(&others[started], 0, start_thread, &queue)) started++;
  work_on_heads(&queue);
  while (started) pthread_join(others[--started], 0);
}
