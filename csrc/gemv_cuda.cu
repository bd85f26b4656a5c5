// Products of 1 to 16 tokens: the weights' bytes are the whole cost, so everything serves an unbroken stream of them.
//
// * Weights go from memory to registers in 16-byte pieces, eight in flight per thread, and from there into the matrix
//   units: 16 weight rows are the tall operand, 8 or 16 tokens the narrow one. Even for one token that takes fewer
//   instructions than multiplying and summing. A product does not mind in which order its contraction is numbered, so
//   a thread's 8 neighbouring elements serve as they come, without a trip through shared memory.
// * Blocks are small and many: they come and go, and no multiprocessor waits for the slowest. (One block a
//   multiprocessor with a ring of bulk copies lost 2 us a launch; see dev/LOG.md.)
// * A dependent kernel (down after gate and up) starts early and holds its first weights when the first one ends.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>

#include "hopper.cuh"
#include "device.cuh"
#include "gemv.h"

namespace ppf {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kTile = 16;   // weight rows of a matrix instruction
constexpr int kPiece = 32;  // contraction positions of two matrix instructions: 16 bytes a lane
constexpr int kAhead = 4;   // pieces of a warp in flight, of two rows each

struct Bf16 {};
struct Fp16 {};

template <class T>
__device__ __forceinline__ void multiply(float (&acc)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

template <>
__device__ __forceinline__ void multiply<Bf16>(float (&acc)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <>
__device__ __forceinline__ void multiply<Fp16>(float (&acc)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <class T>
__device__ __forceinline__ uint16_t rounded(float value);
template <>
__device__ __forceinline__ uint16_t rounded<Bf16>(float value) {
  return __bfloat16_as_ushort(__float2bfloat16_rn(value));
}
template <>
__device__ __forceinline__ uint16_t rounded<Fp16>(float value) {
  return __half_as_ushort(__float2half_rn(value));
}

__device__ __forceinline__ uint4 load_once(const char* address, bool inside) {
  uint4 held = make_uint4(0, 0, 0, 0);
  if (inside) {
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(held.x), "=r"(held.y), "=r"(held.z), "=r"(held.w)
                 : "l"(address));
  }
  return held;
}

__device__ __forceinline__ uint4 both(const uint4& a, const uint4& b) {
  return make_uint4(a.x & b.x, a.y & b.y, a.z & b.z, a.w & b.w);
}

// Sums of `count` values a lane over the block's warps, in the order of the warps; true for the warp that has them.
template <int kCount>
__device__ bool sum_over_warps(float (&acc)[kCount], float* scratch) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  if (warp > 0) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) scratch[((warp - 1) * kCount + i) * 32 + lane] = acc[i];
  }
  __syncthreads();
  if (warp > 0) return false;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    for (int other = 0; other < kWarps - 1; ++other) acc[i] += scratch[(other * kCount + i) * 32 + lane];
  }
  return true;
}

enum class Kind { kPlain, kPair, kMasked };

// ---------------------------------------------------------------------------------------------------------------- rows

// Lane l works on rows l / 4 and l / 4 + 8 of the block's 16 (with kPair: a row of gate and the same one of up), and on
// the elements l % 4 * 8 ... + 8 of a piece.
__device__ __forceinline__ int position(int k0, int piece) { return k0 + piece * kPiece + threadIdx.x % 4 * 8; }

__device__ __forceinline__ void load_pieces(const GemvRows& p, const char* const (&row)[2], int k0,
                                            uint4 (&w)[kAhead][2]) {
#pragma unroll
  for (int i = 0; i < kAhead; ++i) {
    const int k = position(k0, i);
    const bool inside = k < p.depth;
    int64_t column = k;
    if (p.blocks && inside) column = __ldg(p.blocks + k / 64) * int64_t{64} + k % 64;
    w[i][0] = load_once(row[0] + column * 2, inside);
    w[i][1] = load_once(row[1] + column * 2, inside);
  }
}

