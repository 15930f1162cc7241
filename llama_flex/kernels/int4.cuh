// Numbers of 4 bits and floats of 16, for the kernels in CUDA C++. Defined: HALF: whether floats are float16, else bfloat16.

typedef unsigned long long u64;
typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned char u8;

constexpr u32 MAGIC = HALF ? 0x64006400 : 0x43004300;  // two floats whose last bits are those of a small number added
constexpr float BIAS = HALF ? 1024 : 128;

static __device__ float widened(u16 x) {
    float y;
    if (HALF) asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
    else y = __uint_as_float(u32(x) << 16);
    return y;
}

static __device__ u16 rounded(float x) {
    u16 y;
    if (HALF) asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x));
    else {
        u32 pair;
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(0.f), "f"(x));
        y = u16(pair);
    }
    return y;
}

static __device__ u32 address(const void *p) { return u32(__cvta_generic_to_shared(p)); }

static __device__ void fetch(void *to, const void *from, bool there) {  // 16 bytes, of zeros if they are not there
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" :: "r"(address(to)), "l"(from), "r"(there ? 16 : 0));
}

static __device__ u32 floats(u32 w) {  // of bits 0 to 3 and 16 to 19, each added to BIAS
    u32 y;
    asm("lop3.b32 %0, %1, 0x000f000f, %2, 0xea;" : "=r"(y) : "r"(w), "r"(MAGIC));  // (w & 0x000f000f) | MAGIC
    return y;
}
