// Two kernels for the CPU. `few_rows`: the product of a few rows with a weight matrix, which is read once, y = residual +
// W norm(x) + bias, or SwiGLU of it. `attend_newest`: rotate the queries and keys of each row's newest tokens, store keys
// and values in the cache, and attend to it by definition, softmax(q k^T / sqrt(D)) v over visible slots.
//
// Built by `build.py`, for one dtype at a time (NUMBERS, one of the structures below), and without torch's headers, which
// take longer to compile than all of this: what it needs of torch's stable C interface
// (torch/csrc/inductor/aoti_torch/c/shim.h, torch/csrc/stable/c/shim.h) is declared here.
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if FLOAT16 && defined(__F16C__)
#include <immintrin.h>
#endif

extern "C" {
typedef struct OpaqueTensor* Tensor;
typedef struct OpaqueLibrary* Library;
int32_t aoti_torch_get_data_ptr(Tensor, void**);
int32_t aoti_torch_get_dtype(Tensor, int32_t*);
int32_t aoti_torch_get_size(Tensor, int64_t dimension, int64_t*);
int32_t aoti_torch_get_stride(Tensor, int64_t dimension, int64_t*);
int32_t aoti_torch_get_dim(Tensor, int64_t*);
int32_t aoti_torch_get_numel(Tensor, int64_t*);
int32_t aoti_torch_empty_strided(int64_t dimensions, const int64_t* sizes, const int64_t* strides, int32_t dtype,
                                 int32_t device_type, int32_t device_index, Tensor*);
int32_t aoti_torch_delete_tensor_object(Tensor);
int32_t aoti_torch_library_init_impl(const char* name, const char* key, const char* file, uint32_t line, Library*);
int32_t aoti_torch_library_impl(Library, const char* name, void (*)(uint64_t* stack, uint64_t, uint64_t));
int32_t torch_parallel_for(int64_t begin, int64_t end, int64_t grain, void (*)(int64_t, int64_t, void*), void*);
}

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
typedef float Vector __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));

template <class T>
static T load(const void* from) {
  T value;
  memcpy(&value, from, sizeof value);
  return value;
}

// A dtype: how its numbers are stored, widened to float, and rounded. Another way to store weights is one more of these.
// `widen` reads 2 * LANES numbers, in the order into which `arrange` brings as many of x, and `restore` undoes that.
struct Float32 {
  typedef float Stored;
  static void widen(const float* p, Vector& a, Vector& b) {
    a = load<Vector>(p);
    b = load<Vector>(p + LANES);
  }
  static void arrange(float*) {}
  static void restore(float*) {}
  static float widen_one(float x) { return x; }
  static float round(float x) { return x; }
};

struct BFloat16 {
  typedef uint16_t Stored;
  static void widen(const uint16_t* p, Vector& a, Vector& b) {  // two numbers in each word: the even ones, the odd ones
    Words words = load<Words>(p);
    a = (Vector)(words << 16);
    b = (Vector)(words & 0xffff0000u);
  }
  static void arrange(float* x) {
    float odd[LANES];
    for (int i = 0; i < LANES; i++) {
      odd[i] = x[2 * i + 1];
      x[i] = x[2 * i];
    }
    memcpy(x + LANES, odd, sizeof odd);
  }
  static void restore(float* x) {
    float even[LANES];
    memcpy(even, x, sizeof even);
    for (int i = 0; i < LANES; i++) {
      x[2 * i] = even[i];
      x[2 * i + 1] = x[LANES + i];
    }
  }
  static float widen_one(uint16_t x) {
    uint32_t bits = uint32_t{x} << 16;
    return load<float>(&bits);
  }
  static uint16_t round(float x) {
    uint32_t bits = load<uint32_t>(&x);
    if (x != x) return 0x7fc0;
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;  // to nearest, ties to even
  }
};

#if FLOAT16
struct Float16 {
  typedef uint16_t Stored;
  static void widen(const uint16_t* p, Vector& a, Vector& b) {
#if defined(__AVX512F__)
    a = (Vector)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
    b = (Vector)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)(p + LANES)));