template <class T, int kN, Kind kKind>
__device__ __forceinline__ void multiply_piece(const GemvRows& p, int k, uint4 (&w)[2], float (&acc)[kN * 4]) {
  const bool inside = k < p.depth;
  uint4 ones;
  if constexpr (kKind == Kind::kMasked) {
    ones = inside ? __ldg(reinterpret_cast<const uint4*>(p.mask + k)) : make_uint4(0, 0, 0, 0);
    w[0] = both(w[0], ones), w[1] = both(w[1], ones);
  }
#pragma unroll
  for (int n = 0; n < kN; ++n) {
    const int token = n * 8 + threadIdx.x % 32 / 4;
    uint4 x = make_uint4(0, 0, 0, 0);
    if (inside && token < p.tokens) {
      x = *reinterpret_cast<const uint4*>(static_cast<const char*>(p.x) + token * p.x_pitch + k * int64_t{2});
    }
    if constexpr (kKind == Kind::kMasked) x = both(x, ones);
    float(&sums)[4] = *reinterpret_cast<float(*)[4]>(acc + n * 4);
    multiply<T>(sums, {w[0].x, w[1].x, w[0].y, w[1].y}, x.x, x.y);
    multiply<T>(sums, {w[0].z, w[1].z, w[0].w, w[1].w}, x.z, x.w);
  }
}

template <class T, int kN, bool kPair>
__device__ __forceinline__ void store_rows(const GemvRows& p, const float (&acc)[kN * 4], int first) {
  const int lane = threadIdx.x % 32;
  uint16_t* const y = static_cast<uint16_t*>(p.y);
#pragma unroll
  for (int n = 0; n < kN; ++n) {
#pragma unroll
    for (int part = 0; part < (kPair ? 2 : 4); ++part) {
      const int token = n * 8 + lane % 4 * 2 + part % 2, output = first + lane / 4 + part / 2 * 8;
      if (token >= p.tokens || output >= p.width) continue;
      float value = acc[n * 4 + part];
      if (kPair) value = value / (1.0f + __expf(-value)) * acc[n * 4 + part + 2];
      y[token * p.y_stride + (p.scatter ? __ldg(p.rows + output) : output)] = rounded<T>(value);
    }
  }
}

template <class T, int kN, Kind kKind>
__global__ void __launch_bounds__(kThreads, kN == 1 ? 4 : 3) rows_kernel(const __grid_constant__ GemvRows p) {
  let_dependents_start();
  __shared__ float scratch[(kWarps - 1) * kN * 4 * 32];
  constexpr bool kPair = kKind == Kind::kPair;
  const int line = threadIdx.x % 32 / 4, warp = threadIdx.x / 32;
  const int first = blockIdx.x * (kPair ? kTile / 2 : kTile);
  const char* row[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int output = min(first + line + (kPair ? 0 : half * 8), p.width - 1);
    const int64_t number = p.rows ? __ldg(p.rows + output) : output;
    row[half] = kPair && half ? static_cast<const char*>(p.pair) + number * p.pair_pitch
                              : static_cast<const char*>(p.weight) + number * p.weight_pitch;
  }
  float acc[kN * 4] = {};
  bool waited = false;
  for (int k0 = warp * kAhead * kPiece; k0 < p.depth; k0 += kWarps * kAhead * kPiece) {
    uint4 w[kAhead][2];
    load_pieces(p, row, k0, w);
    if (!waited) wait_for_previous_kernel();
    waited = true;
#pragma unroll
    for (int i = 0; i < kAhead; ++i) multiply_piece<T, kN, kKind>(p, position(k0, i), w[i], acc);
  }
  if (!waited) wait_for_previous_kernel();
  if (sum_over_warps(acc, scratch)) store_rows<T, kN, kPair>(p, acc, first);
}

// ------------------------------------------------------------------------------------------------------------- columns

constexpr int kWide = 64;       // columns of a block
constexpr int kUnitsAhead = 2;  // steps of 16 units in flight

