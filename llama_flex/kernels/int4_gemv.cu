// One row times a weight of 4 bits, with norm, SwiGLU and residual, on tensor cores.
//
// One row is bound by memory only if numbers become floats in less than two instructions each: two numbers of a word
// are shifted, and put into the last bits of two floats, at once; tensor cores do the rest.
//
// Letters: N rows and K columns of the weight. A "chunk" is 16 bytes of a row, 32 columns; see weight.py for the order
// of the numbers. A block computes 16 rows of the weight at a time, with SwiGLU eight of each half. Each of its warps
// goes through its own part of the columns, and has up to STAGES pieces of BYTES bytes of each row in flight, also of
// the next rows. In terms of mma.m16n8k16: lane 4 g + t holds 4 columns of the rows g and g + 8. x of four chunks is in
// the columns 0, 2, 4, 6 of the other matrix, so that each lane gets the sum of a chunk of its own, with its own scale.
//
// Defined: N, of the result, half of the weight's with SwiGLU; K; GROUP, the columns that share a scale; HALF: whether x
// is float16, else bfloat16; GATED: whether SwiGLU follows; WARPS, STAGES.

#include "int4.cuh"

constexpr int BYTES = 128, CHUNKS = BYTES / 16, FOURS = CHUNKS / 4;      // of a row, in a piece
constexpr int ROW = K / 2, PIECES = (ROW + BYTES - 1) / BYTES, GROUPS = K / GROUP;
constexpr int ROWS = 16, OUTPUTS = GATED ? 8 : 16;  // of the weight and of the result, that a block computes at a time
constexpr bool WHOLE = ROW % BYTES == 0, EVEN = N % OUTPUTS == 0;  // whether a row is whole pieces, and the rows whole blocks
constexpr size_t UPPER = GATED ? N : 8;  // rows from one that a block computes to the one eight further

struct Four { float x[4]; };

static __device__ Four four(const u16 *x) {  // from an address that is a multiple of 8
    const uint2 v = *(const uint2 *)x;
    return {{widened(u16(v.x)), widened(u16(v.x >> 16)), widened(u16(v.y)), widened(u16(v.y >> 16))}};
}

static __device__ void load_matrices(u32 (&to)[4], const void *from) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(address(from)));
}