#elif defined(__F16C__)
    a = (Vector)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
    b = (Vector)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(p + LANES)));
#else
    for (int i = 0; i < LANES; i++) {
      a[i] = widen_one(p[i]);
      b[i] = widen_one(p[LANES + i]);
    }
#endif
  }
  static void arrange(float*) {}
  static void restore(float*) {}
  static float widen_one(uint16_t x) { return (float)load<_Float16>(&x); }
  static uint16_t round(float x) {
    _Float16 y = (_Float16)x;
    return load<uint16_t>(&y);
  }
};
#endif

typedef NUMBERS Numbers;
typedef Numbers::Stored Stored;

template <class T>
struct Buffer {
  T* data;

  explicit Buffer(int64_t size) : data((T*)malloc(size * sizeof(T))) {}
  Buffer(const Buffer&) = delete;
  ~Buffer() { free(data); }
};

static float total(Vector sum) {
#pragma GCC unroll 4
  for (int width = LANES / 2; width; width /= 2) {
#ifdef __clang__
    for (int i = 0; i < width; i++) sum[i] += sum[i + width];
#else
    Ints other;
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) other[i] = i ^ width;
    sum += __builtin_shuffle(sum, other);
#endif
  }
  return sum[0];
}

// The products of R rows of a weight, each K long, with M rows of x. The order of the sums does not depend on R and M, so
// that a row gets the same bits in any company.
template <int R, int M>
static void dot(const Stored* w, const float* x, int64_t k, float (*y)[M]) {
  Vector sums[R][M] = {};
  int64_t i = 0;
  for (; i + 2 * LANES <= k; i += 2 * LANES) {
    Vector a[M], b[M];
    for (int m = 0; m < M; m++) {
      a[m] = load<Vector>(x + m * k + i);
      b[m] = load<Vector>(x + m * k + i + LANES);
    }
    for (int r = 0; r < R; r++) {
      Vector c, d;
      const Stored* from = w + r * k + i;
      // Short rows end before the processor has found out that they are read in order.
      for (int line = 0; line < int(2 * LANES * sizeof *from); line += 64) __builtin_prefetch((char*)(from + R * k) + line, 0, 2);
      Numbers::widen(from, c, d);
      for (int m = 0; m < M; m++) sums[r][m] += c * a[m];
      for (int m = 0; m < M; m++) sums[r][m] += d * b[m];
    }
  }
#pragma GCC unroll 8  // else the sums go to memory
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int m = 0; m < M; m++) {
      y[r][m] = total(sums[r][m]);
      for (int64_t j = i; j < k; j++) y[r][m] += Numbers::widen_one(w[r * k + j]) * x[m * k + j];
    }
}

struct Product {
  const void *weight, *bias, *residual;
  void* y;
  const float* x;  // [rows, k]
  int64_t rows, n, k;
  bool gated;
};

// R rows of the weight, or of both halves of a gated one, with M rows of x from row `m` on.
template <int R, int M>
static void rows_of(const Product& p, int64_t row, int64_t m) {
  const Stored *w = (const Stored*)p.weight, *bias = (const Stored*)p.bias, *residual = (const Stored*)p.residual;
  float y[R][M], up[R][M];
  dot<R, M>(w + row * p.k, p.x + m * p.k, p.k, y);
  if (p.gated) dot<R, M>(w + (p.n + row) * p.k, p.x + m * p.k, p.k, up);
  for (int r = 0; r < R; r++)
    for (int i = 0; i < M; i++) {
      float value = y[r][i];
      if (bias) value += Numbers::widen_one(bias[row + r]);
      if (p.gated) value = value / (1 + expf(-value)) * (up[r][i] + (bias ? Numbers::widen_one(bias[p.n + row + r]) : 0));
      int64_t at = (m + i) * p.n + row + r;
      if (residual) value += Numbers::widen_one(residual[at]);
      ((Stored*)p.y)[at] = Numbers::round(value);
    }
}

