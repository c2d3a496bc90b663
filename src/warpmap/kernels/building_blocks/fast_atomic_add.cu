// Atomic additions in half precision, and a dot product that climbs from one
// addition a thread to one a block. Launched by fast_atomic_add.py.

#include <cuda_fp16.h>

// As CUDA offers it. No GPU adds 16 bits in memory: the compiler makes this a
// loop that reads the 32-bit word around the number, adds, and swaps the word
// in only if nobody has changed it meanwhile.
__device__ void add_half(half* at, half value) { atomicAdd(at, value); }

// Two neighbours at once, which the L2 cache does by itself. `red` asks for no
// old value: unlike CUDA's atomicAdd(half2*), it waits for no answer.
__device__ void add_pair(half* at, half low, half high) {
    half2 both = __halves2half2(low, high);
    asm volatile("red.global.add.noftz.f16x2 [%0], %1;" ::"l"(
                     __cvta_generic_to_global(at)),
                 "r"(*reinterpret_cast<unsigned*>(&both))
                 : "memory");
}

// One number, padded to a pair that begins on a multiple of 4 bytes. Adding
// -0.0 changes nothing; +0.0 would turn a neighbour that is -0.0 into +0.0.
__device__ void fast_add(half* out, long long N, long long index, half value) {
    half* at = out + index;
    half nothing = __float2half(-0.0f);
    bool high = reinterpret_cast<unsigned long long>(at) & 2;
    if (!high && index + 1 < N) {
        add_pair(at, value, nothing);
    } else if (high && index > 0) {
        add_pair(at - 1, nothing, value);
    } else {
        add_half(at, value);  // the partner is somebody else's memory
    }
}

__device__ long long thread_number() {
    return blockIdx.x * static_cast<long long>(blockDim.x) + threadIdx.x;
}

// out[index[i]] += value[i], a thread for each i; what lies outside is left out
#define ADD_AT(name, T, add)                                                 \
    extern "C" __global__ void name(T* out, const long long* index,          \
                                    const T* value, long long n,             \
                                    long long N) {                           \
        long long i = thread_number();                                       \
        if (i < n && 0 <= index[i] && index[i] < N) {                        \
            long long at = index[i];                                         \
            add;                                                             \
        }                                                                    \
    }

ADD_AT(add_at_half, half, add_half(out + at, value[i]))
ADD_AT(add_at_padded, half, fast_add(out, N, at, value[i]))
ADD_AT(add_at_float, float, atomicAdd(out + at, value[i]))

// A thread's part of a dot product, in float: products of even elements and of
// odd ones. 16 bytes of x and y at a time, then up to 7 elements one by one.
__device__ float2 dot_of_thread(const half* x, const half* y, long long n) {
    const uint4* xs = reinterpret_cast<const uint4*>(x);
    const uint4* ys = reinterpret_cast<const uint4*>(y);
    long long threads = gridDim.x * static_cast<long long>(blockDim.x);
    float2 sum = make_float2(0.0f, 0.0f);
#pragma unroll 4
    for (long long i = thread_number(); i < n / 8; i += threads) {
        uint4 a = xs[i], b = ys[i];
        const half2* p = reinterpret_cast<const half2*>(&a);
        const half2* q = reinterpret_cast<const half2*>(&b);
#pragma unroll
        for (int k = 0; k < 4; k++) {
            float2 u = __half22float2(p[k]), v = __half22float2(q[k]);
            sum.x += u.x * v.x;
            sum.y += u.y * v.y;
        }
    }
    long long i = n / 8 * 8 + thread_number();
    if (i < n) {
        sum.x += __half2float(x[i]) * __half2float(y[i]);
    }
    return sum;
}

// First rung: each thread adds its part to one number in memory.
extern "C" __global__ void dot_half(const half* x, const half* y, half* sum,
                                    long long n) {
    float2 part = dot_of_thread(x, y, n);
    add_half(sum, __float2half(part.x + part.y));
}

// Two sums side by side, of even and of odd elements: a packed addition.
extern "C" __global__ void dot_half2(const half* x, const half* y, half* sum,
                                     long long n) {
    float2 part = dot_of_thread(x, y, n);
    add_pair(sum, __float2half(part.x), __float2half(part.y));
}

// One sum again, with nothing for the neighbour.
extern "C" __global__ void dot_padded(const half* x, const half* y, half* sum,
                                      long long n) {
    float2 part = dot_of_thread(x, y, n);
    fast_add(sum, 2, 0, __float2half(part.x + part.y));
}

// In float, memory has an adder of its own for every number.
extern "C" __global__ void dot_float(const half* x, const half* y, float* sum,
                                     long long n) {
    float2 part = dot_of_thread(x, y, n);
    atomicAdd(sum, part.x + part.y);
}

// Last rung: threads add up among themselves, first the 32 of a warp through
// registers, then the 8 warps through shared memory. One addition a block.
extern "C" __global__ void dot_block(const half* x, const half* y, float* sum,
                                     long long n) {
    __shared__ float of_warp[8];
    float2 both = dot_of_thread(x, y, n);
    float part = both.x + both.y;
    for (int step = 16; step > 0; step /= 2) {
        part += __shfl_down_sync(0xffffffff, part, step);
    }
    if (threadIdx.x % 32 == 0) {
        of_warp[threadIdx.x / 32] = part;
    }
    __syncthreads();
    if (threadIdx.x < 8) {
        part = of_warp[threadIdx.x];
        for (int step = 4; step > 0; step /= 2) {
            part += __shfl_down_sync(0xff, part, step);
        }
        if (threadIdx.x == 0) {
            atomicAdd(sum, part);
        }
    }
}
