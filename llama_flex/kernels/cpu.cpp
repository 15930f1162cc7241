// Kernels for the CPU. `few_rows`: the product of a few rows with a weight matrix, which is read once, y = residual +
// W norm(x) + bias, or SwiGLU of it. `attend_newest`: rotate the queries and keys of each row's newest tokens, store keys
// and values in the cache, and attend to it by definition, softmax(q k^T / sqrt(D)) v over visible slots. `run_blocks`:
// whole layers for few rows, made of these two. `normalise` and `swiglu`: what stands around products of many rows.
// `summarise`: what sampling needs to know of logits.
//
// Built by `build.py`, for one dtype at a time (NUMBERS, one of the structures below), and without torch's headers, which
// take longer to compile than all of this: what it needs of torch's stable C interface
// (torch/csrc/inductor/aoti_torch/c/shim.h, torch/csrc/stable/c/shim.h) is declared here.
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __AVX2__
#include <immintrin.h>
#endif

extern "C" {
typedef struct OpaqueTensor* Tensor;
typedef struct OpaqueLibrary* Library;
typedef struct OpaqueList* ListHandle;
int32_t aoti_torch_get_data_ptr(Tensor, void**);
int32_t aoti_torch_get_dtype(Tensor, int32_t*);
int32_t aoti_torch_get_size(Tensor, int64_t dimension, int64_t*);
int32_t aoti_torch_get_stride(Tensor, int64_t dimension, int64_t*);
int32_t aoti_torch_get_numel(Tensor, int64_t*);
int32_t aoti_torch_get_dim(Tensor, int64_t*);
int32_t aoti_torch_get_device_type(Tensor, int32_t*);
int32_t aoti_torch_is_contiguous(Tensor, bool*);
int32_t aoti_torch_empty_strided(int64_t dimensions, const int64_t* sizes, const int64_t* strides, int32_t dtype,
                                 int32_t device_type, int32_t device_index, Tensor*);
int32_t aoti_torch_delete_tensor_object(Tensor);
int32_t aoti_torch_library_init_impl(const char* name, const char* key, const char* file, uint32_t line, Library*);
int32_t aoti_torch_library_impl(Library, const char* name, void (*)(uint64_t* stack, uint64_t, uint64_t));
int32_t torch_list_size(ListHandle, size_t*);
int32_t torch_list_get_item(ListHandle, size_t, uint64_t*);
int32_t torch_delete_list(ListHandle);
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

typedef int8_t Bytes __attribute__((vector_size(LANES)));
typedef uint8_t Naturals __attribute__((vector_size(LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));

// Compilers widen number by number if asked by __builtin_convertvector.
static Ints extend(Bytes numbers) {
#if defined(__AVX512F__)
  return (Ints)_mm512_cvtepi8_epi32((__m128i)numbers);
#elif defined(__AVX2__)
  return (Ints)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)&numbers));
#else
  return __builtin_convertvector(numbers, Ints);
#endif
}

static Words extend(Halves numbers) {
#if defined(__AVX512F__)
  return (Words)_mm512_cvtepu16_epi32((__m256i)numbers);
#elif defined(__AVX2__)
  return (Words)_mm256_cvtepu16_epi32((__m128i)numbers);
#else
  return __builtin_convertvector(numbers, Words);
#endif
}

static Vector widen(Naturals numbers) {
#if defined(__AVX512F__)
  return (Vector)_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32((__m128i)numbers));
#elif defined(__AVX2__)
  return (Vector)_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)&numbers)));
#else
  return __builtin_convertvector(numbers, Vector);
#endif
}

struct Pair {  // 2 * LANES numbers
  Vector a, b;
};

// A dtype: how its numbers are stored, widened to float, and rounded. Another way to store weights is one more of these.
// `widen` reads 2 * LANES numbers, in the order into which `arrange` brings as many of x, and `restore` undoes that. `read`
// gets as many of a weight for `add`, which adds their products with x to sums.
template <class Numbers>
struct Widened {
  typedef Pair Read;
  typedef Pair Factor;
  static constexpr float MOST = 0;  // of inputs in 8 bits; 0: it has none
  static constexpr bool FOUR = false;  // whether to take four rows of a weight at a time even for one row of x
  static int64_t size(int64_t k) { return k; }  // of a row of x, arranged
  static int64_t bytes(int64_t k) { return k * sizeof(typename Numbers::Stored); }  // of a row of a weight
  static Pair factor(Vector a, Vector b) { return {a, b}; }
  template <class Stored>
  static Pair read(const Stored* p) {
    Pair pair;
    Numbers::widen(p, pair.a, pair.b);
    return pair;
  }
  static void add(Vector& sum, const Pair& weight, const Pair& x) {
    sum += weight.a * x.a;
    sum += weight.b * x.b;
  }
};

struct Float32 : Widened<Float32> {
  typedef float Stored;
  static void widen(const float* p, Vector& a, Vector& b) {
    a = load<Vector>(p);
    b = load<Vector>(p + LANES);
  }
  static Vector widen(Vector numbers) { return numbers; }
  static void arrange(float*) {}
  static void restore(float*) {}
  static float widen_one(float x) { return x; }
  static float round(float x) { return x; }
};

