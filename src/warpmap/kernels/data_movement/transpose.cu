// Four ways to transpose a matrix of 4-byte elements, x (M, N) into y (N, M).
//
// A block of 32 x 8 threads turns a tile of 32 x 32 elements, so each warp
// takes four rows of it. threadIdx.x runs along a warp.

constexpr int tile = 32;
constexpr int step = 8;  // rows of a tile that the block takes at once

// A warp reads 32 neighbours, and writes them M elements apart: 32 sectors.
extern "C" __global__ void transpose_naive(
    const unsigned* x, unsigned* y, long long M, long long N) {
  const long long col = 1LL * blockIdx.x * tile + threadIdx.x;
#pragma unroll
  for (int i = 0; i < tile; i += step) {
    const long long row = 1LL * blockIdx.y * tile + i + threadIdx.y;
    if (row < M && col < N) y[col * M + row] = x[row * N + col];
  }
}

// Three places in shared memory for element (row, col) of a tile.
__device__ int plain(int row, int col) {
  return row * tile + col;
}

// A word is left free after each row: down a column the bank moves by one.
__device__ int padded(int row, int col) {
  return row * (tile + 1) + col;
}

// Each row in an order of its own, so that no column meets a bank twice.
__device__ int swizzled(int row, int col) {
  return row * tile + (col ^ row);
}

// A warp reads rows of x into the tile, and takes columns of the tile out of
// it as rows of y. Global memory sees neighbours both times; what is not
// contiguous happens in shared memory, where only banks matter.
template <int (*place)(int, int), int words>
__device__ void through_shared(
    const unsigned* x, unsigned* y, long long M, long long N) {
  __shared__ unsigned kept[words];
  const long long first_row = 1LL * blockIdx.y * tile;
  const long long first_col = 1LL * blockIdx.x * tile;

#pragma unroll
  for (int i = 0; i < tile; i += step) {
    const int j = i + threadIdx.y;
    const long long row = first_row + j, col = first_col + threadIdx.x;
    if (row < M && col < N)
      kept[place(j, threadIdx.x)] = x[row * N + col];
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < tile; i += step) {
    const int j = i + threadIdx.y;
    const long long row = first_row + threadIdx.x, col = first_col + j;
    if (row < M && col < N)
      y[col * M + row] = kept[place(threadIdx.x, j)];
  }
}

extern "C" __global__ void transpose_tiled(
    const unsigned* x, unsigned* y, long long M, long long N) {
  through_shared<plain, tile * tile>(x, y, M, N);
}

extern "C" __global__ void transpose_padded(
    const unsigned* x, unsigned* y, long long M, long long N) {
  through_shared<padded, tile * (tile + 1)>(x, y, M, N);
}

extern "C" __global__ void transpose_swizzled(
    const unsigned* x, unsigned* y, long long M, long long N) {
  through_shared<swizzled, tile * tile>(x, y, M, N);
}