// Four rows of the weight with all rows of x, after the first of which they are in the cache.
static void block(const Product& p, int64_t row) {
  int64_t m = 0;
  if (LANES == 16)
    for (; m + 4 <= p.rows; m += 4) rows_of<4, 4>(p, row, m);
  for (; m + 2 <= p.rows; m += 2) rows_of<4, 2>(p, row, m);
  for (; m < p.rows; m++) rows_of<4, 1>(p, row, m);
}

constexpr int BLOCK = 8;  // rows of a weight, for as many sums at a time as hide the latency of an addition

static void part(int64_t begin, int64_t end, void* context) {
  const Product& p = *(const Product*)context;
  int64_t row = begin * BLOCK, last = end * BLOCK < p.n ? end * BLOCK : p.n;
  for (; p.rows == 1 && row + BLOCK <= last; row += BLOCK) rows_of<BLOCK, 1>(p, row, 0);
  for (; row + 4 <= last; row += 4) block(p, row);
  for (; row < last; row++)
    for (int64_t m = 0; m < p.rows; m++) rows_of<1, 1>(p, row, m);
}

static void multiply(Product p, const void* x, const void* norm, double eps) {
  Buffer<float> rows(p.rows * p.k);
  for (int64_t m = 0; m < p.rows; m++) {
    const Stored* from = (const Stored*)x + m * p.k;
    float* to = rows.data + m * p.k;
    for (int64_t i = 0; i < p.k; i++) to[i] = Numbers::widen_one(from[i]);
    if (norm) {
      Vector sums = {};
      int64_t i = 0;
      for (; i + LANES <= p.k; i += LANES) {
        Vector v = load<Vector>(to + i);
        sums += v * v;
      }
      float sum = total(sums);
      for (; i < p.k; i++) sum += to[i] * to[i];
      float scale = 1 / sqrtf(sum / p.k + (float)eps);
      for (i = 0; i < p.k; i++) to[i] = Numbers::widen_one(Numbers::round(to[i] * scale * Numbers::widen_one(((const Stored*)norm)[i])));
    }
    for (int64_t i = 0; i + 2 * LANES <= p.k; i += 2 * LANES) Numbers::arrange(to + i);
  }
  p.x = rows.data;
  int64_t bytes = BLOCK * p.k * sizeof(Stored) * (1 + p.gated);
  torch_parallel_for(0, (p.n + BLOCK - 1) / BLOCK, 1 + 65536 / bytes, part, &p);  // a thread is worth 64 KiB
}

constexpr int PART = 128;   // slots of a row that are attended to at a time; a page
constexpr int TOKENS = 32;  // queries at a time
constexpr float NONE = -INFINITY;

struct Heads {  // of the newest tokens, [B, T, heads, D]
  const char* data;
  int64_t row_bytes, token_bytes;

  const void* of(int64_t b, int64_t t) const { return data + b * row_bytes + t * token_bytes; }
};

struct Attention {
  Heads newest_q, newest_k, newest_v;
  const float *cos, *sin;  // [B, T, D/2]
  const int64_t* at;       // [B, T], where in memory the newest keys and values go
  const int32_t* pages;    // [B, blocks], the page of each PART slots; null if a row's slots are contiguous
  int64_t pages_stride;
  void *k, *v, *y;
  const bool* visible;  // [B, 1 or H, T, slots]
  float* q;             // [B, K, T, H/K, D], rotated; arranged if T is 1
  float* parts;         // [B, H, parts, D + 2]: the sum of weighted values, the greatest score, the sum of weights
  int64_t tokens, heads, kv_heads, dim, visible_heads, slots, held_slots, count;
  float scale;

  int64_t query(int64_t b, int64_t t, int64_t head) const {
    int64_t group = heads / kv_heads;
    return ((b * kv_heads + head / group) * tokens + t) * group + head % group;
  }

  const bool* seen(int64_t b, int64_t head, int64_t t) const {
    return visible + ((b * visible_heads + (visible_heads > 1 ? head : 0)) * tokens + t) * slots;
  }

