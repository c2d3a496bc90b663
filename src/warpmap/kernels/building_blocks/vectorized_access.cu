// Copies of bytes in packs of 1 to 16, one pack a thread.

// One load and one store of a whole pack. Both addresses must be multiples of
// its size, and `head` is what leads there; a pack that is not aligned stops
// the kernel with an error. The two ends go byte by byte.
template <typename Pack>
__device__ void copy_packs(
    const char* x, char* y, long long head, long long packs, long long tail
) {
    // 64-bit: a byte's number overflows 32 bits in an array of 2 GiB
    long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x;

    const Pack* x_packs = reinterpret_cast<const Pack*>(x + head);
    Pack* y_packs = reinterpret_cast<Pack*>(y + head);
    if (i < packs) y_packs[i] = x_packs[i];

    // fewer bytes than a pack at each end, and a block has 256 threads
    long long end = head + packs * sizeof(Pack);
    if (i < head) y[i] = x[i];
    if (i < tail) y[end + i] = x[end + i];
}

// The types below are as wide as their names say. A struct of our own would
// need alignas: without it the compiler must move it member by member.
#define KERNEL(name, Pack)                                                    \
    extern "C" __global__ void name(                                          \
        const char* x, char* y, long long head, long long packs,              \
        long long tail                                                        \
    ) {                                                                       \
        copy_packs<Pack>(x, y, head, packs, tail);                            \
    }

KERNEL(copy_1, char)
KERNEL(copy_2, short)
KERNEL(copy_4, int)
KERNEL(copy_8, int2)
KERNEL(copy_16, int4)
