// Times requests to shared memory whose addresses are given.
//
// Shared memory is filled so that each piece holds its own address. A thread
// reads a piece, takes what it read as the next address, and so reads the same
// piece for ever, while the compiler has to believe that it may move.

constexpr int memory_bytes = 32768;
constexpr int chains = 4;  // reads a thread keeps under way

__device__ unsigned total(unsigned v) { return v; }
__device__ unsigned total(uint2 v) { return v.x + v.y; }
__device__ unsigned total(uint4 v) { return v.x + v.y + v.z + v.w; }

// start  first address of each lane, for each chain
// end    last address of each lane, for each warp and chain
// cycles that the block took for all its requests
template <class Piece>
__device__ void repeat(
    const int* start, int* end, long long* cycles, long long rounds) {
  __shared__ uint4 aligned[memory_bytes / 16];
  unsigned* words = reinterpret_cast<unsigned*>(aligned);
  const char* memory = reinterpret_cast<const char*>(aligned);
  constexpr int piece_words = sizeof(Piece) / 4;
  for (int i = threadIdx.x; i < memory_bytes / 4; i += blockDim.x)
    words[i] = i % piece_words == 0 ? 4 * i : 0;

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  unsigned address[chains];
  for (int c = 0; c < chains; ++c) address[c] = start[32 * c + lane];

  __syncthreads();
  const long long begin = clock64();
  for (int round = 0; round < rounds; ++round)
#pragma unroll
    for (int c = 0; c < chains; ++c)
      address[c] = total(*reinterpret_cast<const Piece*>(memory + address[c]));
  __syncthreads();
  if (threadIdx.x == 0) *cycles = clock64() - begin;

  for (int c = 0; c < chains; ++c)
    end[(warp * chains + c) * 32 + lane] = address[c];
}

extern "C" __global__ void repeat_32(
    const int* start, int* end, long long* cycles, long long rounds) {
  repeat<unsigned>(start, end, cycles, rounds);
}

extern "C" __global__ void repeat_64(
    const int* start, int* end, long long* cycles, long long rounds) {
  repeat<uint2>(start, end, cycles, rounds);
}

extern "C" __global__ void repeat_128(
    const int* start, int* end, long long* cycles, long long rounds) {
  repeat<uint4>(start, end, cycles, rounds);
}