// A lane takes 8 neighbouring columns of four units a step, and pairs the units' elements for the matrix units.
__device__ __forceinline__ void load_units(const GemvColumns& p, int column, int unit, int last, uint4 (&w)[4]) {
  const char* const source = static_cast<const char*>(p.weight) + column * 2;
  int64_t number[4];
#pragma unroll
  for (int u = 0; u < 4; ++u) {
    number[u] = unit + u >= last || column >= p.columns ? -1 : p.rows ? __ldg(p.rows + unit + u) : unit + u;
  }
#pragma unroll
  for (int u = 0; u < 4; ++u) w[u] = load_once(source + number[u] * p.weight_pitch, number[u] >= 0);
}

template <class T, int kN>
__device__ __forceinline__ void multiply_units(const GemvColumns& p, int unit, int last, const uint4 (&w)[4],
                                               float (&acc)[16 * kN]) {
  const uint16_t* const x = static_cast<const uint16_t*>(p.x);
  uint32_t b[kN][2];
#pragma unroll
  for (int n = 0; n < kN; ++n) {
    const int token = n * 8 + threadIdx.x % 32 / 4;
    uint32_t held[4];
#pragma unroll
    for (int u = 0; u < 4; ++u) held[u] = token < p.tokens && unit + u < last ? x[token * p.x_stride + unit + u] : 0;
    b[n][0] = held[0] | held[1] << 16, b[n][1] = held[2] | held[3] << 16;
  }
#pragma unroll
  for (int tile = 0; tile < 4; ++tile) {
    const auto pair = [&](int u, unsigned which) {
      const uint32_t* low = &w[u].x;
      const uint32_t* high = &w[u + 1].x;
      return __byte_perm(low[tile], high[tile], which);
    };
    const uint32_t a[4] = {pair(0, 0x5410), pair(0, 0x7632), pair(2, 0x5410), pair(2, 0x7632)};
#pragma unroll
    for (int n = 0; n < kN; ++n) {
      multiply<T>(*reinterpret_cast<float(*)[4]>(acc + (tile * kN + n) * 4), a, b[n][0], b[n][1]);
    }
  }
}

template <class T, int kN>
__device__ __forceinline__ void store_columns(const GemvColumns& p, const float (&acc)[16 * kN], int column) {
#pragma unroll
  for (int i = 0; i < 16 * kN; ++i) {
    const int tile = i / (4 * kN), n = i / 4 % kN, part = i % 4;
    const int token = n * 8 + threadIdx.x % 4 * 2 + part % 2, to = column + tile * 2 + part / 2;
    if (token >= p.tokens || to >= p.columns) continue;
    if (p.partial) {
      p.partial[(int64_t{blockIdx.y} * p.tokens + token) * p.columns + to] = acc[i];
    } else {
      static_cast<uint16_t*>(p.y)[int64_t{token} * p.columns + to] = rounded<T>(acc[i]);
    }
  }
}

