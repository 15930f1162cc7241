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
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));

template <class T>
static T load(const void* from) {
  T value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

// A dtype: how its numbers are stored, widened to float, and rounded. Another way to store weights is one more of these.
struct Float32 {
  typedef float Stored;
  static Vector widen(const float* p) { return load<Vector>(p); }
  static float widen_one(float x) { return x; }
  static float round(float x) { return x; }
};

struct BFloat16 {
  typedef uint16_t Stored;
  static Vector widen(const uint16_t* p) {
    return (Vector)(__builtin_convertvector(load<Halves>(p), Words) << 16);
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
  static Vector widen(const uint16_t* p) {
#if defined(__AVX512F__)
    return (Vector)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__F16C__)
    return (Vector)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
    Vector wide;
    for (int i = 0; i < LANES; i++) wide[i] = widen_one(p[i]);
    return wide;
#endif
  }
  static float widen_one(uint16_t x) { return (float)load<_Float16>(&x); }
  static uint16_t round(float x) { _Float16 y = (_Float16)x; return load<uint16_t>(&y); }
};

// The products of R rows of a weight, each K long and STRIDE apart, with M rows of x. The order of the sums does not
// depend on R and M, so that a row gets the same bits in any company.
template <class D, int R, int M>
static void dot(const typename D::Stored* w, int64_t stride, const float* x, int64_t k, float (*y)[M]) {
  Vector sums[R][M][2] = {};
  int64_t i = 0;
  for (; i + 2 * LANES <= k; i += 2 * LANES)
    for (int half = 0; half < 2; half++) {
      Vector xs[M];
      for (int m = 0; m < M; m++) xs[m] = load<Vector>(x + m * k + i + half * LANES);
      for (int r = 0; r < R; r++) {
        Vector row = D::widen(w + r * stride + i + half * LANES);
        for (int m = 0; m < M; m++) sums[r][m][half] += row * xs[m];
      }
    }
  for (int r = 0; r < R; r++)
    for (int m = 0; m < M; m++) {
      Vector sum = sums[r][m][0] + sums[r][m][1];
      float total = 0;
      for (int lane = 0; lane < LANES; lane++) total += sum[lane];
      for (int64_t j = i; j < k; j++) total += D::widen_one(w[r * stride + j]) * x[m * k + j];
      y[r][m] = total;
    }
}

struct Product {
  const void *weight, *bias, *residual;
  void* y;
  const float* x;  // [rows, k]
  int64_t rows, n, k;
  bool gated;
};

// Rows `begin` to `end` of the weight, or of the two halves of a gated one, with M rows of x from row `m` on.
template <class D, int R, int M>
static void rows_of(const Product& p, int64_t row, int64_t m) {
  typedef typename D::Stored Stored;
  const Stored *w = (const Stored*)p.weight, *bias = (const Stored*)p.bias, *residual = (const Stored*)p.residual;
  float y[R][M], up[R][M];
  dot<D, R, M>(w + row * p.k, p.k, p.x + m * p.k, p.k, y);
  if (p.gated) dot<D, R, M>(w + (p.n + row) * p.k, p.k, p.x + m * p.k, p.k, up);
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

template <class D, int R>
static void all_rows_of(const Product& p, int64_t row) {
  int64_t m = 0;
  if (LANES == 16)
    for (; m + 4 <= p.rows; m += 4) rows_of<D, R, 4>(p, row, m);
  for (; m + 2 <= p.rows; m += 2) rows_of<D, R, 2>(p, row, m);
  for (; m < p.rows; m++) rows_of<D, R, 1>(p, row, m);
}

template <class D>
static void part(int64_t begin, int64_t end, void* context) {
  const Product& p = *(const Product*)context;
  constexpr int R = 4;
  int64_t row = begin * R, last = end * R < p.n ? end * R : p.n;
  for (; row + R <= last; row += R) all_rows_of<D, R>(p, row);
  for (; row < last; row++) all_rows_of<D, 1>(p, row);
}

template <class D>
static void multiply(Product p, const void* x, const void* norm, double eps) {
  typedef typename D::Stored Stored;
  std::unique_ptr<float[]> rows(new float[p.rows * p.k]);
  for (int64_t m = 0; m < p.rows; m++) {
    const Stored* from = (const Stored*)x + m * p.k;
    float* to = rows.get() + m * p.k;
    for (int64_t i = 0; i < p.k; i++) to[i] = D::widen_one(from[i]);
    if (!norm) continue;
    Vector sums = {};
    int64_t i = 0;
    for (; i + LANES <= p.k; i += LANES) { Vector v = load<Vector>(to + i); sums += v * v; }
    float total = 0;
    for (int lane = 0; lane < LANES; lane++) total += sums[lane];
    for (; i < p.k; i++) total += to[i] * to[i];
    float scale = 1 / std::sqrt(total / p.k + (float)eps);
    for (i = 0; i < p.k; i++) to[i] = D::widen_one(D::round(to[i] * scale * D::widen_one(((const Stored*)norm)[i])));
  }
  p.x = rows.get();
  int64_t bytes = 4 * p.k * sizeof(Stored) * (1 + p.gated);
  torch_parallel_for(0, (p.n + 3) / 4, 1 + 65536 / bytes, part<D>, &p);  // a thread is worth 64 KiB
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