  // Such a query gets 0; one whose scores are all -infinity has no weights either, but gets NaN.
  bool sees_nothing(int64_t b, int64_t head, int64_t t, float sum) const {
    return sum == 0 && !memchr(seen(b, head, t), 1, slots);
  }

  // Where a part of a row begins in memory.
  int64_t first_slot(int64_t b, int64_t part) const { return PART * (pages ? pages[b * pages_stride + part] : part); }

  // Numbers that a block of queries needs: see attend_block.
  int64_t scratch() const {
    int64_t rows = (TOKENS * (heads / kv_heads) + 5) / 6 * 6, wide = dim + 64;
    return rows * (dim + PART + wide + 2) + PART * (dim + wide);
  }

  // The place of a slot of memory among the keys and values `[B or 1, K, S, D]`.
  int64_t place(int64_t b, int64_t kv_head, int64_t slot) const {
    return (((pages ? 0 : b) * kv_heads + kv_head) * held_slots + slot) * dim;
  }
};

// e to the power x, for x <= 0 (Cephes' expf; relative error < 2e-7).
static Vector exp(Vector x) {
  x = x < -87.f ? Vector{} - 87.f : x;  // NaN stays NaN
  Vector n = (x * 1.44269504f + 12582912.f) - 12582912.f, r = x - n * 0.693359375f + n * 2.12194440e-4f;
  Vector y = 1.9875691500e-4f * r + 1.3981999507e-3f;
  y = ((((y * r + 8.3334519073e-3f) * r + 4.1665795894e-2f) * r + 1.6666665459e-1f) * r + 5.0000001201e-1f) * r * r + r + 1.f;
  return y * (Vector)((__builtin_convertvector(n, Ints) + 127) << 23);
}

// Turn PART scores, of which the first n count if seen, into weights relative to the greatest score, which is returned;
// `before` is the greatest one of earlier parts, and `sum` that of their weights, to which these are added.
static float weigh(float* x, const bool* seen, int64_t n, float scale, float before, float& sum) {
  for (int64_t s = 0; s < n; s++) x[s] = seen[s] ? x[s] * scale : NONE;
  for (int64_t s = n; s < PART; s++) x[s] = NONE;
  Vector most = Vector{} + before, sums = {};
  for (int s = 0; s < PART; s += LANES) {
    Vector score = load<Vector>(x + s);
    most = score > most ? score : most;
  }
  float greatest = before;
  for (int i = 0; i < LANES; i++) greatest = most[i] > greatest ? most[i] : greatest;
  for (int s = 0; s < PART; s += LANES) {
    Vector score = load<Vector>(x + s), weight = score == NONE ? Vector{} : exp(score - greatest);
    memcpy(x + s, &weight, sizeof weight);
    sums += weight;
  }
  sum = total(sums) + (before == NONE || before == greatest ? sum : sum * expf(before - greatest));
  return greatest;
}

// One query of M heads with the same keys, from `head` on, and one part of the slots.
template <int M>
static void attend_part(const Attention& p, int64_t b, int64_t head, int64_t part) {
  int64_t start = part * PART, n = p.slots - start < PART ? p.slots - start : PART, d = p.dim;
  int64_t held = p.place(b, head / (p.heads / p.kv_heads), p.first_slot(b, part));
  const Stored *k = (const Stored*)p.k + held, *v = (const Stored*)p.v + held;
  const float* q = p.q + (b * p.heads + head) * d;
  float* out[M];
  alignas(64) float w[M][PART];
  bool any = false;
  for (int m = 0; m < M; m++) {
    out[m] = p.parts + ((b * p.heads + head + m) * p.count + part) * (d + 2);
    memset(out[m], 0, (d + 2) * sizeof(float));
    out[m][d] = NONE;
    any |= memchr(p.seen(b, head + m, 0) + start, 1, n) != nullptr;
  }
  if (!any) return;
  for (int64_t s = 0; s < n; s += 4) {
    float y[4][M];
    int rows = n - s < 4 ? int(n - s) : 4;
    if (rows == 4) dot<4, M>(k + s * d, q, d, y);
    else for (int r = 0; r < rows; r++) dot<1, M>(k + (s + r) * d, q, d, y + r);
    for (int r = 0; r < rows; r++)
      for (int m = 0; m < M; m++) w[m][s + r] = y[r][m];
  }
  for (int m = 0; m < M; m++) out[m][d] = weigh(w[m], p.seen(b, head + m, 0) + start, n, p.scale, NONE, out[m][d + 1]);
  int64_t i = 0;
  for (; i + 2 * LANES <= d; i += 2 * LANES) {
    Vector low[M] = {}, high[M] = {};
    for (int64_t s = 0; s < n; s++) {
      Vector a, c;
      Numbers::widen(v + s * d + i, a, c);
      for (int m = 0; m < M; m++) low[m] += w[m][s] * a, high[m] += w[m][s] * c;
    }
    for (int m = 0; m < M; m++) {
      memcpy(out[m] + i, &low[m], sizeof low[m]);
      memcpy(out[m] + i + LANES, &high[m], sizeof high[m]);
    }
  }
  for (int64_t s = 0; s < n && i < d; s++)
    for (int64_t j = i; j < d; j++)
      for (int m = 0; m < M; m++) out[m][j] += w[m][s] * Numbers::widen_one(v[s * d + j]);
}