struct BFloat16 : Widened<BFloat16> {
  typedef uint16_t Stored;
#if BFLOAT16 && defined(__AVX512BF16__)
  // Products of two neighbours at a time, without widening: x is a number of this dtype, too.
  typedef Words Read;
  typedef Words Factor;
  static Words factor(Vector a, Vector b) { return (Words)b & 0xffff0000u | (Words)a >> 16; }
  static Words read(const uint16_t* p) { return load<Words>(p); }
  static void add(Vector& sum, const Words& weight, const Words& x) {
    sum = (Vector)_mm512_dpbf16_ps((__m512)sum, (__m512bh)weight, (__m512bh)x);
  }
#endif
  static void widen(const uint16_t* p, Vector& a, Vector& b) {  // two numbers in each word: the even ones, the odd ones
    Words words = load<Words>(p);
    a = (Vector)(words << 16);
    b = (Vector)(words & 0xffff0000u);
  }
  static Vector widen(Halves numbers) { return (Vector)(extend(numbers) << 16); }
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
struct Float16 : Widened<Float16> {
  typedef uint16_t Stored;
  static Vector widen(Halves numbers) {
#if defined(__AVX512F__)
    return (Vector)_mm512_cvtph_ps((__m256i)numbers);
#elif defined(__F16C__)
    return (Vector)_mm256_cvtph_ps((__m128i)numbers);
#else
    Vector wide;
    for (int i = 0; i < LANES; i++) wide[i] = widen_one(numbers[i]);
    return wide;
#endif
  }
  static void widen(const uint16_t* p, Vector& a, Vector& b) {
    a = widen(load<Halves>(p));
    b = widen(load<Halves>(p + LANES));
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

template <class Numbers>
struct OfBytes : Widened<Numbers> {  // of weights only, which have a scale for each row, or, as InGroups, for each group
  typedef int8_t Stored;
  static void widen(const int8_t* p, Vector& a, Vector& b) {
    a = Numbers::floats(extend(load<Bytes>(p)));
    b = Numbers::floats(extend(load<Bytes>(p + LANES)));
  }
  static void arrange(float*) {}
  // A single addition that waits for the one before: of two, 8 bits would have to wait longer than for memory.
  static void add(Vector& sum, const Pair& weight, const Pair& x) { sum += weight.a * x.a + weight.b * x.b; }
};

// `most` and the like: of inputs that are numbers of the same kind, `RANGE` times a row's scale being its largest. Adding
// and subtracting a number whose last bit is a step, `whole`, rounds to steps.
struct Int8 : OfBytes<Int8> {
  static constexpr float LEAST = -128, MOST = 127, RANGE = 127.5;
  static Vector whole(Vector) { return Vector{} + 0x1.8p23f; }
  static Vector floats(Ints numbers) { return __builtin_convertvector(numbers, Vector); }
  static float widen_one(int8_t x) { return x; }
};

struct Float8 : OfBytes<Float8> {  // float8_e4m3fn
  static constexpr float LEAST = -448, MOST = 448, RANGE = 448;
  static Vector whole(Vector x) {
    Words power = (Words)x & 0x7f800000u, least = Words{} + 0x3c800000u;  // 2^-6; there are 8 steps up to the next power
    return (Vector)((power < least ? least : power) + (20u << 23)) * 1.5f;
  }
  static constexpr float BIAS = 0x1p120f;  // a multiplication makes the exponent a float's, and numbers below normal right
  static Vector floats(Ints numbers) { return (Vector)((Words)numbers << 20 & 0x87f00000u) * BIAS; }
  static float widen_one(int8_t x) {
    uint32_t bits = (uint32_t)x << 20 & 0x87f00000u;
    return load<float>(&bits) * BIAS;
  }
};

// Numbers of 8 bits with a scale for each group; of Float8 in float32, and each group of inputs has its own, too.
template <class Bytes>
struct InGroups : Bytes {
  static constexpr float MOST = 0;
  static constexpr bool FOUR = true;
};

typedef NUMBERS Numbers;
typedef Numbers::Stored Stored;

template <class T>
struct Buffer {
  T* data;

  explicit Buffer(int64_t size) : data((T*)aligned_alloc(64, (size * sizeof(T) + 63) / 64 * 64)) {}  // as vectors lie
  Buffer(const Buffer&) = delete;
  ~Buffer() { free(data); }
};

// A constant of this kind is read from memory; written into a vector one by one, compilers build it anew each time.
struct Order {
  int32_t at[LANES];
};

constexpr Order order(int factor, int plus, int flipped) {
  Order order{};
  for (int i = 0; i < LANES; i++) order.at[i] = (factor * i + plus) ^ flipped;
  return order;
}

constexpr Order halves(int width, int plus) {
  Order order{};
  for (int i = 0; i < LANES; i++) order.at[i] = i / width * 2 * width + i % width + plus;
  return order;
}

template <int WIDTH>
static Vector add_other(Vector sum) {
#ifdef __clang__
  Vector other;
  for (int i = 0; i < LANES; i++) other[i] = sum[i ^ WIDTH];
  return sum + other;
#else
  static constexpr Order other = order(1, 0, WIDTH);
  return sum + __builtin_shuffle(sum, load<Ints>(&other));
#endif
}

static float total(Vector sum) {
  if constexpr (LANES >= 16) sum = add_other<8>(sum);
  if constexpr (LANES >= 8) sum = add_other<4>(sum);
  return add_other<1>(add_other<2>(sum))[0];
}

// Add the halves of each of the groups of 2 WIDTH lanes in a, then in b.
template <int WIDTH>
static Vector add_halves(Vector a, Vector b) {
#ifdef __clang__
  Vector sums;
  for (int i = 0; i < LANES; i++) {
    int from = i / WIDTH * 2 * WIDTH + i % WIDTH;
    sums[i] = from < LANES ? a[from] + a[from + WIDTH] : b[from - LANES] + b[from - LANES + WIDTH];
  }
  return sums;
#else
  static constexpr Order first = halves(WIDTH, 0), second = halves(WIDTH, WIDTH);
  return __builtin_shuffle(a, b, load<Ints>(&first)) + __builtin_shuffle(a, b, load<Ints>(&second));
#endif
}

// The same total, of four at once: that of a in lane 0, of b in lane LANES / 4, and so on.
static Vector totals(Vector a, Vector b, Vector c, Vector d) {
  Vector sum = add_halves<LANES / 4>(add_halves<LANES / 2>(a, b), add_halves<LANES / 2>(c, d));
  if constexpr (LANES >= 16) sum = add_other<2>(sum);
  if constexpr (LANES >= 8) sum = add_other<1>(sum);
  return sum;
}

// Sums of neighbours in a, then in b.
static Vector add_pairs(Vector a, Vector b) {
#ifdef __clang__
  Vector sums;
  for (int i = 0; i < LANES / 2; i++) sums[i] = a[2 * i] + a[2 * i + 1], sums[LANES / 2 + i] = b[2 * i] + b[2 * i + 1];
  return sums;
#else
  static constexpr Order even = order(2, 0, 0), odd = order(2, 1, 0);
  return __builtin_shuffle(a, b, load<Ints>(&even)) + __builtin_shuffle(a, b, load<Ints>(&odd));
#endif
}

// The numbers of a at the given places.
static Vector pick(Vector a, Ints places) {
#if defined(__AVX512F__)
  return (Vector)_mm512_permutexvar_ps((__m512i)places, (__m512)a);
#elif defined(__AVX2__)
  return (Vector)_mm256_permutevar8x32_ps((__m256)a, (__m256i)places);
#else
  Vector picked;
  for (int i = 0; i < LANES; i++) picked[i] = a[places[i]];
  return picked;
#endif
}

static void prefetch(const void* from, int64_t bytes) {
  for (int64_t line = 0; line < bytes; line += 64) __builtin_prefetch((const char*)from + line, 0, 2);
}

// Add the products of R rows of a weight, each K long, with M rows of x, up to the last whole vectors; return where they
// end. The order of the sums does not depend on R and M, so that a row gets the same bits in any company.
template <class Weights, int R, int M>
static int64_t add_products(const typename Weights::Stored* w, const float* x, int64_t k, Vector (*sums)[M]) {
  // Short rows end before the processor has found out that they are read in order; 6 KB hide the latency of memory.
  int64_t i = 0, ahead = R == 1 || k <= 256 ? 6144 : R * k * int64_t(sizeof *w);
  for (; i + 2 * LANES <= k; i += 2 * LANES) {
    typename Weights::Factor factors[M];
    for (int m = 0; m < M; m++) factors[m] = Weights::factor(load<Vector>(x + m * k + i), load<Vector>(x + m * k + i + LANES));
    for (int r = 0; r < R; r++) {
      const typename Weights::Stored* from = w + r * k + i;
      prefetch((const char*)from + ahead, 2 * LANES * sizeof *from);
      typename Weights::Read weight = Weights::read(from);
      for (int m = 0; m < M; m++) Weights::add(sums[r][m], weight, factors[m]);
    }
  }
  return i;
}

template <class Weights, int R, int M>
static void dot(const typename Weights::Stored* w, const float* x, int64_t k, float (*y)[M]) {
  Vector sums[R][M] = {};
  int64_t i = add_products<Weights, R, M>(w, x, k, sums);
#pragma GCC unroll 8  // else the sums go to memory
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int m = 0; m < M; m++) {
      y[r][m] = total(sums[r][m]);
      for (int64_t j = i; j < k; j++) y[r][m] += Weights::widen_one(w[r * k + j]) * x[m * k + j];
    }
}

enum { UINT8 = 0, INT8 = 1, INT32 = 3, INT64 = 4, FLOAT32 = 6, FLOAT64 = 7, BOOL = 11, FLOAT8 = 24 };  // torch's dtypes

static int64_t per_element(int32_t dtype) { return dtype == INT32 ? 8 : dtype == UINT8 ? 2 : 1; }  // numbers of a weight

struct Matrix {  // [n, k]; of a quantised one, the dtype tells the kind
  const void *numbers, *scale, *zero;
  int32_t dtype;
  int64_t groups, run_shift;  // scales of a row; the logarithm of the runs of columns of 4 bits that one belongs to
  bool has_inputs;            // in 8 bits
  const void* input_scale;    // null if each row of x has its own
};

struct Product {
  Matrix weight;
  const void *bias, *residual;
  void* y;
  const float *x, *x_scale;  // [rows, x_size], arranged; [rows] or null
  int64_t rows, n, k, x_size;
  bool gated;
};

template <int R, int M, class Weights>
static void multiply_rows(Weights, const Product& p, int64_t row, int64_t m, float (*y)[M]) {
  dot<Weights, R, M>((const typename Weights::Stored*)p.weight.numbers + row * p.k, p.x + m * p.x_size, p.k, y);
  const Stored* scale = (const Stored*)p.weight.scale;
  for (int r = 0; scale && r < R; r++)
    for (int i = 0; i < M; i++) y[r][i] *= Numbers::widen_one(scale[row + r]) * (p.x_scale ? p.x_scale[m + i] : 1);
}

static float scale_of(InGroups<Int8>, const Product& p, int64_t at) { return Numbers::widen_one(((const Stored*)p.weight.scale)[at]); }
static float scale_of(InGroups<Float8>, const Product& p, int64_t at) { return ((const float*)p.weight.scale)[at]; }

template <int R, int M, class Bytes>
static void multiply_rows(InGroups<Bytes> kind, const Product& p, int64_t row, int64_t m, float (*y)[M]) {
  int64_t groups = p.weight.groups, size = p.k / groups, ahead = R * p.k > 6144 ? R * p.k : 6144;
  const int8_t* numbers = (const int8_t*)p.weight.numbers + row * p.k;
  const uint8_t* zero = (const uint8_t*)p.weight.zero;
  if (zero) zero += row * groups;
  const float* x = p.x + m * p.x_size;
  Vector sums[R][M] = {};
  for (int64_t group = 0; group < groups; group++) {
    float scales[R], zeros[R];
    for (int r = 0; r < R; r++) {
      scales[r] = scale_of(kind, p, (row + r) * groups + group);
      zeros[r] = zero ? zero[r * groups + group] - 128.f : 0;
    }
    for (int64_t i = group * size; i < (group + 1) * size; i += 2 * LANES) {
      Pair factors[M];
      for (int n = 0; n < M; n++) factors[n] = {load<Vector>(x + n * p.x_size + i), load<Vector>(x + n * p.x_size + i + LANES)};
#pragma GCC unroll 4
      for (int r = 0; r < R; r++) {
        const int8_t* from = numbers + r * p.k + i;
        prefetch((const char*)from + ahead, 2 * LANES);
        Pair read = Bytes::read(from), weight = {(read.a - zeros[r]) * scales[r], (read.b - zeros[r]) * scales[r]};
#pragma GCC unroll 4
        for (int n = 0; n < M; n++) Bytes::add(sums[r][n], weight, factors[n]);
      }
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int n = 0; n < M; n++) y[r][n] = total(sums[r][n]);
}

// The first of LANES numbers, or all of them, and zeros.
template <class T>
static auto load_some(const T* from, int64_t count) {
  typedef T Some __attribute__((vector_size(LANES * sizeof(T))));
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  uint16_t which = count < LANES ? (1 << count) - 1 : 0xffff;
  if constexpr (sizeof(T) == 4) return (Some)_mm512_maskz_loadu_epi32(which, from);
  else if constexpr (sizeof(T) == 2) return (Some)_mm256_maskz_loadu_epi16(which, from);
  else return (Some)_mm_maskz_loadu_epi8(which, from);
#else
  if (count >= LANES) return load<Some>(from);
  T some[LANES] = {};
  for (int64_t i = 0; i < count; i++) some[i] = from[i];
  return load<Some>(some);
#endif
}

// Not in the function that reads them: libraries share such constants of functions that are not static, by their names.
#if BFLOAT16 && defined(__AVX512BF16__)
// In this dtype, twice: of each half of a word, an instruction looks at one bit more.
constexpr struct {
  uint16_t at[32];
} FOUR_BITS = {{0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80, 0x0000, 0x3f80, 0x4000,
                0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0, 0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040,
                0xc000, 0xbf80, 0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0}};
#elif defined(__AVX512F__)
constexpr struct {
  float at[16];
} FOUR_BITS = {{-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7}};
#endif

constexpr struct {
  float at[16];
} NF4_VALUES = {{-1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f, -0.28444138169288635f, -0.18477343022823334f,
             -0.09105003625154495f, 0.0f, 0.07958029955625534f, 0.16093020141124725f, 0.24611230194568634f, 0.33791524171829224f,
             0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f}};  // of NF4

// Weights of 4 bits, as weight.py says: whole numbers, or the values of NF4. A vector of words is a unit, whose numbers come
// out of it in STEPS. Four units are a span: it has LANES runs of 32 columns, and so up to LANES scales.
template <bool NF4>
struct FourBits {
  static constexpr int RUN = 32, UNIT = 8 * LANES, SPAN = 4 * UNIT;
#if BFLOAT16 && defined(__AVX512BF16__)
  static constexpr int STEPS = NF4 ? 8 : 4;  // 4: numbers i and i + 4 of each word at a time, without widening
#else
  static constexpr int STEPS = 8;
#endif
  static constexpr float MOST = 0;
  static constexpr bool FOUR = true;  // else what surrounds a short row takes a third of the time

  struct Span {  // of x
    Vector factors[4][STEPS];  // with 4 steps, two numbers of this dtype in the place of one
    Vector sums;  // of the columns of each scale
  };

  static int64_t size(int64_t k) { return (k + SPAN - 1) / SPAN * (sizeof(Span) / sizeof(float)); }
  static int64_t bytes(int64_t k) { return k / 2; }

  // The numbers of step i, minus 8, or their values.
  static Vector read(Words words, int i) {
    if constexpr (NF4) {
#if defined(__AVX512F__)
      return (Vector)_mm512_permutexvar_ps((__m512i)(words >> 4 * i), load<__m512>(&NF4_VALUES));
#elif defined(__AVX2__)
      __m256i at = (__m256i)(words >> 4 * i);  // of a half, an instruction looks at three bits; the fourth tells which
      __m256 low = _mm256_permutevar8x32_ps(load<__m256>(NF4_VALUES.at), at);
      __m256 high = _mm256_permutevar8x32_ps(load<__m256>(NF4_VALUES.at + 8), at);
      return (Vector)_mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(at, 28)));
#else
      Vector values;
      for (int lane = 0; lane < LANES; lane++) values[lane] = NF4_VALUES.at[words[lane] >> 4 * i & 15];
      return values;
#endif
    }
#if BFLOAT16 && defined(__AVX512BF16__)
    return (Vector)_mm512_permutexvar_epi16((__m512i)(words >> 4 * i), load<__m512i>(&FOUR_BITS));
#elif defined(__AVX512F__)
    return (Vector)_mm512_permutexvar_ps((__m512i)(words >> 4 * i), load<__m512>(&FOUR_BITS));
#else
    return __builtin_convertvector((Ints)((words ^ 0x88888888u) << (28 - 4 * i)) >> 28, Vector);
#endif
  }

