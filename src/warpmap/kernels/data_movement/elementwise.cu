// y[i] = f(a[i], b[i], ...) in three rungs, and for a row that repeats.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

// What is done to the elements. A new operator needs no more than this.
struct Multiply {
    __device__ float operator()(float a, float b) const { return a * b; }
};
struct Silu {
    // the fast forms: exact ones take more time than memory leaves for them
    __device__ float operator()(float x) const {
        return __fdividef(x, 1 + __expf(-x));
    }
};

// Which thread of the grid this is, and how many there are.
__device__ long long thread_number() {
    return blockIdx.x * (long long)blockDim.x + threadIdx.x;
}

__device__ long long thread_count() {
    return gridDim.x * (long long)blockDim.x;
}

// Rung 1: an element a thread, so the grid must be as large as the arrays.
template <typename F, typename T, typename... Inputs>
__device__ void naive(F f, long long n, T* y, Inputs... x) {
    long long i = thread_number();
    if (i < n) y[i] = T(f(float(x[i])...));
}

// Rung 2: a grid of any size walks over arrays of any size. Neighbours take
// neighbours in every step, so the accesses of a warp stay in one piece.
template <typename F, typename T, typename... Inputs>
__device__ void grid_stride(F f, long long n, T* y, Inputs... x) {
    for (long long i = thread_number(); i < n; i += thread_count())
        y[i] = T(f(float(x[i])...));
}

// 16 bytes of elements, loaded and stored at once.
template <typename T>
struct alignas(16) Pack {
    static constexpr int size = 16 / sizeof(T);
    T at[size];
};

// One operation on whole packs.
template <typename F, typename T, typename... Packs>
__device__ Pack<T> on_packs(F f, Pack<T> first, Packs... others) {
    Pack<T> y;
#pragma unroll
    for (int k = 0; k < Pack<T>::size; ++k)
        y.at[k] = T(f(float(first.at[k]), float(others.at[k])...));
    return y;
}

template <typename T>
__device__ const Pack<T>* as_packs(const T* x) {
    return reinterpret_cast<const Pack<T>*>(x);
}

// Rung 3: the same walk in steps of a pack. What is left at the end is less
// than a pack, and goes element by element.
template <typename F, typename T, typename... Inputs>
__device__ void packed(F f, long long n, T* y, Inputs... x) {
    Pack<T>* y_packs = reinterpret_cast<Pack<T>*>(y);
    long long packs = n / Pack<T>::size;
    for (long long i = thread_number(); i < packs; i += thread_count())
        y_packs[i] = on_packs(f, as_packs(x)[i]...);

    long long i = packs * Pack<T>::size + thread_number();
    if (i < n) y[i] = T(f(float(x[i])...));
}

// The second operand is one row of `cols` elements, a whole number of packs.
// Its column follows from a division; the loop needs only the first one.
template <typename F, typename T>
__device__ void packed_row(
    F f, long long n, T* y, const T* a, const T* row, long long cols
) {
    Pack<T>* y_packs = reinterpret_cast<Pack<T>*>(y);
    long long packs = n / Pack<T>::size, width = cols / Pack<T>::size;
    long long col = thread_number() % width, step = thread_count() % width;
    for (long long i = thread_number(); i < packs; i += thread_count()) {
        y_packs[i] = on_packs(f, as_packs(a)[i], as_packs(row)[col]);
        col += step;
        if (col >= width) col -= width;
    }
}

#define KERNELS(type, T)                                                      \
    extern "C" __global__ void multiply_naive_##type(                         \
        const T* a, const T* b, T* y, long long n                             \
    ) {                                                                       \
        naive(Multiply(), n, y, a, b);                                        \
    }                                                                         \
    extern "C" __global__ void multiply_grid_stride_##type(                   \
        const T* a, const T* b, T* y, long long n                             \
    ) {                                                                       \
        grid_stride(Multiply(), n, y, a, b);                                  \
    }                                                                         \
    extern "C" __global__ void multiply_packed_##type(                        \
        const T* a, const T* b, T* y, long long n                             \
    ) {                                                                       \
        packed(Multiply(), n, y, a, b);                                       \
    }                                                                         \
    extern "C" __global__ void multiply_row_##type(                           \
        const T* a, const T* row, T* y, long long n, long long cols           \
    ) {                                                                       \
        packed_row(Multiply(), n, y, a, row, cols);                           \
    }                                                                         \
    extern "C" __global__ void silu_##type(                                   \
        const T* x, T* y, long long n                                         \
    ) {                                                                       \
        packed(Silu(), n, y, x);                                              \
    }

KERNELS(float32, float)
KERNELS(float16, __half)
KERNELS(bfloat16, __nv_bfloat16)
