// Some rows times a weight of 4 bits, with SwiGLU and residual, on the tensor cores of Hopper.
//
// Tensor cores take one factor from registers, where four bits become floats while those before are multiplied, and the
// other, x, from shared memory. A block computes ROWS rows of the weight for TOKENS rows of x, with SwiGLU half as many of
// each half; SPLIT blocks share the columns, and add up what they have through each other's shared memory.
//
// Letters: N results, half of the weight's rows with SwiGLU; K columns; M rows of x. A "chunk" is 128 columns, 64 bytes
// of a row; see weight.py for the order of the numbers. Each of eight warps takes 16 rows of each tile of 128. In terms
// of wgmma.m64nTOKENSk16, lane 4 g + t holds columns of the rows g and g + 8, and takes them from bytes 16 t to 16 t + 15
// of a chunk; x is laid out as it goes to shared memory, with its columns in the order that fits (`weight.in_chunks`).
//
// Defined: TOKENS; TILES of 128 rows; SPLIT; STAGES, the chunks under way; GROUP, the columns that share a scale; HALF:
// whether x is float16, else bfloat16; GATED: whether SwiGLU follows; and `multiply`, which adds a product of 16 columns.

#include "int4.cuh"

constexpr int THREADS = 256, ROWS = TILES * 128, OUTPUTS = GATED ? ROWS / 2 : ROWS;
constexpr int CHUNK = 128, BYTES = CHUNK / 2;          // columns, and bytes of a row of the weight
constexpr int WEIGHT = ROWS * BYTES, X = TOKENS * CHUNK * 2, STAGE = WEIGHT + X;  // bytes in shared memory
constexpr int PIECES = TILES * TOKENS / 8;             // of the result, of which each thread has four sums

static __device__ u32 twice(u16 x) { return x | u32(x) << 16; }

static __device__ u32 floats(u32 w, u32 zero, u32 scale) {  // (number - zero) * scale, of bits 0 to 3 and 16 to 19
    u32 y = floats(w);
#if HALF
    asm("sub.f16x2 %0, %0, %1; mul.f16x2 %0, %0, %2;" : "+r"(y) : "r"(zero), "r"(scale));
#else
    asm("sub.bf16x2 %0, %0, %1; mul.bf16x2 %0, %0, %2;" : "+r"(y) : "r"(zero), "r"(scale));
#endif
    return y;
}

