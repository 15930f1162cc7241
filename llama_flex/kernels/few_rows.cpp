// Products of a few rows with a weight matrix, which is read once: y = residual + W norm(x) + bias, or SwiGLU of it.
//
// Built by cpu.py without torch's headers, which take longer to compile than all of this: what it needs of torch's
// stable C interface (torch/csrc/inductor/aoti_torch/c/shim.h, torch/csrc/stable/c/shim.h) is declared here.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#if defined(__F16C__)
#include <immintrin.h>
#endif

extern "C" {
typedef struct OpaqueTensor* Tensor;
typedef struct OpaqueLibrary* Library;
int32_t aoti_torch_get_data_ptr(Tensor, void**);
int32_t aoti_torch_get_dtype(Tensor, int32_t*);
int32_t aoti_torch_get_size(Tensor, int64_t dimension, int64_t*);
int32_t aoti_torch_empty_strided(int64_t dimensions, const int64_t* sizes, const int64_t* strides, int32_t dtype,
                                 int32_t device_type, int32_t device_index, Tensor*);
int32_t aoti_torch_delete_tensor_object(Tensor);
int32_t aoti_torch_library_init_impl(const char* name, const char* key, const char* file, uint32_t line, Library*);
int32_t aoti_torch_library_impl(Library, const char* name, void (*)(uint64_t* stack, uint64_t, uint64_t));
int32_t aoti_torch_dtype_float32();
int32_t aoti_torch_dtype_bfloat16();
int32_t aoti_torch_dtype_float16();
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

template <class T>
static T load(const void* from) {
  T value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

// A dtype: how its numbers are stored, widened to float, and rounded. Another way to store weights is one more of these.
// `widen` reads 2 * LANES numbers, in the order into which `arrange` brings as many of x.
struct Float32 {
  typedef float Stored;
  static void widen(const float* p, Vector& a, Vector& b) {
    a = load<Vector>(p);
    b = load<Vector>(p + LANES);
  }
  static void arrange(float*) {}
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
    std::memcpy(x + LANES, odd, sizeof odd);
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
  static float widen_one(uint16_t x) { return (float)load<_Float16>(&x); }
  static uint16_t round(float x) {
    _Float16 y = (_Float16)x;
    return load<uint16_t>(&y);
  }
};

static float total(Vector sum) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)sum);
#else
  for (int width = LANES / 2; width; width /= 2)
    for (int i = 0; i < width; i++) sum[i] += sum[i + width];
  return sum[0];
#endif
}

