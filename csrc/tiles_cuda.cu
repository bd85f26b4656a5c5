// Products of many tokens with listed weight rows, at the speed of rows that lie side by side.
//
// Hopper's tensor copies address tiles, not lists of rows. So four producer warps fetch each row of a step, 128 bytes,
// in 16-byte pieces to the place that the matrix units expect (rows permuted by the 128-byte swizzle), several steps
// ahead of two consumer warpgroups of 64 tokens each. One block a multiprocessor takes tiles until none is left, and
// its producers are at the next tile while the consumers store the last. The width of a tile is chosen so that the
// last wave of tiles is as full as possible.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "hopper.cuh"
#include "device.cuh"
#include "tiles.h"
#include "wgmma.cuh"

namespace ppf {
namespace {

constexpr int kTokens = 128;  // of a tile
constexpr int kStep = 64;     // contraction positions of a stage: rows of 128 bytes
constexpr int kRowBytes = kStep * 2;
constexpr int kGroupThreads = 128;
constexpr int kThreads = 3 * kGroupThreads;
constexpr int kXBytes = kTokens * kRowBytes;
constexpr int kMostShared = 227 << 10;

template <int kWide>
struct Stage {
  static constexpr int kBytes = kXBytes + kWide * kRowBytes;
  static constexpr int kCount = std::min(8, (kMostShared - 1024 - 256) / kBytes);
};

__host__ __device__ constexpr int outputs_of(int wide, bool pair) { return pair ? wide / 2 : wide; }

__device__ __forceinline__ void copy_piece(uint32_t target, const char* source, bool inside) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target), "l"(source), "r"(inside ? 16 : 0)
               : "memory");
}

// Arrives at the barrier once this thread's copies so far have landed.
__device__ __forceinline__ void arrive_with_copies(uint64_t* barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(barrier)) : "memory");
}

template <int kCount>
struct Sync {
  uint64_t full[kCount], empty[kCount];
};

// Tile number to its first token and output; tiles of one weight part follow each other, so that L2 serves it.
struct Place {
  int token, output;

  __device__ Place(const TileJob& p, int tile, int outputs) {
    const int of_tokens = (p.tokens + kTokens - 1) / kTokens;
    token = tile % of_tokens * kTokens;
    output = tile / of_tokens * outputs;
  }
};

// Eight producer threads fetch a row of 128 bytes, and a thread's rows lie 16 apart: they share its swizzle.
__device__ __forceinline__ int producer_row() { return threadIdx.x % kGroupThreads / 8; }
__device__ __forceinline__ int producer_piece() { return threadIdx.x % 8; }
__device__ __forceinline__ uint32_t swizzled_place(int i) {
  const int row = producer_row();
  return row * kRowBytes + ((producer_piece() ^ (row & 7)) << 4) + i * 16 * kRowBytes;
}

// The tile's rows of x.
class TokenRows {
 public:
  __device__ __forceinline__ TokenRows(const TileJob& p, int token) {
#pragma unroll
    for (int i = 0; i < kTokens / 16; ++i) {
      const int64_t row = min(token + producer_row() + 16 * i, p.tokens - 1);
      at_[i] = static_cast<const char*>(p.x) + row * p.x_pitch + producer_piece() * 16;
    }
  }

  __device__ __forceinline__ void copy(uint32_t target, int k, bool inside) const {
#pragma unroll
    for (int i = 0; i < kTokens / 16; ++i) {
      copy_piece(target + swizzled_place(i), inside ? at_[i] + k * int64_t{2} : at_[i], inside);
    }
  }

 private:
  const char* at_[kTokens / 16];
};

// The tile's listed weight rows; with a pair, gate's before up's.
template <int kWide, bool kPair>
class OutputRows {
 public:
  __device__ __forceinline__ OutputRows(const TileJob& p, int first) : first_weight_(p.weight), second_weight_(p.pair) {
#pragma unroll
    for (int i = 0; i < kWide / 16; ++i) {
      const int line = producer_row() + 16 * i;
      const int output = min(first + (second(i) ? line - kOutputs : line), p.width - 1);
      const int number = p.rows ? __ldg(p.rows + output) : output;
      place_[i] = static_cast<uint32_t>(number * ((second(i) ? p.pair_pitch : p.weight_pitch) / 16)) + producer_piece();
    }
  }