extern "C" __global__ void __launch_bounds__(THREADS, TOKENS * TILES > 32 ? 1 : 2) int4_matmul(
    const u8 *x, const u8 *numbers, const u16 *scale, const u8 *zero, const u16 *bias,
    const u16 *__restrict__ residual, u16 *__restrict__ out, int m, int n, int k)
{
    extern __shared__ __align__(128) u8 memory[];
    asm volatile("griddepcontrol.launch_dependents;");  // the next kernel may start while the last blocks of this run
    const int thread = threadIdx.x, warp = thread >> 5, lane = thread & 31, g = lane >> 2, t = lane & 3;
    const int rank = blockIdx.x % SPLIT, parts = (m + TOKENS - 1) / TOKENS;  // consecutive blocks share weights
    const int part = blockIdx.x / SPLIT % parts, first = blockIdx.x / SPLIT / parts * OUTPUTS;
    const int chunks = (k + CHUNK - 1) / CHUNK, groups = k / GROUP, row_bytes = k / 2;
    const int begin = chunks * rank / SPLIT, end = chunks * (rank + 1) / SPLIT;
    // Row i of a block is a result's, or with SwiGLU of each 16 the first eight are of one half, the others of the other.
    auto result = [&](int i) { return first + (GATED ? i / 16 * 8 + i % 8 : i); };
    auto row_of = [&](int i) { return result(i) + (GATED && i & 8 ? n : 0); };

    // A thread fetches 16 bytes of each 64th row.
    constexpr int FETCHED = ROWS / 64, FURTHER = GATED ? 32 : 64;
    const size_t further = size_t(row_bytes) * FURTHER;
    const u8 *weight_ahead = numbers + size_t(row_of(thread / 4)) * row_bytes + begin * BYTES + thread % 4 * 16;
    const u8 *x_ahead = x + (size_t(part) * chunks + begin) * X + thread * 16;
    int weight_chunk = begin, weight_slot = 0, x_chunk = begin, x_slot = 0;
    auto fetch_weight = [&]() {
        if (weight_chunk < end) {
            u8 *to = memory + weight_slot * STAGE + thread * 16;
            const bool inside = weight_chunk * BYTES + thread % 4 * 16 < row_bytes;
#pragma unroll
            for (int i = 0; i < FETCHED; i++) {
                const bool there = inside && result(thread / 4) + i * FURTHER < n;
                fetch(to + i * 4096, there ? weight_ahead + i * further : numbers, there);
            }
        }
        weight_chunk++, weight_ahead += BYTES, weight_slot = weight_slot + 1 == STAGES ? 0 : weight_slot + 1;
    };
    auto fetch_x = [&]() {
        if (x_chunk < end) {
            u8 *to = memory + x_slot * STAGE + WEIGHT + thread * 16;
#pragma unroll
            for (int i = 0; i < X; i += 16 * THREADS)
                if (X % (16 * THREADS) == 0 || thread * 16 < X) fetch(to + i, x_ahead + i, true);
        }
        x_chunk++, x_ahead += X, x_slot = x_slot + 1 == STAGES ? 0 : x_slot + 1;
        asm volatile("cp.async.commit_group;");
    };
    const int own = warp * 16 + g;
    u16 scales[2][2];  // of two units, of the rows g and g + 8
    u8 zeros[2][2];
    int at[TILES][2];
#pragma unroll
    for (int i = 0; i < 2 * TILES; i++) {
        const int row = i / 2 * 128 + own + i % 2 * 8;
        at[i / 2][i % 2] = result(row) < n ? row_of(row) : 0;
    }
    auto load_scales = [&](int unit, u16 (&s)[2], u8 (&z)[2]) {
        const int chunk = begin + unit / TILES, group = min(chunk * (CHUNK / GROUP) + 32 * t / GROUP, groups - 1);
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const size_t place = size_t(at[unit % TILES][i]) * groups + group;
            s[i] = scale[place];
            z[i] = zero ? zero[place] : 8;
        }
    };
    // Weights do not depend on the kernel before; all else does.
    for (int i = 0; i < STAGES - 2; i++) fetch_weight();
    load_scales(0, scales[0], zeros[0]);
    load_scales(1, scales[1], zeros[1]);
    asm volatile("griddepcontrol.wait;" ::: "memory");
    for (int i = 0; i < STAGES - 2; i++) fetch_x();

    // A unit is a tile's part of a chunk.
    float sums[TILES][TOKENS / 2] = {};
    u32 a[2][CHUNK / 16][4];
    int slot = 0;
    auto widen = [&](int unit, int tile, u32 (&a)[CHUNK / 16][4], u16 (&s)[2], u8 (&z)[2]) {
        if (tile == 0) {
            asm volatile("cp.async.wait_group %0; fence.proxy.async;" :: "n"(STAGES - 3) : "memory");
            __syncthreads();
            fetch_weight();  // where nobody reads any more: the products with that chunk were waited for
            fetch_x();
        }
        const u8 *weight = memory + slot * STAGE + (tile * 128 + own) * BYTES + 16 * t;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const uint4 v = *(const uint4 *)(weight + 8 * half * BYTES);
            const u32 words[] = {v.x, v.y, v.z, v.w};
            const u32 by = twice(s[half]), less = twice(rounded(BIAS + z[half]));
#pragma unroll
            for (int i = 0; i < 16; i++) a[i / 2][half + i % 2 * 2] = floats(words[i / 4] >> i % 4 * 4, less, by);
        }
        load_scales(unit + 2, s, z);
    };
    auto multiply_unit = [&](int tile, u32 (&a)[CHUNK / 16][4]) {
#pragma unroll
        for (int i = 0; i < CHUNK / 4; i++) asm volatile("" : "+r"(a[i / 4][i % 4]) :: "memory");  // made before the fence
        asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
        // A descriptor: the address, without the block's number among those that share memory, and the distances to the
        // next eight columns and to the next eight rows, in 16 bytes.
        const u64 from = address(memory + slot * STAGE + WEIGHT) >> 4 & 0x3fff | u64(TOKENS) << 16 | 8ull << 32;
#pragma unroll
        for (int i = 0; i < CHUNK / 16; i++) multiply(sums[tile], a[i], from + i * 2 * TOKENS);
        asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
        if (tile == TILES - 1) slot = slot + 1 == STAGES ? 0 : slot + 1;
    };
    auto wait = [] { asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory"); };
    // The next unit becomes floats while tensor cores are busy. The compiler wants no products under way when others of
    // newer registers begin.
    const int units = (end - begin) * TILES;
    if (units) widen(0, 0, a[0], scales[0], zeros[0]);
    for (int unit = 0; unit < units; unit += 2) {
        multiply_unit(0, a[0]);
        if (unit + 1 < units) widen(unit + 1, 1 % TILES, a[1], scales[1], zeros[1]);
        wait();
        if (unit + 1 == units) break;
        multiply_unit(1 % TILES, a[1]);
        if (unit + 2 < units) widen(unit + 2, 0, a[0], scales[0], zeros[0]);
        wait();
    }
    asm volatile("cp.async.wait_group 0;" ::: "memory");

    auto piece = [&](int i) { return &sums[i / (TOKENS / 8)][i % (TOKENS / 8) * 4]; };
    if (SPLIT > 1) {  // each block adds up every SPLIT-th piece, always in the same order
        constexpr int EACH = (PIECES + SPLIT - 1) / SPLIT;
        asm volatile("barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;" ::: "memory");
#pragma unroll
        for (int i = 0; i < PIECES; i++) {
            const int owner = i % SPLIT;
            if (owner == rank) continue;
            const float *d = piece(i);
            const u32 to = address(memory + (((rank - (rank > owner)) * EACH + i / SPLIT) * THREADS + thread) * 16);
            asm volatile("{ .reg .b32 a; mapa.shared::cluster.u32 a, %0, %1; st.shared::cluster.v4.f32 [a], {%2, %3, %4, %5}; }"
                         :: "r"(to), "r"(owner), "f"(d[0]), "f"(d[1]), "f"(d[2]), "f"(d[3]) : "memory");
        }
        asm volatile("barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;" ::: "memory");
#pragma unroll
        for (int i = 0; i < PIECES; i++) {
            if (i % SPLIT != rank) continue;
            float *d = piece(i), total[4] = {};
#pragma unroll
            for (int r = 0; r < SPLIT; r++) {
                const float4 other = r == rank ? float4{d[0], d[1], d[2], d[3]}
                    : *(const float4 *)(memory + (((r - (r > rank)) * EACH + i / SPLIT) * THREADS + thread) * 16);
                total[0] += other.x, total[1] += other.y, total[2] += other.z, total[3] += other.w;
            }
            for (int j = 0; j < 4; j++) d[j] = total[j];
        }
    }
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
        const int row = tile * 128 + own;
        const bool there[] = {result(row) < n, result(row + 8) < n};
        float added[2];
        for (int half = 0; half < 2; half++) added[half] = bias && there[half] ? widened(bias[row_of(row + 8 * half)]) : 0;
#pragma unroll
        for (int i = 0; i < TOKENS / 8; i++) {
            if ((tile * (TOKENS / 8) + i) % SPLIT != rank) continue;
            const int token = part * TOKENS + 8 * i + 2 * t;
            u16 before[4];  // of two tokens and two rows; loaded before anything is stored
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const bool inside = residual && token + j / 2 < m && there[j % 2];
                before[j] = inside ? residual[size_t(token + j / 2) * n + result(row + j % 2 * 8)] : 0;
            }
#pragma unroll
            for (int j = 0; j < 2; j++) {
                float y[2];
                for (int half = 0; half < 2; half++)
                    y[half] = widened(rounded(sums[tile][4 * i + 2 * half + j] + added[half]));
                if (GATED) y[0] = widened(rounded(__fdividef(y[0], 1 + __expf(-y[0])))) * y[1];
#pragma unroll
                for (int half = 0; half < (GATED ? 1 : 2); half++)
                    if (token + j < m && there[half])
                        out[size_t(token + j) * n + result(row + 8 * half)] = rounded(y[half] + widened(before[2 * j + half]));
            }
        }
    }
}