static void attend_parts(int64_t begin, int64_t end, void* context) {
  const Attention& p = *(const Attention*)context;
  int64_t group = p.heads / p.kv_heads;
  for (int64_t at = begin; at < end; at++) {
    int64_t part = at % p.count, b = at / p.count / p.kv_heads, head = at / p.count % p.kv_heads * group, last = head + group;
    for (; head + 4 <= last; head += 4) attend_part<4>(p, b, head, part);
    if (head + 3 == last) attend_part<3>(p, b, head, part);
    if (head + 2 == last) attend_part<2>(p, b, head, part);
    if (head + 1 == last) attend_part<1>(p, b, head, part);
  }
}

// Rows of (row, head), whose parts are merged.
static void merge_parts(int64_t begin, int64_t end, void* context) {
  const Attention& p = *(const Attention*)context;
  int64_t d = p.dim;
  for (int64_t at = begin; at < end; at++) {
    float* parts = p.parts + at * p.count * (d + 2);
    float greatest = NONE, sum = 0;
    for (int64_t n = 0; n < p.count; n++) greatest = fmaxf(greatest, parts[n * (d + 2) + d]);
    for (int64_t n = 0; n < p.count; n++) {
      float *part = parts + n * (d + 2), factor = part[d] == greatest ? 1 : expf(part[d] - greatest);
      sum += factor * part[d + 1];
      for (int64_t i = 0; i < d; i++) parts[i] = n ? parts[i] + factor * part[i] : factor * part[i];
    }
    for (int64_t i = 0; i + 2 * LANES <= d; i += 2 * LANES) Numbers::restore(parts + i);
    Stored* y = (Stored*)p.y + at * d;
    bool none = p.sees_nothing(at / p.heads, at % p.heads, 0, sum);
    for (int64_t i = 0; i < d; i++) y[i] = Numbers::round(none ? 0 : parts[i] / sum);
  }
}

static void rotate(const Stored* x, const float* cos, const float* sin, int64_t d, Stored* y) {
  for (int64_t i = 0; i < d / 2; i++) {
    float first = Numbers::widen_one(x[i]), second = Numbers::widen_one(x[d / 2 + i]);
    y[i] = Numbers::round(first * cos[i] - second * sin[i]);
    y[d / 2 + i] = Numbers::round(second * cos[i] + first * sin[i]);
  }
}