  __device__ __forceinline__ void copy(uint32_t target, int k, bool inside) const {
#pragma unroll
    for (int i = 0; i < kWide / 16; ++i) {
      const void* weight = second(i) ? second_weight_ : first_weight_;
      const char* source = static_cast<const char*>(weight) + uint64_t{place_[i]} * 16;
      copy_piece(target + swizzled_place(i), inside ? source + k * int64_t{2} : source, inside);
    }
  }

 private:
  static constexpr int kOutputs = outputs_of(kWide, kPair);

  __device__ __forceinline__ static bool second(int i) {
    return kPair && producer_row() + 16 * i >= kOutputs;
  }

  const void* first_weight_;
  const void* second_weight_;
  uint32_t place_[kWide / 16];  // in 16 bytes
};

template <int kWide, bool kPair>
__device__ void produce(const TileJob& p, uint32_t ring, Sync<Stage<kWide>::kCount>& sync, int tiles) {
  using Ring = Stage<kWide>;
  int stage = 0, lap = 0;
  for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const Place at(p, tile, outputs_of(kWide, kPair));
    const TokenRows tokens(p, at.token);
    const OutputRows<kWide, kPair> outputs(p, at.output);
    for (int k = 0; k < p.depth; k += kStep) {
      const uint32_t target = ring + stage * Ring::kBytes;
      if (lap > 0) barrier_wait(&sync.empty[stage], (lap - 1) & 1);
      const bool inside = k + producer_piece() * 8 < p.depth;
      tokens.copy(target, k, inside);
      outputs.copy(target + kXBytes, k, inside);
      arrive_with_copies(&sync.full[stage]);
      if (++stage == Ring::kCount) stage = 0, ++lap;
    }
  }
}

template <bool kHalf>
__device__ __forceinline__ uint32_t packed(float low, float high) {
  if constexpr (kHalf) {
    const __half2 both = __floats2half2_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&both);
  } else {
    const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&both);
  }
}

__device__ __forceinline__ float silu_times(float gate, float up) { return gate / (1.0f + __expf(-gate)) * up; }

template <int kWide, bool kPair, bool kHalf>
__device__ void store(const TileJob& p, const float (&d)[kWide / 2], const Place& at, int group) {
  constexpr int kOutputs = outputs_of(kWide, kPair);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
  const bool pairs = p.width % 2 == 0;
#pragma unroll
  for (int lower = 0; lower < 2; ++lower) {
    const int token = at.token + group * 64 + warp * 16 + lane / 4 + lower * 8;
    if (token >= p.tokens) break;
    uint16_t* const y = static_cast<uint16_t*>(p.y) + int64_t{token} * p.width;
#pragma unroll
    for (int j = 0; j < kOutputs / 8; ++j) {
      const int output = at.output + j * 8 + lane % 4 * 2;
      float low = d[4 * j + 2 * lower], high = d[4 * j + 2 * lower + 1];
      if constexpr (kPair) {
        low = silu_times(low, d[4 * (j + kOutputs / 8) + 2 * lower]);
        high = silu_times(high, d[4 * (j + kOutputs / 8) + 2 * lower + 1]);
      }
      const uint32_t both = packed<kHalf>(low, high);
      if (pairs && output + 1 < p.width) {
        *reinterpret_cast<uint32_t*>(y + output) = both;
      } else {
        if (output < p.width) y[output] = static_cast<uint16_t>(both);
        if (output + 1 < p.width) y[output + 1] = static_cast<uint16_t>(both >> 16);
      }
    }
  }
}

