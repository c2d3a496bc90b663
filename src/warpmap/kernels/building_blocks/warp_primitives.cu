// What 32 lanes can do with each other's registers: the programs of
// warp_primitives.py, in CUDA C++.

#define FULL 0xffffffffu

// The sum of all lanes' x, on every lane: a butterfly.
__device__ float warp_sum(float x) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2)
        x += __shfl_xor_sync(FULL, x, step);
    return x;
}

// The sum of x over this lane and all below it.
__device__ float warp_scan(int lane, float x) {
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        // outside the branch: every lane that the mask names must come here
        float below = __shfl_up_sync(FULL, x, step);
        if (lane >= step) x += below;
    }
    return x;
}

// This lane's place among the lanes that keep; -1 if it does not.
__device__ int warp_pack(int lane, bool keep) {
    unsigned votes = __ballot_sync(FULL, keep);
    unsigned below = (1u << lane) - 1;
    return keep ? __popc(votes & below) : -1;
}

// How many lanes have this key, on the lowest of them; 0 on the others.
__device__ int warp_count(int lane, int key, unsigned mask) {
    unsigned same = __match_any_sync(mask, key);
    unsigned below = (1u << lane) - 1;
    return same & below ? 0 : __popc(same);
}

// A 32 x 32 matrix, of which each lane holds a row, becomes one of which it
// holds a column. All loops are unrolled: a register has no address, so its
// number must be known to the compiler.
__device__ void warp_transpose(int lane, float held[32]) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) {
        bool upper = lane & step;
#pragma unroll
        for (int low = 0; low < 32; low++) {
            if (low & step) continue;
            // the pair of lanes trades the two corners off the diagonal
            float give = upper ? held[low] : held[low + step];
            float got = __shfl_xor_sync(FULL, give, step);
            if (upper) held[low] = got;
            else held[low + step] = got;
        }
    }
}

// One thread for each element. In the last warp some have none: they stay,
// and bring a zero that changes nothing, so that the mask FULL is true.
#define EACH_LANE(NAME, TYPE, RESULT)                                        \
    extern "C" __global__ void NAME(const TYPE* x, TYPE* y, long long n) {   \
        long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;      \
        TYPE mine = i < n ? x[i] : 0;                                        \
        TYPE result = RESULT;                                                \
        if (i < n) y[i] = result;                                            \
    }
EACH_LANE(lane_sums, float, warp_sum(mine))
EACH_LANE(lane_scans, float, warp_scan(threadIdx.x % 32, mine))
EACH_LANE(lane_packs, int, warp_pack(threadIdx.x % 32, mine != 0))

// No key changes nothing, so here the mask names the lanes that have one.
extern "C" __global__ void lane_counts(const int* x, int* y, long long n) {
    long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    unsigned mask = __ballot_sync(FULL, i < n);
    if (i < n) y[i] = warp_count(threadIdx.x % 32, x[i], mask);
}

// The transpose of an M x N matrix; each warp turns one tile of 32 x 32.
extern "C" __global__ void transposes(const float* x, float* y, long long M,
                                      long long N) {
    int lane = threadIdx.x % 32;
    long long warp = blockIdx.x * (blockDim.x / 32LL) + threadIdx.x / 32;
    long long tiles = (N + 31) / 32;
    long long row = warp / tiles * 32, col = warp % tiles * 32;

    float held[32];
#pragma unroll
    for (int r = 0; r < 32; r++) {
        bool there = row + r < M && col + lane < N;
        held[r] = there ? x[(row + r) * N + col + lane] : 0;
    }
    warp_transpose(lane, held);
#pragma unroll
    for (int c = 0; c < 32; c++)
        if (col + c < N && row + lane < M)
            y[(col + c) * M + row + lane] = held[c];
}

// Every shuffle, to compare with the simulated warp lane by lane. Blocks count
// distances (x), logarithms of widths (y) and masks (z).
extern "C" __global__ void every_shuffle(const int* x, const unsigned* masks,
                                         int* y, long long kind) {
    int lane = threadIdx.x, where = blockIdx.x, width = 1 << blockIdx.y;
    unsigned mask = masks[blockIdx.z];
    if (!(mask >> lane & 1)) return;
    int got = kind == 0   ? __shfl_sync(mask, x[lane], where, width)
              : kind == 1 ? __shfl_up_sync(mask, x[lane], where, width)
              : kind == 2 ? __shfl_down_sync(mask, x[lane], where, width)
                          : __shfl_xor_sync(mask, x[lane], where, width);
    long long block = (blockIdx.z * 6 + blockIdx.y) * 32 + blockIdx.x;
    y[block * 32 + lane] = got;
}

// Every vote and match, for values (x) and masks of its own in each block.
extern "C" __global__ void every_vote(const int* x, const unsigned* masks,
                                      unsigned* y) {
    int lane = threadIdx.x, mine = x[blockIdx.x * 32 + lane], same;
    unsigned mask = masks[blockIdx.x];
    if (!(mask >> lane & 1)) return;
    y += blockIdx.x * 96 + lane;
    y[0] = __ballot_sync(mask, mine & 1);
    y[32] = __match_any_sync(mask, mine);
    y[64] = __match_all_sync(mask, mine, &same);
}

// Clocks of n steps, each of which waits for the one before it. One warp.
#define CLOCKS(NAME, STEP)                                                   \
    extern "C" __global__ void clocks_##NAME(unsigned* x, long long* clocks, \
                                             long long n) {                  \
        __shared__ volatile unsigned cells[32];                              \
        int lane = threadIdx.x, all;                                         \
        unsigned mine = x[lane];                                             \
        cells[lane] = all = 0;                                               \
        __syncwarp();                                                        \
        long long begin = clock64();                                         \
        _Pragma("unroll 8") for (long long i = 0; i < n; i++) { STEP; }      \
        clocks[lane] = clock64() - begin;                                    \
        x[lane] = mine;                                                      \
    }
#define BUTTERFLY(STEP)                                                      \
    _Pragma("unroll") for (int step = 16; step > 0; step /= 2) { STEP; }
CLOCKS(shfl, mine = __shfl_sync(FULL, mine, mine))
CLOCKS(shfl_xor, mine = __shfl_xor_sync(FULL, mine, 1))
CLOCKS(ballot, mine = __ballot_sync(FULL, mine))
CLOCKS(match_any, mine = __match_any_sync(FULL, mine))
CLOCKS(match_all, mine = __match_all_sync(FULL, mine, &all))
CLOCKS(shared, cells[lane] = mine; __syncwarp(); mine = cells[lane ^ 1];
       __syncwarp())
CLOCKS(sum_shuffles, BUTTERFLY(mine += __shfl_xor_sync(FULL, mine, step)))
CLOCKS(sum_shared, BUTTERFLY(cells[lane] = mine; __syncwarp();
                             mine += cells[lane ^ step]; __syncwarp()))
CLOCKS(sum_redux, mine = __reduce_add_sync(FULL, mine))
