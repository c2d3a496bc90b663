// The kernels of cuda_programming.py, in CUDA C++.

// y = a x + y, an element for each thread: the grid must cover the array.
extern "C" __global__ void axpy_once(float a, const float* x, float* y,
                                     long long n) {
    // 64-bit: the product of two unsigned ints wraps at 2^32
    long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) y[i] = a * x[i] + y[i];
}

// y = a x + y, by a grid of any size: a thread takes an element, then jumps
// ahead by the number of all threads.
extern "C" __global__ void axpy(float a, const float* x, float* y,
                                long long n) {
    long long first = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    long long threads = (long long)gridDim.x * blockDim.x;
    for (long long i = first; i < n; i += threads) y[i] = a * x[i] + y[i];
}

// The same walk along x, y and z: each element learns the number of the thread
// that came, and how often one did. A plane has Z = 1, a line Y = Z = 1.
extern "C" __global__ void touch(long long* owner, int* visits, long long X,
                                 long long Y, long long Z) {
    // within a block as within the grid, x runs fastest and z slowest
    long long block = (blockIdx.z * (long long)gridDim.y + blockIdx.y) *
                      gridDim.x + blockIdx.x;
    unsigned thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x +
                      threadIdx.x;
    unsigned threads = blockDim.x * blockDim.y * blockDim.z;

    long long x0 = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    long long y0 = (long long)blockIdx.y * blockDim.y + threadIdx.y;
    long long z0 = (long long)blockIdx.z * blockDim.z + threadIdx.z;
    long long dx = (long long)gridDim.x * blockDim.x;
    long long dy = (long long)gridDim.y * blockDim.y;
    long long dz = (long long)gridDim.z * blockDim.z;
    for (long long z = z0; z < Z; z += dz)
        for (long long y = y0; y < Y; y += dy)
            for (long long x = x0; x < X; x += dx) {
                long long element = (z * Y + y) * X + x;
                owner[element] = block * threads + thread;
                atomicAdd(&visits[element], 1);
            }
}

// How the index comes out in 32 bits, as in many a tutorial.
extern "C" __global__ void index_32_bits(unsigned* last) {
    unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    if (blockIdx.x == gridDim.x - 1 && threadIdx.x == 0) *last = i;
}

__device__ long long nanoseconds() {
    long long now;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
    return now;
}

// Takes its time; then copies x to y, and notes when it began and ended.
extern "C" __global__ void copy_late(const int* x, int* y, long long* times,
                                     long long wait_ns) {
    times[0] = nanoseconds();
    while (nanoseconds() < times[0] + wait_ns) {}
    *y = *x;
    times[1] = nanoseconds();
}