// The products of R rows of a weight, each K long, with M rows of x. The order of the sums does not depend on R and M, so
// that a row gets the same bits in any company.
template <class D, int R, int M>
static void dot(const typename D::Stored* w, const float* x, int64_t k, float (*y)[M]) {
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
      const typename D::Stored* from = w + r * k + i;
      // Short rows end before the processor has found out that they are read in order.
      for (int line = 0; line < int(2 * LANES * sizeof *from); line += 64) __builtin_prefetch((char*)(from + R * k) + line, 0, 2);
      D::widen(from, c, d);
      for (int m = 0; m < M; m++) sums[r][m] += c * a[m];
      for (int m = 0; m < M; m++) sums[r][m] += d * b[m];
    }
  }
  for (int r = 0; r < R; r++)
    for (int m = 0; m < M; m++) {
      y[r][m] = total(sums[r][m]);
      for (int64_t j = i; j < k; j++) y[r][m] += D::widen_one(w[r * k + j]) * x[m * k + j];
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
template <class D, int R, int M>
static void rows_of(const Product& p, int64_t row, int64_t m) {
  typedef typename D::Stored Stored;
  const Stored *w = (const Stored*)p.weight, *bias = (const Stored*)p.bias, *residual = (const Stored*)p.residual;
  float y[R][M], up[R][M];
  dot<D, R, M>(w + row * p.k, p.x + m * p.k, p.k, y);
  if (p.gated) dot<D, R, M>(w + (p.n + row) * p.k, p.x + m * p.k, p.k, up);
  for (int r = 0; r < R; r++)
    for (int i = 0; i < M; i++) {
      float value = y[r][i];
      if (bias) value += D::widen_one(bias[row + r]);
      if (p.gated) value = value / (1 + std::exp(-value)) * (up[r][i] + (bias ? D::widen_one(bias[p.n + row + r]) : 0));
      int64_t at = (m + i) * p.n + row + r;
      if (residual) value += D::widen_one(residual[at]);
      ((Stored*)p.y)[at] = D::round(value);
    }
}

// Four rows of the weight with all rows of x, after the first of which they are in the cache.
template <class D>
static void block(const Product& p, int64_t row) {
  int64_t m = 0;
  if (LANES == 16)
    for (; m + 4 <= p.rows; m += 4) rows_of<D, 4, 4>(p, row, m);
  for (; m + 2 <= p.rows; m += 2) rows_of<D, 4, 2>(p, row, m);
  for (; m < p.rows; m++) rows_of<D, 4, 1>(p, row, m);
}

constexpr int BLOCK = 8;  // rows of a weight, for as many sums at a time as hide the latency of an addition

template <class D>
static void part(int64_t begin, int64_t end, void* context) {
  const Product& p = *(const Product*)context;
  int64_t row = begin * BLOCK, last = end * BLOCK < p.n ? end * BLOCK : p.n;
  for (; p.rows == 1 && row + BLOCK <= last; row += BLOCK) rows_of<D, BLOCK, 1>(p, row, 0);
  for (; row + 4 <= last; row += 4) block<D>(p, row);
  for (; row < last; row++)
    for (int64_t m = 0; m < p.rows; m++) rows_of<D, 1, 1>(p, row, m);
}

template <class D>
static void multiply(Product p, const void* x, const void* norm, double eps) {
  typedef typename D::Stored Stored;
  std::unique_ptr<float[]> rows(new float[p.rows * p.k]);
  for (int64_t m = 0; m < p.rows; m++) {
    const Stored* from = (const Stored*)x + m * p.k;
    float* to = rows.get() + m * p.k;
    for (int64_t i = 0; i < p.k; i++) to[i] = D::widen_one(from[i]);
    if (norm) {
      Vector sums = {};
      int64_t i = 0;
      for (; i + LANES <= p.k; i += LANES) {
        Vector v = load<Vector>(to + i);
        sums += v * v;
      }
      float sum = total(sums);
      for (; i < p.k; i++) sum += to[i] * to[i];
      float scale = 1 / std::sqrt(sum / p.k + (float)eps);
      for (i = 0; i < p.k; i++) to[i] = D::widen_one(D::round(to[i] * scale * D::widen_one(((const Stored*)norm)[i])));
    }
    for (int64_t i = 0; i + 2 * LANES <= p.k; i += 2 * LANES) D::arrange(to + i);
  }
  p.x = rows.get();
  int64_t bytes = BLOCK * p.k * sizeof(Stored) * (1 + p.gated);
  torch_parallel_for(0, (p.n + BLOCK - 1) / BLOCK, 1 + 65536 / bytes, part<D>, &p);  // a thread is worth 64 KiB
}

static double as_double(uint64_t bits) { return load<double>(&bits); }

// few_rows(Tensor x, Tensor weight, Tensor bias, Tensor norm, Tensor residual, float eps, int parts) -> Tensor
static void few_rows(uint64_t* stack, uint64_t, uint64_t) {
  Tensor tensors[5], y;
  void* data[5];
  for (int i = 0; i < 5; i++) aoti_torch_get_data_ptr(tensors[i] = (Tensor)stack[i], &data[i]);
  double eps = as_double(stack[5]);
  int64_t parts = (int64_t)stack[6];
  int64_t rows, n, k;
  int32_t dtype;
  aoti_torch_get_size(tensors[0], 0, &rows);
  aoti_torch_get_size(tensors[1], 0, &n);
  aoti_torch_get_size(tensors[1], 1, &k);
  aoti_torch_get_dtype(tensors[0], &dtype);
  bool gated = parts & 8;
  n = gated ? n / 2 : n;
  int64_t sizes[] = {rows, n}, strides[] = {n, 1};
  aoti_torch_empty_strided(2, sizes, strides, dtype, 0, 0, &y);
  Product p = {data[1], parts & 1 ? data[2] : nullptr, parts & 4 ? data[4] : nullptr, nullptr, nullptr, rows, n, k, gated};
  aoti_torch_get_data_ptr(y, &p.y);
  const void* norm = parts & 2 ? data[3] : nullptr;
  if (dtype == aoti_torch_dtype_float32()) multiply<Float32>(p, data[0], norm, eps);
  else if (dtype == aoti_torch_dtype_bfloat16()) multiply<BFloat16>(p, data[0], norm, eps);
  else multiply<Float16>(p, data[0], norm, eps);
  for (Tensor tensor : tensors) aoti_torch_delete_tensor_object(tensor);
  stack[0] = (uint64_t)y;
}

extern "C" int32_t register_kernels() {
  static Library library;
  int32_t error = aoti_torch_library_init_impl("llama_flex", "CPU", "few_rows.cpp", 0, &library);
  return error ? error : aoti_torch_library_impl(library, "few_rows", few_rows);
}
