// Latency and bandwidth of each level of memory, measured from inside.

// Which way a load takes: through all caches, past L1, to the block's own
// shared memory, or to that of another block of its cluster.
enum Path { THROUGH_L1, PAST_L1, SHARED, CLUSTER };

// Loads the word at an address. The word is the next address: no load can
// start before the one before it has come back.
template <Path path>
__device__ __forceinline__ unsigned long long follow(unsigned long long at) {
    unsigned long long next;
    if (path == THROUGH_L1) {
        asm volatile("ld.global.ca.u64 %0, [%1];" : "=l"(next) : "l"(at));
    } else if (path == PAST_L1) {
        asm volatile("ld.global.cg.u64 %0, [%1];" : "=l"(next) : "l"(at));
    } else if (path == SHARED) {
        asm volatile("ld.shared.u64 %0, [%1];"
                     : "=l"(next) : "r"(static_cast<unsigned>(at)));
    } else {
        asm volatile("ld.u64 %0, [%1];" : "=l"(next) : "l"(at));
    }
    return next;
}

// The GPU's clock in ns; it ticks coarsely.
__device__ __forceinline__ long long nanoseconds() {
    long long now;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
    return now;
}

// One thread follows a ring of pointers: `warm` steps to fill the caches, then
// `steps` with the clock running. Writes cycles, ns and where it came to.
template <Path path>
__device__ void chase(
    unsigned long long at, long long warm, long long steps, long long *out
) {
#pragma unroll 1
    for (long long i = 0; i < warm; ++i) at = follow<path>(at);

    long long begin_ns = nanoseconds(), begin = clock64();
#pragma unroll 8
    for (long long i = 0; i < steps; ++i) at = follow<path>(at);
    // the clock may not be read before the last load is back
    if (at == 1) return;
    long long end = clock64(), end_ns = nanoseconds();

    out[0] = end - begin;
    out[1] = end_ns - begin_ns;
    out[2] = static_cast<long long>(at);
}

// Whether this block is the one that shall measure: the block on the
// multiprocessor `sm`, or if that is negative the first block.
__device__ bool chosen(long long sm) {
    unsigned here;
    asm("mov.u32 %0, %%smid;" : "=r"(here));
    return sm < 0 ? blockIdx.x == 0 : here == sm;
}

extern "C" __global__ void chase_through_l1(
    const long long *ring, long long warm, long long steps, long long sm,
    long long *out
) {
    if (!chosen(sm)) return;
    chase<THROUGH_L1>((unsigned long long)ring, warm, steps, out);
}

extern "C" __global__ void chase_past_l1(
    const long long *ring, long long warm, long long steps, long long sm,
    long long *out
) {
    if (!chosen(sm)) return;
    chase<PAST_L1>((unsigned long long)ring, warm, steps, out);
}

constexpr int WORDS = 4096;  // of the rings in shared memory
constexpr int STEP = 33;     // words from one to the next; odd, so all are met

// The ring lies in the block's own shared memory.
extern "C" __global__ void chase_shared(long long steps, long long *out) {
    __shared__ unsigned long long ring[WORDS];
    unsigned long long base = __cvta_generic_to_shared(ring);
    for (int i = 0; i < WORDS; ++i) ring[i] = base + 8 * ((i + STEP) % WORDS);

    chase<SHARED>(base, WORDS, steps, out);
    out[2] -= base;
}

// The ring lies in the shared memory of the cluster's other block.
extern "C" __global__ void __cluster_dims__(2, 1, 1)
chase_cluster(long long steps, long long *out) {
    __shared__ unsigned long long ring[WORDS];
    unsigned long long base;
    asm("mapa.u64 %0, %1, 1;" : "=l"(base) : "l"(ring));
    for (int i = 0; i < WORDS; ++i) ring[i] = base + 8 * ((i + STEP) % WORDS);

    // no block reads before both rings are there
    asm volatile("barrier.cluster.arrive.release;" ::: "memory");
    asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
    if (blockIdx.x == 0) {
        chase<CLUSTER>(base, WORDS, steps, out);
        out[2] -= base;
    }
    // and none ends while it is read
    asm volatile("barrier.cluster.arrive.release;" ::: "memory");
    asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
}

// Loads 16 bytes.
template <Path path>
__device__ __forceinline__ uint4 load16(const uint4 *at) {
    uint4 v;
    if (path == THROUGH_L1) {
        asm volatile("ld.global.ca.v4.u32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(at));
    } else {
        asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(at));
    }
    return v;
}

// Each block reads `count` times 16 bytes of its own, `rounds` times over.
// Writes a sum for each thread, so that nothing can be left out.
template <Path path>
__device__ void read_own(
    const uint4 *x, long long count, long long rounds, unsigned *out
) {
    x += blockIdx.x * count;
    unsigned sum = 0;
    for (long long round = 0; round < rounds; ++round) {
        long long i = threadIdx.x;
        // four loads under way in each thread
        for (; i + 3 * blockDim.x < count; i += 4 * blockDim.x) {
            uint4 v[4];
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                v[k] = load16<path>(x + i + k * blockDim.x);
            }
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                sum += v[k].x + v[k].y + v[k].z + v[k].w;
            }
        }
        for (; i < count; i += blockDim.x) {
            uint4 v = load16<path>(x + i);
            sum += v.x + v.y + v.z + v.w;
        }
    }
    out[blockIdx.x * blockDim.x + threadIdx.x] = sum;
}

extern "C" __global__ void __launch_bounds__(1024)
read_through_l1(
    const uint4 *x, long long count, long long rounds, unsigned *out
) {
    read_own<THROUGH_L1>(x, count, rounds, out);
}

extern "C" __global__ void __launch_bounds__(1024)
read_past_l1(const uint4 *x, long long count, long long rounds, unsigned *out) {
    read_own<PAST_L1>(x, count, rounds, out);
}
