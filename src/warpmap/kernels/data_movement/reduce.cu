// Eight ways to add up a vector of floats, from slow to fast. Each block
// writes one partial sum; the same kernel then adds up the partial sums.

constexpr int THREADS = 256;  // of a block
constexpr unsigned FULL = 0xffffffff;

// x[i], or nothing past the end.
__device__ float element(const float* x, long long i, long long n) {
    return i < n ? x[i] : 0;
}

// 1. A tree over neighbours. The threads at work are spread over all warps.
extern "C" __global__ void sum_interleaved(const float* x, float* sums,
                                           long long n) {
    __shared__ float cells[THREADS];
    int t = threadIdx.x;
    cells[t] = element(x, (long long)blockIdx.x * THREADS + t, n);
    for (int apart = 1; apart < THREADS; apart *= 2) {
        __syncthreads();
        if (t % (2 * apart) == 0) cells[t] += cells[t + apart];
    }
    if (t == 0) sums[blockIdx.x] = cells[0];
}

// 2. The same tree, but the first threads do it. Whole warps are idle.
extern "C" __global__ void sum_strided(const float* x, float* sums,
                                       long long n) {
    __shared__ float cells[THREADS];
    int t = threadIdx.x;
    cells[t] = element(x, (long long)blockIdx.x * THREADS + t, n);
    for (int apart = 1; apart < THREADS; apart *= 2) {
        __syncthreads();
        int to = 2 * apart * t;
        if (to < THREADS) cells[to] += cells[to + apart];
    }
    if (t == 0) sums[blockIdx.x] = cells[0];
}

// 3. A tree over halves: neighbours in a warp read neighbours in memory.
extern "C" __global__ void sum_sequential(const float* x, float* sums,
                                          long long n) {
    __shared__ float cells[THREADS];
    int t = threadIdx.x;
    cells[t] = element(x, (long long)blockIdx.x * THREADS + t, n);
    for (int apart = THREADS / 2; apart > 0; apart /= 2) {
        __syncthreads();
        if (t < apart) cells[t] += cells[t + apart];
    }
    if (t == 0) sums[blockIdx.x] = cells[0];
}

// 4. Two elements a thread, added as they come: half as many blocks.
extern "C" __global__ void sum_first_add(const float* x, float* sums,
                                         long long n) {
    __shared__ float cells[THREADS];
    int t = threadIdx.x;
    long long i = (long long)blockIdx.x * (2 * THREADS) + t;
    cells[t] = element(x, i, n) + element(x, i + THREADS, n);
    for (int apart = THREADS / 2; apart > 0; apart /= 2) {
        __syncthreads();
        if (t < apart) cells[t] += cells[t + apart];
    }
    if (t == 0) sums[blockIdx.x] = cells[0];
}

// 5. The last six steps are one warp's: it needs no barrier of the block.
extern "C" __global__ void sum_last_warp(const float* x, float* sums,
                                         long long n) {
    __shared__ float cells[THREADS];
    int t = threadIdx.x;
    long long i = (long long)blockIdx.x * (2 * THREADS) + t;
    cells[t] = element(x, i, n) + element(x, i + THREADS, n);
#pragma unroll
    for (int apart = THREADS / 2; apart > 32; apart /= 2) {
        __syncthreads();
        if (t < apart) cells[t] += cells[t + apart];
    }
    __syncthreads();
    if (t >= 32) return;
    float mine = cells[t] + cells[t + 32];
#pragma unroll
    for (int apart = 16; apart > 0; apart /= 2) {
        __syncwarp();  // all have read what is overwritten now
        cells[t] = mine;
        __syncwarp();
        mine += cells[t + apart];
    }
    if (t == 0) sums[blockIdx.x] = mine;
}

// The sum over a block, on its first warp: shuffles, and one trip for each
// warp through shared memory.
__device__ float block_sum(float mine) {
    __shared__ float warps[THREADS / 32];
    int t = threadIdx.x;
#pragma unroll
    for (int step = 16; step > 0; step /= 2)
        mine += __shfl_xor_sync(FULL, mine, step);
    if (t % 32 == 0) warps[t / 32] = mine;
    __syncthreads();
    if (t >= 32) return 0;
    mine = t < THREADS / 32 ? warps[t] : 0;
#pragma unroll
    for (int step = THREADS / 64; step > 0; step /= 2)
        mine += __shfl_xor_sync(FULL, mine, step);
    return mine;
}

// 6. Shuffles instead of shared memory: one barrier in all.
extern "C" __global__ void sum_shuffle(const float* x, float* sums,
                                       long long n) {
    long long i = (long long)blockIdx.x * (2 * THREADS) + threadIdx.x;
    float sum = block_sum(element(x, i, n) + element(x, i + THREADS, n));
    if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

// Four neighbours, in one load of 16 bytes.
__device__ float pack(const float* x, long long i) {
    float4 v = *(const float4*)(x + i);
    return (v.x + v.y) + (v.z + v.w);
}

// The same, one by one where the vector ends.
__device__ float pack_or_less(const float* x, long long i, long long n) {
    if (i + 4 <= n) return pack(x, i);
    float sum = 0;
#pragma unroll 1
    for (; i < n; i++) sum += x[i];
    return sum;
}

// 7. Loads of 16 bytes: a quarter as many instructions for the same bytes.
extern "C" __global__ void sum_packed(const float* x, float* sums,
                                      long long n) {
    long long i = (long long)blockIdx.x * (8 * THREADS) + 4 * threadIdx.x;
    float mine = pack_or_less(x, i, n);
    mine += pack_or_less(x, i + 4 * THREADS, n);
    float sum = block_sum(mine);
    if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

// 8. A fixed number of blocks, and each walks through the vector. Its
// threads keep four loads under way, and meet once, at the end.
extern "C" __global__ void sum_grid(const float* x, float* sums, long long n) {
    long long step = 4LL * THREADS * gridDim.x;
    long long i = 4LL * (THREADS * blockIdx.x + threadIdx.x);
    float mine[4] = {};
    for (; i + 3 * step + 4 <= n; i += 4 * step) {
#pragma unroll
        for (int k = 0; k < 4; k++) mine[k] += pack(x, i + k * step);
    }
#pragma unroll 1
    for (; i < n; i += step) mine[0] += pack_or_less(x, i, n);
    float sum = block_sum((mine[0] + mine[1]) + (mine[2] + mine[3]));
    if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}