// Rows and tokens: rotate queries and keys, widen the queries, and store keys and values.
static void rotate_and_store(int64_t begin, int64_t end, void* context) {
  const Attention& p = *(const Attention*)context;
  int64_t d = p.dim;
  Buffer<Stored> rotated(d);
  for (int64_t at = begin; at < end; at++) {
    int64_t b = at / p.tokens, t = at % p.tokens;
    const float *cos = p.cos + at * (d / 2), *sin = p.sin + at * (d / 2);
    for (int64_t h = 0; h < p.kv_heads; h++) {
      int64_t place = p.place(b, h, p.at[at]);
      rotate((const Stored*)p.newest_k.of(b, t) + h * d, cos, sin, d, (Stored*)p.k + place);
      memcpy((Stored*)p.v + place, (const Stored*)p.newest_v.of(b, t) + h * d, d * sizeof(Stored));
    }
    for (int64_t h = 0; h < p.heads; h++) {
      rotate((const Stored*)p.newest_q.of(b, t) + h * d, cos, sin, d, rotated.data);
      float* query = p.q + p.query(b, t, h) * d;
      for (int64_t i = 0; i < d; i++) query[i] = Numbers::widen_one(rotated.data[i]);
      for (int64_t i = 0; p.tokens == 1 && i + 2 * LANES <= d; i += 2 * LANES) Numbers::arrange(query + i);
    }
  }
}

constexpr int ROWS = 6, COLUMNS = LANES == 16 ? 4 : 2, WIDTH = COLUMNS * LANES;  // of a tile that fits in registers

// c = a b, or c += a b, for ROWS rows of a [ROWS, K] and the columns of b [K, n], a multiple of WIDTH.
static void multiply_tile(const float* a, int64_t k, const float* b, int64_t n, float* c, bool add) {
  for (int64_t column = 0; column < n; column += WIDTH) {
    Vector sums[ROWS][COLUMNS] = {};
    for (int64_t i = 0; i < k; i++) {
      Vector row[COLUMNS];
      for (int j = 0; j < COLUMNS; j++) row[j] = load<Vector>(b + i * n + column + j * LANES);
      for (int r = 0; r < ROWS; r++)
        for (int j = 0; j < COLUMNS; j++) sums[r][j] += a[r * k + i] * row[j];
    }
    for (int r = 0; r < ROWS; r++)
      for (int j = 0; j < COLUMNS; j++) {
        float* to = c + r * n + column + j * LANES;
        Vector sum = add ? load<Vector>(to) + sums[r][j] : sums[r][j];
        memcpy(to, &sum, sizeof sum);
      }
  }
}

// TOKENS queries, with all heads of a group, against PART slots at a time, as in flash attention (arXiv:2205.14135).
static void attend_block(const Attention& p, int64_t b, int64_t kv_head, int64_t first, float* scratch) {
  int64_t group = p.heads / p.kv_heads, d = p.dim, wide = (d + WIDTH - 1) / WIDTH * WIDTH;
  int64_t tokens = p.tokens - first < TOKENS ? p.tokens - first : TOKENS, rows = tokens * group, tiles = (rows + ROWS - 1) / ROWS;
  float *q = scratch, *k = q + tiles * ROWS * d, *v = k + d * PART, *w = v + PART * wide, *out = w + tiles * ROWS * PART;
  float *greatest = out + tiles * ROWS * wide, *sum = greatest + tiles * ROWS;
  memset(scratch, 0, p.scratch() * sizeof(float));
  memcpy(q, p.q + p.query(b, first, kv_head * group) * d, rows * d * sizeof(float));
  for (int64_t r = 0; r < rows; r++) greatest[r] = NONE;
  for (int64_t part = 0; part < p.count; part++) {
    int64_t start = part * PART, n = p.slots - start < PART ? p.slots - start : PART;
    bool any = false;
    for (int64_t r = 0; r < rows && !any; r++) any = memchr(p.seen(b, kv_head * group + r % group, first + r / group) + start, 1, n);
    if (!any) continue;
    int64_t held = p.place(b, kv_head, p.first_slot(b, part));
    const Stored *keys = (const Stored*)p.k + held, *values = (const Stored*)p.v + held;
    for (int64_t s = 0; s < n; s++)
      for (int64_t i = 0; i < d; i++) k[i * PART + s] = Numbers::widen_one(keys[s * d + i]);
    for (int64_t s = 0; s < n; s++)
      for (int64_t i = 0; i < d; i++) v[s * wide + i] = Numbers::widen_one(values[s * d + i]);
    for (int64_t tile = 0; tile < tiles; tile++) {
      float* weights = w + tile * ROWS * PART;
      multiply_tile(q + tile * ROWS * d, d, k, PART, weights, false);
      for (int64_t r = tile * ROWS; r < tile * ROWS + ROWS && r < rows; r++) {
        float* x = w + r * PART;
        const bool* seen = p.seen(b, kv_head * group + r % group, first + r / group) + start;
        float before = greatest[r], now = weigh(x, seen, n, p.scale, before, sum[r]);
        greatest[r] = now;
        if (now == before) continue;
        float factor = before == NONE ? 0 : expf(before - now);
        for (int64_t i = 0; i < wide; i++) out[r * wide + i] *= factor;
      }
      multiply_tile(weights, PART, v, wide, out + tile * ROWS * wide, true);
    }
  }
  for (int64_t r = 0; r < rows; r++) {
    int64_t t = first + r / group, head = kv_head * group + r % group;
    Stored* y = (Stored*)p.y + ((b * p.tokens + t) * p.heads + head) * d;
    bool none = p.sees_nothing(b, head, t, sum[r]);
    for (int64_t i = 0; i < d; i++) y[i] = Numbers::round(none ? 0 : out[r * wide + i] / sum[r]);
  }
}