  static void add(Vector& sum, Vector numbers, Vector x) {
#if BFLOAT16 && defined(__AVX512BF16__)
    if constexpr (!NF4) {
      sum = (Vector)_mm512_dpbf16_ps((__m512)sum, (__m512bh)numbers, (__m512bh)x);
      return;
    }
#endif
    sum += numbers * x;
  }

  static Vector scales(const void* scale, int64_t at, int64_t count) {
    if constexpr (NF4) return load_some((const float*)scale + at, count);
    else return Numbers::widen(load_some((const Stored*)scale + at, count));
  }
};
typedef FourBits<false> Int4;

// Which of a span's scales belongs to each lane of a unit, if it is that of 1, 2 or 4 runs.
struct Places {
  Order of[3][4];
};
constexpr Places PLACES = [] {
  Places places{};
  for (int shift = 0; shift < 3; shift++)
    for (int lane = 0; lane < 4 * LANES; lane++) places.of[shift][lane / LANES].at[lane % LANES] = lane / 4 >> shift;
  return places;
}();

template <int R, int M, bool NF4>
static void multiply_rows(FourBits<NF4>, const Product& p, int64_t row, int64_t m, float (*y)[M]) {
  int64_t words = p.k / 8, groups = p.weight.groups, ahead = R * p.k / 2 > 6144 ? R * p.k / 2 : 6144;
  const uint32_t* numbers = (const uint32_t*)p.weight.numbers + row * words;
  const uint8_t* zero = (const uint8_t*)p.weight.zero;
  if (zero) zero += row * groups;
  Vector sums[R][M] = {};
  for (int64_t span = 0; span * 4 * LANES < words; span++) {
    const typename FourBits<NF4>::Span* x[M];
    for (int i = 0; i < M; i++) x[i] = (const typename FourBits<NF4>::Span*)(p.x + (m + i) * p.x_size) + span;
    int64_t first = span * LANES >> p.weight.run_shift;
    Vector scales[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) {
      scales[r] = FourBits<NF4>::scales(p.weight.scale, (row + r) * groups + first, groups - first);
      if (!zero) continue;
      Vector zeros = scales[r] * (widen(load_some(zero + r * groups + first, groups - first)) - 8.f);
#pragma GCC unroll 4
      for (int i = 0; i < M; i++) sums[r][i] -= zeros * x[i]->sums;
    }
    for (int unit = 0; unit < 4; unit++) {
      int64_t at = (span * 4 + unit) * LANES;
      if (at >= words) break;
      Ints places = load<Ints>(&PLACES.of[p.weight.run_shift][unit]);
#pragma GCC unroll 4
      for (int r = 0; r < R; r++) {
        const uint32_t* from = numbers + r * words + at;
        prefetch((const char*)from + ahead, 4 * LANES);
        Words four_bits = (Words)load_some(from, words - at);
        Vector part[M] = {};
#pragma GCC unroll 8
        for (int step = 0; step < FourBits<NF4>::STEPS; step++) {
          Vector read = FourBits<NF4>::read(four_bits, step);
#pragma GCC unroll 4
          for (int i = 0; i < M; i++) FourBits<NF4>::add(part[i], read, x[i]->factors[unit][step]);
        }
        Vector each = pick(scales[r], places);
#pragma GCC unroll 4
        for (int i = 0; i < M; i++) sums[r][i] += each * part[i];
      }
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < M; i++)
    if constexpr (R == 4) {
      Vector all = totals(sums[0][i], sums[1][i], sums[2][i], sums[3][i]);
      for (int r = 0; r < R; r++) y[r][i] = all[r * (LANES / 4)];
    } else {
      for (int r = 0; r < R; r++) y[r][i] = total(sums[r][i]);
    }
}

// R rows of the weight, or of both halves of a gated one, with M rows of x from row `m` on.
template <class Weights, int R, int M>
static void rows_of(const Product& p, int64_t row, int64_t m) {
  const Stored *bias = (const Stored*)p.bias, *residual = (const Stored*)p.residual;
  float y[R][M], up[R][M];
  multiply_rows<R, M>(Weights(), p, row, m, y);
  if (p.gated) multiply_rows<R, M>(Weights(), p, p.n + row, m, up);
  for (int r = 0; r < R; r++)
    for (int i = 0; i < M; i++) {
      float value = y[r][i], other = p.gated ? up[r][i] : 0;
      if (bias) value += Numbers::widen_one(bias[row + r]);
      if (bias && p.gated) other += Numbers::widen_one(bias[p.n + row + r]);
      if (p.gated) value = value / (1 + expf(-value)) * other;
      int64_t at = (m + i) * p.n + row + r;
      if (residual) value += Numbers::widen_one(residual[at]);
      ((Stored*)p.y)[at] = Numbers::round(value);
    }
}

// Four rows of the weight with all rows of x, after the first of which they are in the cache.
template <class Weights>
static void four_rows(const Product& p, int64_t row) {
  int64_t m = 0;
  if (LANES == 16)
    for (; m + 4 <= p.rows; m += 4) rows_of<Weights, 4, 4>(p, row, m);
  for (; m + 2 <= p.rows; m += 2) rows_of<Weights, 4, 2>(p, row, m);
  for (; m < p.rows; m++) rows_of<Weights, 4, 1>(p, row, m);
}

constexpr int BLOCK = 8;  // rows of a weight

template <class Weights>
static void part(int64_t begin, int64_t end, void* context) {
  const Product& p = *(const Product*)context;
  int64_t row = begin * BLOCK, last = end * BLOCK < p.n ? end * BLOCK : p.n;
  for (; (p.rows > 1 || Weights::FOUR) && row + 4 <= last; row += 4) four_rows<Weights>(p, row);
  for (; row < last; row++)
    for (int64_t m = 0; m < p.rows; m++) rows_of<Weights, 1, 1>(p, row, m);
}

static void widen_row(const void* x, int64_t k, float* y) {
  for (int64_t i = 0; i < k; i++) y[i] = Numbers::widen_one(((const Stored*)x)[i]);
}

static void round_row(const float* x, int64_t k, Stored* y) {
  for (int64_t i = 0; i < k; i++) y[i] = Numbers::round(x[i]);
}

static void normalise(float* x, const void* norm, int64_t k, double eps) {
  Vector sums = {};
  int64_t i = 0;
  for (; i + LANES <= k; i += LANES) {
    Vector v = load<Vector>(x + i);
    sums += v * v;
  }
  float sum = total(sums);
  for (; i < k; i++) sum += x[i] * x[i];
  float scale = 1 / sqrtf(sum / k + (float)eps);
  for (i = 0; i < k; i++) x[i] = Numbers::widen_one(Numbers::round(x[i] * scale * Numbers::widen_one(((const Stored*)norm)[i])));
}

// Replace a row of x by numbers of a weight's kind, as activations.py says, and return their scale. x has room for whole
// vectors.
template <class Weights>
static float quantise(float* x, int64_t k, const Stored* input_scale) {
  Vector most = {};
  for (int64_t i = k; i % LANES; i++) x[i] = 0;
  for (int64_t i = 0; i < k; i += LANES) {
    Vector v = load<Vector>(x + i);
    v = v < 0 ? -v : v;
    most = v > most ? v : most;
  }
  float greatest = 0x1p-118f;  // a row of zeros is divided by something
  for (int lane = 0; lane < LANES; lane++) greatest = fmaxf(greatest, most[lane]);
  float scale = input_scale ? Numbers::widen_one(*input_scale) : greatest / Weights::RANGE;
  for (int64_t i = 0; i < k; i += LANES) {
    Vector least = Vector{} + Weights::LEAST, v = load<Vector>(x + i);
    v = v == -greatest && !input_scale ? least : v / scale;
    v = v < least ? least : v;  // NaN stays NaN
    v = v > Weights::MOST ? Vector{} + Weights::MOST : v;
    Vector whole = Weights::whole(v);
    v = (v + whole) - whole;
    memcpy(x + i, &v, sizeof v);
  }
  return scale;
}

// The same for each group of a row, which is multiplied by its scale again.
static void round_groups(float* x, int64_t k, int64_t size) {
  for (float* end = x + k; x < end; x += size) {
    float scale = quantise<Float8>(x, size, nullptr);
    for (int64_t i = 0; i < size; i++) x[i] *= scale;
  }
}

template <class Weights>
static void arrange(Weights, const Product& p, const float* x, float* arranged) {
  memcpy(arranged, x, p.k * sizeof(float));
  for (int64_t i = 0; i + 2 * LANES <= p.k; i += 2 * LANES) Weights::arrange(arranged + i);
}

template <bool NF4>
static void arrange(FourBits<NF4>, const Product& p, const float* x, float* arranged) {
  typedef float Four __attribute__((vector_size(16)));
  typedef uint32_t FourWords __attribute__((vector_size(16)));
  typedef typename FourBits<NF4>::Span Span;
  Span* spans = (Span*)arranged;
  memset(spans, 0, p.x_size * sizeof(float));
  for (int64_t run = 0; run < p.k / Int4::RUN; run++, x += Int4::RUN) {
    Span& span = spans[run / LANES];
    int64_t of_span = run % LANES, unit = of_span / (LANES / 4), lane = 4 * (of_span % (LANES / 4));
    Four columns[8], sum = {};
    for (int i = 0; i < 8; i++) sum += columns[i] = load<Four>(x + 4 * i);
    for (int i = 0; i < FourBits<NF4>::STEPS; i++) {
      FourWords four = (FourWords)columns[i];
      if (FourBits<NF4>::STEPS == 4) four = ((FourWords)columns[i + 4] & 0xffff0000u) | four >> 16;
      memcpy((float*)&span.factors[unit][i] + lane, &four, sizeof four);
    }
    span.sums[of_span >> p.weight.run_shift] += sum[0] + sum[1] + (sum[2] + sum[3]);
  }
}

template <class Weights>
static void multiply_with(Product p, const void* x, const void* norm, double eps) {
  p.x_size = Weights::size(p.k);
  Buffer<float> rows(p.rows * p.x_size), row(p.k), scales(p.rows);
  bool in_groups = p.weight.dtype == FLOAT8 && p.weight.groups > 1;
  p.x_scale = p.weight.has_inputs && !in_groups ? scales.data : nullptr;
  for (int64_t m = 0; m < p.rows; m++) {
    widen_row((const Stored*)x + m * p.k, p.k, row.data);
    if (norm) normalise(row.data, norm, p.k, eps);
    if constexpr (Weights::MOST > 0)
      if (p.x_scale) scales.data[m] = quantise<Weights>(row.data, p.k, (const Stored*)p.weight.input_scale);
    if (p.weight.has_inputs && in_groups) round_groups(row.data, p.k, p.k / p.weight.groups);
    arrange(Weights(), p, row.data, rows.data + m * p.x_size);
  }
  p.x = rows.data;
  int64_t bytes = BLOCK * Weights::bytes(p.k) * (1 + p.gated);
  torch_parallel_for(0, (p.n + BLOCK - 1) / BLOCK, 1 + 65536 / bytes, part<Weights>, &p);  // a thread is worth 64 KiB
}

static void multiply(const Product& p, const void* x, const void* norm, double eps) {
  switch (p.weight.dtype) {
    case INT8: return p.weight.groups > 1 || p.weight.zero ? multiply_with<InGroups<Int8>>(p, x, norm, eps) : multiply_with<Int8>(p, x, norm, eps);
    case FLOAT8: return p.weight.groups > 1 ? multiply_with<InGroups<Float8>>(p, x, norm, eps) : multiply_with<Float8>(p, x, norm, eps);
    case INT32: return multiply_with<Int4>(p, x, norm, eps);
    case UINT8: return multiply_with<FourBits<true>>(p, x, norm, eps);
    default: return multiply_with<Numbers>(p, x, norm, eps);
  }
}

// e to the power x, for x <= 0 (Cephes' expf; relative error < 2e-7).
static Vector exp(Vector x) {
  x = x < -87.f ? Vector{} - 87.f : x;  // NaN stays NaN
  Vector n = (x * 1.44269504f + 12582912.f) - 12582912.f, r = x - n * 0.693359375f + n * 2.12194440e-4f;
  Vector y = 1.9875691500e-4f * r + 1.3981999507e-3f;
  y = ((((y * r + 8.3334519073e-3f) * r + 4.1665795894e-2f) * r + 1.6666665459e-1f) * r + 5.0000001201e-1f) * r * r + r + 1.f;
  return y * (Vector)((__builtin_convertvector(n, Ints) + 127) << 23);
}

struct Rows {
  const Stored* x;
  const void* norm;
  Stored* y;
  int64_t k;  // of y
  double eps;
};

static void normalise_rows(int64_t begin, int64_t end, void* context) {
  const Rows& p = *(const Rows*)context;
  Buffer<float> row(p.k);
  for (int64_t at = begin; at < end; at++) {
    widen_row(p.x + at * p.k, p.k, row.data);
    normalise(row.data, p.norm, p.k, p.eps);
    round_row(row.data, p.k, p.y + at * p.k);
  }
}

static void swiglu_rows(int64_t begin, int64_t end, void* context) {
  const Rows& p = *(const Rows*)context;
  Buffer<float> row(2 * p.k);
  for (int64_t at = begin; at < end; at++) {
    float *gate = row.data, *up = gate + p.k;
    widen_row(p.x + at * 2 * p.k, 2 * p.k, gate);
    int64_t i = 0;
    for (; i + LANES <= p.k; i += LANES) {
      Vector x = load<Vector>(gate + i), power = exp(x < 0 ? x : -x);
      Vector y = x * (x < 0 ? power : Vector{} + 1.f) / (power + 1.f) * load<Vector>(up + i);
      memcpy(gate + i, &y, sizeof y);
    }
    for (; i < p.k; i++) gate[i] = gate[i] / (1 + expf(-gate[i])) * up[i];
    round_row(gate, p.k, p.y + at * p.k);
  }
}

constexpr int PART = 128;   // slots of a row that are attended to at a time; a page
constexpr int TOKENS = 32;  // queries at a time
constexpr int FEW = 16;     // queries that are computed as single ones are, so that drafts change no bit
constexpr float NONE = -INFINITY;

struct Heads {  // of the newest tokens, [B, T, heads, D]
  const char* data;
  int64_t row_bytes, token_bytes;
  const void* norm;  // [D], or null
  double eps;

  const Stored* of(int64_t b, int64_t t) const { return (const Stored*)(data + b * row_bytes + t * token_bytes); }
};

struct Attention {
  Heads newest_q, newest_k, newest_v;
  const float *cos, *sin;  // [B, T, D/2]
  const int64_t* at;       // [B, T], where in memory the newest keys and values go
  const int32_t* pages;    // [B, blocks], the page of each PART slots; null if a row's slots are contiguous
  int64_t pages_stride;
  void *k, *v, *y;
  const bool* visible;  // [B, 1 or H, T, slots]
  float* q;             // rotated; arranged [B, T, H, D] if there are few, else [B, K, T, H/K, D]
  float* parts;         // [B, T, H, parts, D + 2]: the sum of weighted values, the greatest score, the sum of weights
  int64_t tokens, heads, kv_heads, dim, visible_heads, slots, held_slots, count;
  float scale;

  bool few() const { return tokens <= FEW; }

  int64_t query(int64_t b, int64_t t, int64_t head) const {
    int64_t group = heads / kv_heads;
    if (few()) return (b * tokens + t) * heads + head;
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

// The end of what is seen of n slots, but for a part of a vector.
static int64_t end_of(const bool* seen, int64_t n) {
  if (!memchr(seen, 1, n)) return 0;
  while (n >= LANES && !memchr(seen + n - LANES, 1, LANES)) n -= LANES;
  return n;
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
static void attend_part(const Attention& p, int64_t b, int64_t t, int64_t head, int64_t part) {
  int64_t start = part * PART, given = p.slots - start < PART ? p.slots - start : PART, n = 0, d = p.dim;
  int64_t kv_head = head / (p.heads / p.kv_heads), held = p.place(b, kv_head, p.first_slot(b, part));
  const Stored *k = (const Stored*)p.k + held, *v = (const Stored*)p.v + held;
  const Stored* next = part + 1 < p.count ? (const Stored*)p.k + p.place(b, kv_head, p.first_slot(b, part + 1)) : k;
  const float* q = p.q + p.query(b, t, head) * d;
  float* out[M];
  alignas(64) float w[M][PART];
  for (int m = 0; m < M; m++) {
    out[m] = p.parts + (p.query(b, t, head + m) * p.count + part) * (d + 2);
    memset(out[m], 0, (d + 2) * sizeof(float));
    out[m][d] = NONE;
    int64_t end = end_of(p.seen(b, head + m, t) + start, given);
    n = end > n ? end : n;
  }
  if (!n) return;
  int64_t s = 0;
  for (; s + LANES <= n; s += LANES) {
    Vector scores[M][LANES / 4];
#pragma GCC unroll 4
    for (int four = 0; four < LANES / 4; four++) {
      Vector sums[4][M] = {};
      int64_t at = (s + 4 * four) * d;
      prefetch(v + at, 4 * d * sizeof *v);
      add_products<Numbers, 4, M>(k + at, q, d, sums);
#pragma GCC unroll 4
      for (int m = 0; m < M; m++) scores[m][four] = add_pairs(add_pairs(sums[0][m], sums[1][m]), add_pairs(sums[2][m], sums[3][m]));
    }
#pragma GCC unroll 4
    for (int m = 0; m < M; m++) {
      for (int count = LANES / 8; count; count /= 2)
        for (int i = 0; i < count; i++) scores[m][i] = add_pairs(scores[m][2 * i], scores[m][2 * i + 1]);
      memcpy(w[m] + s, scores[m], sizeof scores[m][0]);
    }
  }
  for (int64_t r = 0; r < s; r++)
    for (int64_t i = d / (2 * LANES) * (2 * LANES); i < d; i++)
      for (int m = 0; m < M; m++) w[m][r] += Numbers::widen_one(k[r * d + i]) * q[m * d + i];
  for (; s < n; s++) {
    float y[1][M];
    dot<Numbers, 1, M>(k + s * d, q, d, y);
    for (int m = 0; m < M; m++) w[m][s] = y[0][m];
  }
  for (int m = 0; m < M; m++) out[m][d] = weigh(w[m], p.seen(b, head + m, t) + start, n, p.scale, NONE, out[m][d + 1]);
  int64_t i = 0;
  for (; i + 2 * LANES <= d; i += 2 * LANES) {
    Vector low[M] = {}, high[M] = {};
    for (int64_t s = 0; s < n; s++) {
      Vector a, c;
      prefetch(next + s * d + i, 2 * LANES * sizeof *v);  // memory is to have no pause
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
    int64_t t = at % p.tokens, part = at / p.tokens % p.count, row = at / p.tokens / p.count;  // keys and values of a part stay near
    int64_t b = row / p.kv_heads, head = row % p.kv_heads * group, last = head + group;
    for (; head + 4 <= last; head += 4) attend_part<4>(p, b, t, head, part);
    if (head + 3 == last) attend_part<3>(p, b, t, head, part);
    if (head + 2 == last) attend_part<2>(p, b, t, head, part);
    if (head + 1 == last) attend_part<1>(p, b, t, head, part);
  }
}

// Rows of (row, token, head), whose parts are merged.
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
    int64_t row = at / p.heads;
    bool none = p.sees_nothing(row / p.tokens, at % p.heads, row % p.tokens, sum);
    for (int64_t i = 0; i < d; i++) y[i] = Numbers::round(none ? 0 : parts[i] / sum);
  }
}

// x [D], rotated by cos and sin [D/2], and normalised before if there is a norm.
static void rotate(const Stored* x, const Heads& heads, const float* cos, const float* sin, int64_t d, float* wide, Stored* y) {
  widen_row(x, d, wide);
  if (heads.norm) normalise(wide, heads.norm, d, heads.eps);
  for (int64_t i = 0; i < d / 2; i++) {
    float first = wide[i], second = wide[d / 2 + i];
    y[i] = Numbers::round(first * cos[i] - second * sin[i]);
    y[d / 2 + i] = Numbers::round(second * cos[i] + first * sin[i]);
  }
}

// Rows and tokens: rotate queries and keys, widen the queries, and store keys and values.
static void rotate_and_store(int64_t begin, int64_t end, void* context) {
  const Attention& p = *(const Attention*)context;
  int64_t d = p.dim;
  Buffer<float> wide(d);
  Buffer<Stored> rotated(d);
  for (int64_t at = begin; at < end; at++) {
    int64_t b = at / p.tokens, t = at % p.tokens;
    const float *cos = p.cos + at * (d / 2), *sin = p.sin + at * (d / 2);
    for (int64_t h = 0; h < p.kv_heads; h++) {
      int64_t place = p.place(b, h, p.at[at]);
      rotate(p.newest_k.of(b, t) + h * d, p.newest_k, cos, sin, d, wide.data, (Stored*)p.k + place);
      memcpy((Stored*)p.v + place, p.newest_v.of(b, t) + h * d, d * sizeof(Stored));
    }
    for (int64_t h = 0; h < p.heads; h++) {
      rotate(p.newest_q.of(b, t) + h * d, p.newest_q, cos, sin, d, wide.data, rotated.data);
      float* query = p.q + p.query(b, t, h) * d;
      widen_row(rotated.data, d, query);
      for (int64_t i = 0; p.few() && i + 2 * LANES <= d; i += 2 * LANES) Numbers::arrange(query + i);
    }
  }
}

constexpr int ROWS = 6, COLUMNS = LANES == 16 ? 4 : 2, WIDTH = COLUMNS * LANES;  // of a tile that fits in registers

// c = a b, or c += a b, for a [ROWS, k], whose rows are `a_row` apart, and b [k, columns], a multiple of WIDTH; rows of b
// and c are `row` apart.
static void multiply_tile(const float* a, int64_t a_row, int64_t k, const float* b, int64_t row, int64_t columns, float* c, bool add) {
  for (int64_t column = 0; column < columns; column += WIDTH) {
    Vector sums[ROWS][COLUMNS] = {};
    for (int64_t i = 0; i < k; i++) {
      Vector factors[COLUMNS];
      for (int j = 0; j < COLUMNS; j++) factors[j] = load<Vector>(b + i * row + column + j * LANES);
      for (int r = 0; r < ROWS; r++)
        for (int j = 0; j < COLUMNS; j++) sums[r][j] += a[r * a_row + i] * factors[j];
    }
    for (int r = 0; r < ROWS; r++)
      for (int j = 0; j < COLUMNS; j++) {
        float* to = c + r * row + column + j * LANES;
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
      int64_t begin = tile * ROWS, end = begin + ROWS < rows ? begin + ROWS : rows, seen_slots = 0;
      for (int64_t r = begin; r < end; r++) {
        int64_t seen = end_of(p.seen(b, kv_head * group + r % group, first + r / group) + start, n);
        seen_slots = seen > seen_slots ? seen : seen_slots;
      }
      if (!seen_slots) continue;
      multiply_tile(q + begin * d, d, d, k, PART, (seen_slots + WIDTH - 1) / WIDTH * WIDTH, weights, false);
      for (int64_t r = begin; r < end; r++) {
        float* x = w + r * PART;
        const bool* seen = p.seen(b, kv_head * group + r % group, first + r / group) + start;
        float before = greatest[r], now = weigh(x, seen, seen_slots, p.scale, before, sum[r]);
        greatest[r] = now;
        if (now == before) continue;
        float factor = before == NONE ? 0 : expf(before - now);
        for (int64_t i = 0; i < wide; i++) out[r * wide + i] *= factor;
      }
      multiply_tile(weights, PART, seen_slots, v, wide, wide, out + begin * wide, true);
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
  Buffer<float> q(queries * d), parts(p.few() ? queries * p.count * (d + 2) : 0);
  p.q = q.data;
  torch_parallel_for(0, rows * p.tokens, 1 + 65536 / (p.heads * d), rotate_and_store, &p);
  if (p.few()) {
    p.parts = parts.data;
    torch_parallel_for(0, rows * p.kv_heads * p.count * p.tokens, 1 + 32768 / (PART * d), attend_parts, &p);
    torch_parallel_for(0, queries, 1 + 65536 / (1 + p.count * d), merge_parts, &p);
  } else {
    torch_parallel_for(0, rows * p.kv_heads * ((p.tokens + TOKENS - 1) / TOKENS), 1, attend_blocks, &p);
  }
}

template <int N>
struct Arguments {  // the tensors that begin a stack
  Tensor tensors[N];
  void* data[N];

  explicit Arguments(uint64_t* stack) {
    for (int i = 0; i < N; i++) aoti_torch_get_data_ptr(tensors[i] = (Tensor)stack[i], &data[i]);
  }
  Arguments(const Arguments&) = delete;
  ~Arguments() {
    for (Tensor tensor : tensors) aoti_torch_delete_tensor_object(tensor);
  }

  int64_t size(int i, int64_t dimension) const {
    int64_t size = 0;
    aoti_torch_get_size(tensors[i], dimension, &size);
    return size;
  }
  int64_t columns(int i) const { return size(i, 1) * per_element(dtype(i)); }  // of a weight
  int64_t stride(int i, int64_t dimension) const {
    int64_t stride = 0;
    aoti_torch_get_stride(tensors[i], dimension, &stride);
    return stride;
  }
  bool is_missing(int i) const {
    int64_t numel;
    aoti_torch_get_numel(tensors[i], &numel);
    return !numel && dtype(i) == BOOL;
  }
  int32_t dtype(int i) const {
    int32_t dtype;
    aoti_torch_get_dtype(tensors[i], &dtype);
    return dtype;
  }

  // Whether a tensor has this dtype and these sizes, and is contiguous, in this memory.
  template <class... Sizes>
  bool fits(int i, int32_t expected, Sizes... sizes) const {
    int64_t each[] = {(int64_t)sizes...}, dimensions;
    int32_t device;
    bool contiguous;
    aoti_torch_get_dim(tensors[i], &dimensions);
    aoti_torch_get_device_type(tensors[i], &device);
    aoti_torch_is_contiguous(tensors[i], &contiguous);
    if (dimensions != sizeof...(sizes) || dtype(i) != expected || device || !contiguous) return false;
    for (int64_t j = 0; j < dimensions; j++)
      if (size(i, j) != each[j]) return false;
    return true;
  }
};

struct List {  // an argument that is a list
  ListHandle handle;

  explicit List(uint64_t on_stack) : handle((ListHandle)on_stack) {}
  List(const List&) = delete;
  ~List() { torch_delete_list(handle); }

  int64_t size() const {
    size_t size;
    torch_list_size(handle, &size);
    return size;
  }
  uint64_t operator[](int64_t i) const {
    uint64_t value;
    torch_list_get_item(handle, i, &value);
    return value;
  }
};

// A new contiguous tensor of up to 8 dimensions.
static Tensor make(int64_t dimensions, const int64_t* sizes, int32_t dtype, void** data) {
  int64_t strides[8], numel = 1;
  for (int64_t i = dimensions - 1; i >= 0; numel *= sizes[i--]) strides[i] = numel;
  Tensor tensor;
  aoti_torch_empty_strided(dimensions, sizes, strides, dtype, 0, 0, &tensor);
  aoti_torch_get_data_ptr(tensor, data);
  return tensor;
}

// attend_newest(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, Tensor slots, Tensor(a!) keys, Tensor(b!) values,
//   Tensor visible, Tensor page_table, bool paged) -> Tensor
// q [B, T, H, D], k and v [B, T, K, D], cos and sin [B, 1, T, D/2], slots [B, T], keys and values [B, K, S, D], visible
// [B, 1 or H, T, up to S], page_table [B, blocks] -> [B, T, H D]; contiguous, but for rows and tokens of q, k, v, and
// rows of page_table.
enum { COS, SIN, SLOTS, KEYS, VALUES, VISIBLE, PAGES };  // after q, k and v, or after what else a layer needs

template <int N>
static Attention attention_of(const Arguments<N>& given, int first, bool paged) {
  Attention p = {};
  p.tokens = given.size(first + SLOTS, 1);
  p.kv_heads = given.size(first + KEYS, 1), p.held_slots = given.size(first + KEYS, 2), p.dim = given.size(first + KEYS, 3);
  p.visible_heads = given.size(first + VISIBLE, 1), p.slots = given.size(first + VISIBLE, 3);
  p.count = (p.slots + PART - 1) / PART;
  p.scale = (float)(1 / sqrt((double)p.dim));
  p.cos = (const float*)given.data[first + COS], p.sin = (const float*)given.data[first + SIN];
  p.at = (const int64_t*)given.data[first + SLOTS];
  p.k = given.data[first + KEYS], p.v = given.data[first + VALUES], p.visible = (const bool*)given.data[first + VISIBLE];
  if (paged) p.pages = (const int32_t*)given.data[first + PAGES];
  p.pages_stride = given.stride(first + PAGES, 0);
  return p;
}

static void attend_newest(uint64_t* stack, uint64_t, uint64_t) {
  Arguments<10> given(stack);
  Attention p = attention_of(given, 3, stack[10]);
  Heads* newest[] = {&p.newest_q, &p.newest_k, &p.newest_v};
  for (int i = 0; i < 3; i++)
    *newest[i] = {(const char*)given.data[i], given.stride(i, 0) * (int64_t)sizeof(Stored), given.stride(i, 1) * (int64_t)sizeof(Stored)};
  p.heads = given.size(0, 2);
  int64_t rows = given.size(0, 0), sizes[] = {rows, p.tokens, p.heads * p.dim};
  stack[0] = (uint64_t)make(3, sizes, given.dtype(0), &p.y);
  attend(p, rows);
}

// A weight of k columns, without a scale, a zero point or inputs in 8 bits if that is argument 0.
template <int N>
static Matrix matrix_of(const Arguments<N>& given, int numbers, int scale, int zero, int inputs, int64_t k) {
  Matrix weight = {given.data[numbers], nullptr, nullptr, given.dtype(numbers), 1, 0, inputs > 0, nullptr};
  if (inputs && given.size(inputs, 1)) weight.input_scale = given.data[inputs];
  if (zero) weight.zero = given.data[zero];
  if (!scale) return weight;
  weight.scale = given.data[scale], weight.groups = given.size(scale, 1);
  while (weight.groups && weight.groups * Int4::RUN << weight.run_shift < k) weight.run_shift++;
  return weight;
}

// few_rows(Tensor x, Tensor weight, Tensor scale, Tensor zero, Tensor input_scale, Tensor bias, Tensor norm,
//   Tensor residual, float eps, int parts) -> Tensor
// x [..., K], of up to 8 dimensions, weight [N, K], or of 4 bits [N, K / 8] or [N, K / 2] -> [..., N]; all of them contiguous.
static void few_rows(uint64_t* stack, uint64_t, uint64_t) {
  Arguments<8> given(stack);
  void** data = given.data;
  double eps = load<double>(&stack[8]);
  int64_t parts = (int64_t)stack[9];
  bool gated = parts & 8;
  int64_t rows = 1, n = given.size(1, 0) / (1 + gated), k, dim, sizes[8];
  aoti_torch_get_dim(given.tensors[0], &dim);
  for (int64_t i = 0; i < dim - 1; i++) rows *= sizes[i] = given.size(0, i);
  k = given.size(0, dim - 1), sizes[dim - 1] = n;
  Matrix weight = matrix_of(given, 1, parts & 16 ? 2 : 0, parts & 32 ? 3 : 0, parts & 64 ? 4 : 0, k);
  const void *bias = parts & 1 ? data[5] : nullptr, *residual = parts & 4 ? data[7] : nullptr;
  Product p = {weight, bias, residual, nullptr, nullptr, nullptr, rows, n, k, 0, gated};
  stack[0] = (uint64_t)make(dim, sizes, given.dtype(0), &p.y);
  multiply(p, data[0], parts & 2 ? data[6] : nullptr, eps);
}

// normalise(Tensor x, Tensor norm, float eps) -> Tensor, swiglu(Tensor x, Tensor unused, float unused) -> Tensor
// x [..., K] or [..., 2 K], of up to 8 dimensions, norm [K] -> [..., K]; all of them contiguous.
template <void (*RUN)(int64_t, int64_t, void*), int HALVES>
static void each_row(uint64_t* stack, uint64_t, uint64_t) {
  Arguments<2> given(stack);
  int64_t dim, count = 1, sizes[8];
  aoti_torch_get_dim(given.tensors[0], &dim);
  for (int64_t i = 0; i < dim - 1; i++) count *= sizes[i] = given.size(0, i);
  int64_t k = sizes[dim - 1] = given.size(0, dim - 1) / HALVES;
  double eps = load<double>(&stack[2]);
  void* y;
  stack[0] = (uint64_t)make(dim, sizes, given.dtype(0), &y);
  Rows rows = {(const Stored*)given.data[0], given.data[1], (Stored*)y, k, eps};
  torch_parallel_for(0, k ? count : 0, 1 + 16384 / (k + 1), RUN, &rows);
}

// run_blocks(Tensor x, Tensor(a!)[] tensors, float[] eps, bool paged) -> Tensor
// x [B, T, E]. tensors, of each layer: the norms of attention, MLP, each query and key; qkv, o, gate_up and down; their
// scales; their zeros; their input_scales; their biases; and from cos on as attend_newest. A boolean one without elements stands for what is missing. eps: of each layer's norms.
// Returns an empty tensor, and does nothing, if there is no code for such tensors.
enum { NORMS, PRODUCTS = 4, SCALES = 8, ZEROS = 12, INPUTS = 16, BIASES = 20, NEWEST = 24, TENSORS = 31 };
enum { QKV, O, GATE_UP, DOWN };

struct Layer {
  Attention attention;
  const void *norms[4], *biases[4];
  Matrix weights[4];
  double eps[4];
  int64_t mlp;
};

// Read a product's weight `[rows, columns]`, and return whether there is code for it.
static bool read_weight(const Arguments<TENSORS>& of, int i, int64_t rows, int64_t columns, int32_t dtype, Matrix& weight) {
  int numbers = PRODUCTS + i, scale = SCALES + i, zero = ZEROS + i, inputs = INPUTS + i;
  bool has_scale = !of.is_missing(scale), has_zero = !of.is_missing(zero), has_inputs = !of.is_missing(inputs);
  weight = matrix_of(of, numbers, has_scale ? scale : 0, has_zero ? zero : 0, has_inputs ? inputs : 0, columns);
  int32_t kind = weight.dtype;
  bool per_row = (kind == INT8 || kind == FLOAT8) && weight.groups == 1 && !has_zero, in_groups = kind == FLOAT8 && weight.groups > 1;
  bool wide = kind == UINT8 || in_groups, takes_inputs = per_row || (in_groups && !weight.input_scale);
  if (has_inputs && !(has_scale && takes_inputs && of.fits(inputs, wide ? FLOAT32 : dtype, rows, weight.input_scale != nullptr))) return false;
  if (!has_scale) return !has_zero && of.fits(numbers, dtype, rows, columns);
  if (!of.fits(scale, wide ? FLOAT32 : dtype, rows, weight.groups) || (wide && has_zero)) return false;
  if (per_row) return of.fits(numbers, kind, rows, columns);
  if (kind != INT32 && kind != UINT8 && kind != INT8 && kind != FLOAT8) return false;
  if (weight.groups * Int4::RUN << weight.run_shift != columns || weight.run_shift > 2) return false;
  return of.fits(numbers, kind, rows, columns / per_element(kind)) && (!has_zero || of.fits(zero, UINT8, rows, weight.groups));
}

// Read a layer's tensors, and return whether there is code for them. x: [rows, tokens, size].
static bool read_layer(const Arguments<TENSORS>& of, int64_t rows, int64_t tokens, int64_t size, int32_t dtype, bool paged, Layer& layer) {
  Attention& p = layer.attention = attention_of(of, NEWEST, paged);
  int64_t d = p.dim, width = of.columns(PRODUCTS + O), mlp = layer.mlp = of.columns(PRODUCTS + DOWN);
  int64_t out[] = {width + 2 * p.kv_heads * d, size, 2 * mlp, size}, in[] = {size, width, size, mlp}, normed[] = {size, size, d, d};
  p.heads = width / d;
  bool fit = p.tokens == tokens && p.heads % p.kv_heads == 0 && width == p.heads * d;
  for (int i = 0; i < 4; i++) {
    bool has_norm = !of.is_missing(NORMS + i), has_bias = !of.is_missing(BIASES + i);
    fit = fit && (!has_norm || of.fits(NORMS + i, dtype, normed[i])) && (!has_bias || of.fits(BIASES + i, dtype, out[i]));
    fit = fit && read_weight(of, i, out[i], in[i], dtype, layer.weights[i]);
    layer.norms[i] = has_norm ? of.data[NORMS + i] : nullptr;
    layer.biases[i] = has_bias ? of.data[BIASES + i] : nullptr;
  }
  for (int i = COS; i <= SIN; i++) fit = fit && of.fits(NEWEST + i, FLOAT32, rows, 1, tokens, d / 2);
  for (int i = KEYS; i <= VALUES; i++) fit = fit && of.fits(NEWEST + i, dtype, paged ? 1 : rows, p.kv_heads, p.held_slots, d);
  fit = fit && of.fits(NEWEST + SLOTS, INT64, rows, tokens) && (p.visible_heads == 1 || p.visible_heads == p.heads);
  return fit && of.fits(NEWEST + VISIBLE, BOOL, rows, p.visible_heads, tokens, p.slots);
}

// y may be x.
static void run_layer(const Layer& layer, int64_t rows, int64_t size, const void* x, void* y) {
  Attention p = layer.attention;
  int64_t all = rows * p.tokens, width = p.heads * p.dim, kv_size = p.kv_heads * p.dim, wide = width + 2 * kv_size, mlp = layer.mlp;
  const void *const *norms = layer.norms, *const *biases = layer.biases;
  const Matrix* weights = layer.weights;
  Buffer<Stored> heads(all * wide), z(all * width), middle(all * size), hidden(all * mlp);
  multiply({weights[QKV], biases[QKV], nullptr, heads.data, nullptr, nullptr, all, wide, size, 0, false}, x, norms[0], layer.eps[0]);
  Heads* newest[] = {&p.newest_q, &p.newest_k, &p.newest_v};
  int64_t first[] = {0, width, width + kv_size}, bytes = wide * sizeof(Stored);
  for (int i = 0; i < 3; i++) *newest[i] = {(const char*)(heads.data + first[i]), p.tokens * bytes, bytes};
  for (int i = 0; i < 2; i++) newest[i]->norm = norms[2 + i], newest[i]->eps = layer.eps[2 + i];
  p.y = z.data;
  attend(p, rows);
  multiply({weights[O], biases[O], x, middle.data, nullptr, nullptr, all, size, width, 0, false}, z.data, nullptr, 0);
  multiply({weights[GATE_UP], biases[GATE_UP], nullptr, hidden.data, nullptr, nullptr, all, mlp, size, 0, true}, middle.data, norms[1], layer.eps[1]);
  multiply({weights[DOWN], biases[DOWN], middle.data, y, nullptr, nullptr, all, size, mlp, 0, false}, hidden.data, nullptr, 0);
}

static void run_blocks(uint64_t* stack, uint64_t, uint64_t) {
  Arguments<1> given(stack);
  List tensors(stack[1]), eps(stack[2]);
  int64_t rows = given.size(0, 0), tokens = given.size(0, 1), size = given.size(0, 2), count = tensors.size() / TENSORS;
  int32_t dtype = given.dtype(0);
  Buffer<Layer> layers(count);
  bool fit = given.fits(0, dtype, rows, tokens, size);
  for (int64_t n = 0; n < count; n++) {
    uint64_t of[TENSORS];
    for (int64_t i = 0; i < TENSORS; i++) of[i] = tensors[n * TENSORS + i];
    fit = read_layer(Arguments<TENSORS>(of), rows, tokens, size, dtype, stack[3], layers.data[n]) && fit;
    for (int64_t i = 0; i < 4; i++) {
      uint64_t value = eps[n * 4 + i];
      layers.data[n].eps[i] = load<double>(&value);
    }
  }
  int64_t sizes[] = {fit ? rows : 0, tokens, size};
  void* y;
  stack[0] = (uint64_t)make(3, sizes, dtype, &y);
  for (int64_t n = 0; fit && n < count; n++) run_layer(layers.data[n], rows, size, n ? y : given.data[0], y);
}

constexpr int64_t CHUNK = 4096;  // numbers of a row that are looked at together

struct Chunk {
  float greatest, sum;  // sum: of e to the power of x - greatest
  bool finite, nan;
};

struct Summary {
  const float* x;
  int64_t size, count;  // of a row: its numbers, its chunks
  Chunk* chunks;
};

static void summarise_chunks(int64_t begin, int64_t end, void* context) {
  const Summary& p = *(const Summary*)context;
  for (int64_t at = begin; at < end; at++) {
    int64_t start = at % p.count * CHUNK, n = p.size - start < CHUNK ? p.size - start : CHUNK, i = 0;
    const float* x = p.x + at / p.count * p.size + start;
    Vector most = Vector{} + NONE, sums = {};
    Ints infinite = {}, nan = {};
    for (; i + LANES <= n; i += LANES) {
      Vector v = load<Vector>(x + i);
      most = v > most ? v : most;
      infinite |= v - v != 0;  // or no number
      nan |= v != v;
    }
    float greatest = NONE, sum = 0;
    Chunk& chunk = p.chunks[at] = {NONE, 0, true, false};
    for (int lane = 0; lane < LANES; lane++) {
      greatest = most[lane] > greatest ? most[lane] : greatest;
      chunk.finite &= !infinite[lane];
      chunk.nan |= nan[lane] != 0;
    }
    for (int64_t j = i; j < n; j++) {
      greatest = x[j] > greatest ? x[j] : greatest;
      chunk.finite &= x[j] - x[j] == 0;
      chunk.nan |= x[j] != x[j];
    }
    if (greatest - greatest == 0) {
      for (i = 0; i + LANES <= n; i += LANES) {
        Vector v = load<Vector>(x + i);
        sums += v == NONE ? Vector{} : exp(v - greatest);
      }
      for (sum = total(sums); i < n; i++) sum += expf(x[i] - greatest);
    }
    chunk.greatest = greatest, chunk.sum = sum;
  }
}

// summarise(Tensor x) -> Tensor
// x [B, V], float32, contiguous -> float64 [B, 3]: the first index of the largest value, log(sum(exp(x))), all finite.
static void summarise(uint64_t* stack, uint64_t, uint64_t) {
  Arguments<1> given(stack);
  int64_t rows = given.size(0, 0), size = given.size(0, 1), count = (size + CHUNK - 1) / CHUNK, sizes[] = {rows, 3};
  Buffer<Chunk> chunks(rows * count);
  Summary p = {(const float*)given.data[0], size, count, chunks.data};
  torch_parallel_for(0, rows * count, 4, summarise_chunks, &p);
  void* result;
  stack[0] = (uint64_t)make(2, sizes, FLOAT64, &result);
  for (int64_t row = 0; row < rows; row++) {
    const Chunk* of = chunks.data + row * count;
    const float* x = p.x + row * size;
    int64_t best = 0, index = 0;
    bool finite = true, nan = false;
    for (int64_t n = 0; n < count; n++) {
      if (of[n].greatest > of[best].greatest) best = n;
      finite &= of[n].finite;
      nan |= of[n].nan;
    }
    float greatest = of[best].greatest;
    double sum = 0;
    for (int64_t n = 0; n < count; n++)
      if (of[n].greatest != NONE) sum += of[n].sum * ::exp((double)of[n].greatest - greatest);
    double total = greatest - greatest == 0 ? greatest + log(sum) : greatest;
    for (index = best * CHUNK; index < size - 1 && x[index] != greatest;) index++;
    double* y = (double*)result + 3 * row;
    y[0] = index, y[1] = nan ? NAN : total, y[2] = finite;
  }
}

// with_summarise: for one dtype's library only, since its operation is the same for all.
extern "C" int32_t register_kernels(bool with_summarise) {
  static Library library;
  int32_t error = aoti_torch_library_init_impl("llama_flex", "CPU", "cpu.cpp", 0, &library);
  if (!error && with_summarise) error = aoti_torch_library_impl(library, "summarise", summarise);
  if (!error) error = aoti_torch_library_impl(library, "few_rows_" NAME, few_rows);
  if (!error) error = aoti_torch_library_impl(library, "attend_newest_" NAME, attend_newest);
  if (!error) error = aoti_torch_library_impl(library, "normalise_" NAME, each_row<normalise_rows, 1>);
  if (!error) error = aoti_torch_library_impl(library, "swiglu_" NAME, each_row<swiglu_rows, 2>);
  return error ? error : aoti_torch_library_impl(library, "run_blocks_" NAME, run_blocks);
}

extern "C" int32_t lanes() { return LANES; }