static __device__ void multiply(Four &d, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
#if HALF
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
#else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
#endif
        : "+f"(d.x[0]), "+f"(d.x[1]), "+f"(d.x[2]), "+f"(d.x[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

extern "C" __global__ void __launch_bounds__(32 * WARPS) int4_gemv(
    const u16 *x, const u8 *numbers, const u16 *scale, const u8 *zero, const u16 *bias, const u16 *norm,
    const u16 *residual, u16 *out, float eps)
{
    extern __shared__ __align__(128) u8 memory[];
    __shared__ float shared_sums[2][WARPS][ROWS];
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");  // the next kernel may start while the last blocks of this run
#endif
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
    u8 *ring = memory + warp * STAGES * ROWS * BYTES;
    u32 *pairs = (u32 *)(memory + WARPS * STAGES * ROWS * BYTES);  // x, as words of two numbers
    float *sums = (float *)(pairs + PIECES * CHUNKS * 16);         // of x, over each chunk
    const int step = gridDim.x * OUTPUTS;

    int ahead_first = blockIdx.x * OUTPUTS, ahead_piece = warp, ahead_stage = 0;
    const int fetched_row = lane >> 3, fetched_chunk = lane & 7;  // and the rows 4, 8 and 12 further
    const u8 *ahead = numbers + size_t(ahead_first + fetched_row) * ROW + warp * BYTES + 16 * fetched_chunk;
    auto fetch_next = [&]() {
        if (ahead_piece >= PIECES) {
            ahead += size_t(step) * ROW - (ahead_piece - warp) * BYTES;
            ahead_piece = warp, ahead_first += step;
        }
        if (ahead_first < N && warp < PIECES) {
            const bool there = WHOLE || ahead_piece * BYTES + 16 * fetched_chunk < ROW;
            u8 *to = ring + (ahead_stage * ROWS + fetched_row) * BYTES;
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const bool is_row = EVEN || ahead_first + (fetched_row + 4 * i) % OUTPUTS < N;
                const u8 *from = ahead + (i % 2 * 4 + i / 2 * UPPER) * ROW;
                fetch(to + 4 * i * BYTES + 16 * (fetched_chunk ^ (fetched_row + i % 2 * 4)), there && is_row ? from : numbers, there && is_row);
            }
        }
        asm volatile("cp.async.commit_group;");
        ahead += WARPS * BYTES;
        ahead_piece += WARPS;
        ahead_stage = ahead_stage + 1 == STAGES ? 0 : ahead_stage + 1;
    };
    // the scales and zero points of the next piece, for the rows g and g + 8
    u16 scales[FOURS][2] = {};
    u8 zeros[FOURS][2] = {};
    int scale_first = blockIdx.x * OUTPUTS, scale_piece = warp;
    auto load_scales = [&]() {
        if (scale_piece >= PIECES) scale_piece = warp, scale_first += step;
        if (scale_first >= N || warp >= PIECES) return;
#pragma unroll
        for (int f = 0; f < FOURS; f++) {
            const int chunk = scale_piece * CHUNKS + 4 * f + t, group = (WHOLE ? chunk : min(chunk, K / 32 - 1)) / (GROUP / 32);
            const size_t at = size_t(scale_first + g) * GROUPS + group;
#pragma unroll
            for (int half = 0; half < 2; half++) {
                if (!EVEN && scale_first + (g + 8 * half) % OUTPUTS >= N) continue;
                scales[f][half] = scale[at + half * UPPER * GROUPS];
                if (zero) zeros[f][half] = zero[at + half * UPPER * GROUPS];
            }
        }
        scale_piece += WARPS;
    };
#pragma unroll
    for (int i = 0; i < STAGES - 1; i++) fetch_next();
    load_scales();
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");  // weights do not depend on the previous kernel; all else does
#endif

    float rms = 1;
    if (norm) {
        float squares = 0;
#pragma unroll
        for (int i = 4 * threadIdx.x; i < K; i += 128 * WARPS) {
            const Four v = four(x + i);
            for (int j = 0; j < 4; j++) squares += v.x[j] * v.x[j];
        }
        for (int i = 16; i; i >>= 1) squares += __shfl_xor_sync(~0u, squares, i);
        if (lane == 0) shared_sums[0][warp][0] = squares;
        __syncthreads();
        squares = 0;
        for (int i = 0; i < WARPS; i++) squares += shared_sums[0][i][0];
        rms = rsqrtf(squares / K + eps);
    }
    auto four_at = [&](int i) {
        Four v = {};
        if (i >= K) return v;
        v = four(x + i);
        if (norm) {
            const Four w = four(norm + i);
            for (int j = 0; j < 4; j++) v.x[j] = widened(rounded(v.x[j] * rms * w.x[j]));
        }
        return v;
    };
    constexpr int PARTS = PIECES * CHUNKS * 4, BATCH = 4;  // the lanes' parts of chunks, and loads under way at a time
    for (int begin = threadIdx.x; begin < PARTS + lane; begin += BATCH * 32 * WARPS) {
        Four low[BATCH], up[BATCH];
#pragma unroll
        for (int j = 0; j < BATCH; j++) {
            const int i = begin + j * 32 * WARPS, column = i / 4 * 32 + 4 * (i % 4);
            low[j] = four_at(column);
            up[j] = four_at(column + 16);
        }
#pragma unroll
        for (int j = 0; j < BATCH; j++) {
            const int i = begin + j * 32 * WARPS;
            float sum = 0;
#pragma unroll
            for (int c = 0; c < 4; c++) {
                const float a = low[j].x[c], b = up[j].x[c];
                sum += a + b;
                if (i < PARTS) pairs[(i / 4 * 4 + c) * 4 + i % 4] = rounded(a) | u32(rounded(b)) << 16;
            }
            sum += __shfl_xor_sync(~0u, sum, 1);
            sum += __shfl_xor_sync(~0u, sum, 2);
            if (i < PARTS && i % 4 == 0) sums[i / 4] = sum;
        }
    }
    __syncthreads();

    const int row = lane & 15;
    int stage = 0, turn = 0;
    for (int first = blockIdx.x * OUTPUTS; first < N; first += step, turn++) {
        float total[2] = {};
        for (int piece = warp; piece < PIECES; piece += WARPS) {
            float s[FOURS][2], z[FOURS][2];
#pragma unroll
            for (int i = 0; i < 2 * FOURS; i++) {
                s[i / 2][i % 2] = widened(scales[i / 2][i % 2]);
                z[i / 2][i % 2] = BIAS + (zero ? zeros[i / 2][i % 2] : 8);
            }
            load_scales();
            asm volatile("cp.async.wait_group %0;" :: "n"(STAGES - 2) : "memory");
            __syncwarp();
            fetch_next();
#pragma unroll
            for (int f = 0; f < FOURS; f++) {
                const int chunk = piece * CHUNKS + 4 * f;
                const uint4 b = *(const uint4 *)(pairs + ((chunk + (g >> 1)) * 4 + t) * 4);
                Four c[4] = {};
#pragma unroll
                for (int i = 0; i < 4; i += 2) {
                    u32 w[4];  // two chunks of the rows g and g + 8
                    load_matrices(w, ring + (stage * ROWS + row) * BYTES + 16 * ((4 * f + i + (lane >> 4)) ^ (row & 7)));
#pragma unroll
                    for (int j = 0; j < 2; j++) {
                        const u32 v = w[2 * j], u = w[2 * j + 1];
                        multiply(c[i + j], floats(v), floats(u), floats(v >> 4), floats(u >> 4), b.x, b.y);
                        multiply(c[i + j], floats(v >> 8), floats(u >> 8), floats(v >> 12), floats(u >> 12), b.z, b.w);
                    }
                }
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    const float low = t & 1 ? c[1].x[2 * half] : c[0].x[2 * half];
                    const float up = t & 1 ? c[3].x[2 * half] : c[2].x[2 * half];
                    total[half] += ((t & 2 ? up : low) - z[f][half] * sums[chunk + t]) * s[f][half];
                }
            }
            stage = stage + 1 == STAGES ? 0 : stage + 1;
        }
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float y = total[half];
            y += __shfl_xor_sync(~0u, y, 1);
            y += __shfl_xor_sync(~0u, y, 2);
            if (t == 0) shared_sums[turn & 1][warp][g + 8 * half] = y;
        }
        const int r = min(first + row % OUTPUTS, N - 1) + (row < OUTPUTS ? 0 : N);
        const bool finishes = warp == turn % WARPS;
        const float added = finishes && bias ? widened(bias[r]) : 0;
        const float before = finishes && residual && row < OUTPUTS ? widened(residual[r]) : 0;
        __syncthreads();
        if (!finishes) continue;
        float y = added;
#pragma unroll
        for (int i = 0; i < WARPS; i++) y += shared_sums[turn & 1][i][row];
        y = widened(rounded(y));
        if (GATED) y = widened(rounded(y / (1 + __expf(-y)))) * __shfl_down_sync(~0u, y, 8);
        if (lane < OUTPUTS && first + lane < N) out[r] = rounded(y + before);
    }
    asm volatile("cp.async.wait_group 0;" ::: "memory");
}