template <class T, int kN>
__global__ void __launch_bounds__(kThreads, 3) columns_kernel(const __grid_constant__ GemvColumns p) {
  let_dependents_start();
  __shared__ float scratch[(kWarps - 1) * kN * 16 * 32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int column = blockIdx.x * kWide + lane / 4 * 8;
  const int first = static_cast<int>(int64_t{p.depth} * blockIdx.y / p.splits);
  const int last = static_cast<int>(int64_t{p.depth} * (blockIdx.y + 1) / p.splits);
  float acc[16 * kN] = {};
  bool waited = false;
  for (int begin = first + warp * kUnitsAhead * 16; begin < last; begin += kWarps * kUnitsAhead * 16) {
    const int unit = begin + lane % 4 * 4;
    uint4 w[kUnitsAhead][4];
#pragma unroll
    for (int i = 0; i < kUnitsAhead; ++i) load_units(p, column, unit + i * 16, last, w[i]);
    if (!waited) wait_for_previous_kernel();
    waited = true;
#pragma unroll
    for (int i = 0; i < kUnitsAhead; ++i) multiply_units<T, kN>(p, unit + i * 16, last, w[i], acc);
  }
  if (!waited) wait_for_previous_kernel();
  if (sum_over_warps(acc, scratch)) store_columns<T, kN>(p, acc, column);
}

// y[i] = sum over s of partial[s, i], in the order of s: the same input gives the same bits.
template <class T>
__global__ void __launch_bounds__(128) reduce_kernel(const float* partial, uint16_t* y, int size, int splits) {
  wait_for_previous_kernel();
  const int at = blockIdx.x * 128 + threadIdx.x;
  if (at >= size) return;
  float total = 0;
#pragma unroll 8
  for (int s = 0; s < splits; ++s) total += partial[int64_t{s} * size + at];
  y[at] = rounded<T>(total);
}

__global__ void __launch_bounds__(256) scatter_kernel(const Scatter p) {
  let_dependents_start();
  const int at = blockIdx.x * 256 + threadIdx.x, token = blockIdx.y;
  if (at >= p.count) return;
  static_cast<uint16_t*>(p.y)[token * p.y_stride + p.rows[at]] = static_cast<const uint16_t*>(p.x)[token * p.x_stride + at];
}

// ---------------------------------------------------------------------------------------------------------------- host

template <class Kernel, class... Arguments>
void launch(Kernel* kernel, dim3 grid, int threads, int shared, void* stream, bool dependent, Arguments... arguments) {
  if (shared > 48 << 10) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared), "shared memory");
  }
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &early;
  config.numAttrs = dependent ? 1 : 0;
  check(cudaLaunchKernelEx(&config, kernel, arguments...), "launch");
}

template <class T, int kN>
void launch_rows(const GemvRows& job, void* stream, bool dependent) {
  const int tile = job.pair ? kTile / 2 : kTile;
  const dim3 grid((job.width + tile - 1) / tile);
  const auto kernel = job.pair   ? rows_kernel<T, kN, Kind::kPair>
                      : job.mask ? rows_kernel<T, kN, Kind::kMasked>
                                 : rows_kernel<T, kN, Kind::kPlain>;
  launch(kernel, grid, kThreads, 0, stream, dependent, job);
}

template <class T, int kN>
void launch_columns(const GemvColumns& job, void* stream, bool dependent) {
  const dim3 grid((job.columns + kWide - 1) / kWide, job.splits);
  launch(columns_kernel<T, kN>, grid, kThreads, 0, stream, dependent, job);
  if (!job.partial) return;
  const int size = job.tokens * job.columns;
  launch(reduce_kernel<T>, dim3((size + 127) / 128), 128, 0, stream, true, static_cast<const float*>(job.partial),
         static_cast<uint16_t*>(job.y), size, job.splits);
}

}  // namespace

int gemv_splits(int tokens, int depth, int columns, int device) {
  const int slices = (columns + kWide - 1) / kWide, wanted = multiprocessors(device) * 5;
  const int most = (depth + kWarps * kUnitsAhead * 16 - 1) / (kWarps * kUnitsAhead * 16);
  (void)tokens;
  return std::max(1, std::min(wanted / slices, most));
}

void gemv_rows(const GemvRows& job, int device, void* stream, bool dependent) {
  const DeviceScope scope(device);
  if (job.tokens <= 8) {
    job.half ? launch_rows<Fp16, 1>(job, stream, dependent) : launch_rows<Bf16, 1>(job, stream, dependent);
  } else {
    job.half ? launch_rows<Fp16, 2>(job, stream, dependent) : launch_rows<Bf16, 2>(job, stream, dependent);
  }
}

void gemv_columns(const GemvColumns& job, int device, void* stream, bool dependent) {
  const DeviceScope scope(device);
  if (job.tokens <= 8) {
    job.half ? launch_columns<Fp16, 1>(job, stream, dependent) : launch_columns<Bf16, 1>(job, stream, dependent);
  } else {
    job.half ? launch_columns<Fp16, 2>(job, stream, dependent) : launch_columns<Bf16, 2>(job, stream, dependent);
  }
}

void gemv_scatter(const Scatter& job, int device, void* stream) {
  const DeviceScope scope(device);
  launch(scatter_kernel, dim3((job.count + 255) / 256, job.tokens), 256, 0, stream, false, job);
}

}  // namespace ppf