static void attend_blocks(int64_t begin, int64_t end, void* context) {
  const Attention& p = *(const Attention*)context;
  Buffer<float> scratch(p.scratch());
  int64_t blocks = (p.tokens + TOKENS - 1) / TOKENS;
  for (int64_t at = begin; at < end; at++) {
    // Later tokens see more: take the first, the last, the second, the last but one, so that all threads get as much.
    int64_t n = at % blocks, block = n % 2 ? blocks - 1 - n / 2 : n / 2;
    attend_block(p, at / blocks / p.kv_heads, at / blocks % p.kv_heads, block * TOKENS, scratch.data);
  }
}

static void attend(Attention p, int64_t rows) {
  int64_t d = p.dim, queries = rows * p.tokens * p.heads;
  Buffer<float> q(queries * d), parts(p.tokens == 1 ? queries * p.count * (d + 2) : 0);
  p.q = q.data;
  torch_parallel_for(0, rows * p.tokens, 1 + 65536 / (p.heads * d), rotate_and_store, &p);
  if (p.tokens == 1) {
    p.parts = parts.data;
    torch_parallel_for(0, rows * p.kv_heads * p.count, 1 + 32768 / (PART * d), attend_parts, &p);
    torch_parallel_for(0, queries, 1 + 65536 / (1 + p.count * d), merge_parts, &p);
  } else {
    torch_parallel_for(0, rows * p.kv_heads * ((p.tokens + TOKENS - 1) / TOKENS), 1, attend_blocks, &p);
  }
}