template <int kWide, bool kPair, bool kHalf>
__device__ void consume(const TileJob& p, uint32_t ring, Sync<Stage<kWide>::kCount>& sync, int tiles) {
  using Ring = Stage<kWide>;
  const int group = threadIdx.x / kGroupThreads - 1;
  const bool speaks = threadIdx.x % 32 == 0;  // one lane a warp
  const int steps = (p.depth + kStep - 1) / kStep;
  int stage = 0, lap = 0;
  float d[kWide / 2];
  for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    int last = 0;
    for (int step = 0; step < steps; ++step) {
      const uint32_t x = ring + stage * Ring::kBytes + group * 64 * kRowBytes;
      const uint32_t weight = ring + stage * Ring::kBytes + kXBytes;
      barrier_wait(&sync.full[stage], lap & 1);
      fence_for_wgmma();
      wgmma_begin();
#pragma unroll
      for (int k = 0; k < kStep / 16; ++k) {
        wgmma<kWide, kHalf>(d, tile_descriptor(x + k * 32), tile_descriptor(weight + k * 32), step > 0 || k > 0);
      }
      wgmma_commit();
      wgmma_wait<1>();
      if (step > 0 && speaks) barrier_arrive(&sync.empty[last]);
      last = stage;
      if (++stage == Ring::kCount) stage = 0, ++lap;
    }
    wgmma_wait<0>();
    if (speaks) barrier_arrive(&sync.empty[last]);
    store<kWide, kPair, kHalf>(p, d, Place(p, tile, outputs_of(kWide, kPair)), group);
  }
}

template <int kWide, bool kPair, bool kHalf>
__global__ void __launch_bounds__(kThreads, 1) tile_kernel(const __grid_constant__ TileJob p, int tiles) {
  using Ring = Stage<kWide>;
  extern __shared__ char shared[];
  __shared__ Sync<Ring::kCount> sync;
  const uint32_t ring = (shared_address(shared) + 1023) / 1024 * 1024;  // the swizzle counts from there
  if (threadIdx.x == 0) {
    for (int i = 0; i < Ring::kCount; ++i) {
      barrier_init(&sync.full[i], kGroupThreads);
      barrier_init(&sync.empty[i], 8);
    }
    barriers_ready();
  }
  __syncthreads();
  if (threadIdx.x < kGroupThreads) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 96;");
    produce<kWide, kPair>(p, ring, sync, tiles);
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 200;");
    consume<kWide, kPair, kHalf>(p, ring, sync, tiles);
  }
}

int tiles_of(const TileJob& job, int wide, bool pair) {
  const int outputs = outputs_of(wide, pair);
  return (job.tokens + kTokens - 1) / kTokens * ((job.width + outputs - 1) / outputs);
}

// Waves of tiles times their cost; a tile pays for its share of x and its ends, too.
double cost(const TileJob& job, int wide, bool pair, int processors) {
  const int waves = (tiles_of(job, wide, pair) + processors - 1) / processors;
  return waves * (wide + 12.0);
}

template <int kWide, bool kPair, bool kHalf>
void launch(const TileJob& job, int device, void* stream) {
  constexpr int kShared = Stage<kWide>::kBytes * Stage<kWide>::kCount + 1024;
  const auto kernel = tile_kernel<kWide, kPair, kHalf>;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared), "shared memory");
  const int tiles = tiles_of(job, kWide, kPair);
  kernel<<<std::min(tiles, multiprocessors(device)), kThreads, kShared, static_cast<cudaStream_t>(stream)>>>(job, tiles);
  check(cudaGetLastError(), "launch");
}

template <int kWide, bool kPair>
void launch(const TileJob& job, int device, void* stream) {
  job.half ? launch<kWide, kPair, true>(job, device, stream) : launch<kWide, kPair, false>(job, device, stream);
}

template <bool kPair, int... kWides>
void launch_widest(const TileJob& job, int device, void* stream, int wide) {
  if (wide == 0) {
    const int processors = multiprocessors(device);
    double least = 1e300;
    for (const int candidate : {kWides...}) {
      const double found = cost(job, candidate, kPair, processors);
      if (found < least) least = found, wide = candidate;
    }
  }
  const bool known = ((wide == kWides ? (launch<kWides, kPair>(job, device, stream), true) : false) || ...);
  if (!known) throw std::runtime_error("tiles: no tile of " + std::to_string(wide) + " rows");
}

}  // namespace

void tile_product(const TileJob& job, int device, void* stream, int wide) {
  const DeviceScope scope(device);
  if (job.pair) return launch_widest<true, 128, 144, 160, 176, 192, 208, 224, 240, 256>(job, device, stream, wide);
  launch_widest<false, 128, 160, 192, 224, 256>(job, device, stream, wide);
}

}  // namespace ppf