// attend_newest(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, Tensor slots, Tensor(a!) keys, Tensor(b!) values,
//   Tensor visible, Tensor page_table, bool paged) -> Tensor
// q [B, T, H, D], k and v [B, T, K, D], cos and sin [B, 1, T, D/2], slots [B, T], keys and values [B, K, S, D], visible
// [B, 1 or H, T, up to S], page_table [B, blocks] -> [B, T, H D]; contiguous, but for rows and tokens of q, k, v, and
// rows of page_table.
static void attend_newest(uint64_t* stack, uint64_t, uint64_t) {
  Tensor tensors[10], y;
  void* data[10];
  int64_t stride[3][2], rows;
  for (int i = 0; i < 10; i++) aoti_torch_get_data_ptr(tensors[i] = (Tensor)stack[i], &data[i]);
  int32_t dtype;
  aoti_torch_get_dtype(tensors[0], &dtype);
  Attention p = {};
  Heads* newest[] = {&p.newest_q, &p.newest_k, &p.newest_v};
  for (int i = 0; i < 3; i++) {
    for (int j = 0; j < 2; j++) aoti_torch_get_stride(tensors[i], j, &stride[i][j]);
    *newest[i] = {(const char*)data[i], stride[i][0] * (int64_t)sizeof(Stored), stride[i][1] * (int64_t)sizeof(Stored)};
  }
  aoti_torch_get_size(tensors[0], 0, &rows);
  aoti_torch_get_size(tensors[0], 1, &p.tokens);
  aoti_torch_get_size(tensors[0], 2, &p.heads);
  aoti_torch_get_size(tensors[0], 3, &p.dim);
  aoti_torch_get_size(tensors[6], 1, &p.kv_heads);
  aoti_torch_get_size(tensors[6], 2, &p.held_slots);
  aoti_torch_get_size(tensors[8], 1, &p.visible_heads);
  aoti_torch_get_size(tensors[8], 3, &p.slots);
  p.count = (p.slots + PART - 1) / PART;
  p.scale = (float)(1 / sqrt((double)p.dim));
  int64_t all = p.heads * p.dim, sizes[] = {rows, p.tokens, all}, strides[] = {p.tokens * all, all, 1};
  aoti_torch_empty_strided(3, sizes, strides, dtype, 0, 0, &y);
  aoti_torch_get_data_ptr(y, &p.y);
  p.cos = (const float*)data[3], p.sin = (const float*)data[4], p.at = (const int64_t*)data[5];
  if (stack[10]) p.pages = (const int32_t*)data[9];
  aoti_torch_get_stride(tensors[9], 0, &p.pages_stride);
  p.k = data[6], p.v = data[7], p.visible = (const bool*)data[8];
  attend(p, rows);
  for (Tensor tensor : tensors) aoti_torch_delete_tensor_object(tensor);
  stack[0] = (uint64_t)y;
}

// few_rows(Tensor x, Tensor weight, Tensor bias, Tensor norm, Tensor residual, float eps, int parts) -> Tensor
// x [..., K], of up to 8 dimensions, weight [N, K] -> [..., N]; all of them contiguous.
static void few_rows(uint64_t* stack, uint64_t, uint64_t) {
  Tensor tensors[5], y;
  void* data[5];
  for (int i = 0; i < 5; i++) aoti_torch_get_data_ptr(tensors[i] = (Tensor)stack[i], &data[i]);
  double eps = load<double>(&stack[5]);
  int64_t parts = (int64_t)stack[6];
  int64_t rows, n, k, dim, sizes[8], strides[8];
  int32_t dtype;
  aoti_torch_get_numel(tensors[0], &rows);
  aoti_torch_get_dim(tensors[0], &dim);
  aoti_torch_get_size(tensors[1], 0, &n);
  aoti_torch_get_size(tensors[1], 1, &k);
  aoti_torch_get_dtype(tensors[0], &dtype);
  bool gated = parts & 8;
  n = gated ? n / 2 : n;
  rows /= k;
  int64_t numel = 1;
  for (int64_t i = dim - 1; i >= 0; numel *= sizes[i--]) {
    aoti_torch_get_size(tensors[0], i, &sizes[i]);
    if (i == dim - 1) sizes[i] = n;
    strides[i] = numel;
  }
  aoti_torch_empty_strided(dim, sizes, strides, dtype, 0, 0, &y);
  Product p = {data[1], parts & 1 ? data[2] : nullptr, parts & 4 ? data[4] : nullptr, nullptr, nullptr, rows, n, k, gated};
  aoti_torch_get_data_ptr(y, &p.y);
  const void* norm = parts & 2 ? data[3] : nullptr;
  multiply(p, data[0], norm, eps);
  for (Tensor tensor : tensors) aoti_torch_delete_tensor_object(tensor);
  stack[0] = (uint64_t)y;
}

extern "C" int32_t register_kernels() {
  static Library library;
  int32_t error = aoti_torch_library_init_impl("llama_flex", "CPU", "cpu.cpp", 0, &library);
  if (!error) error = aoti_torch_library_impl(library, "few_rows_" NAME, few_rows);
  return error ? error : aoti_torch_library_impl(library, "attend_newest_" NAME, attend_newest);
}

extern "C" int32_t lanes() { return LANES; }
