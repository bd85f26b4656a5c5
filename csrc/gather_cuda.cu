// The channel gather on the device: any number of tensors in one launch, their descriptors passed by value.
//
// Two kernels share the launch code:
// * `copy_kernel` moves pieces of 16 bytes (less where something is misaligned), four loads in flight per thread. It
//   serves row gathers and columns in aligned blocks (heads, prefixes), and reads kept bytes only. A block is small and
//   soon over, a row of a Llama each: so many come and go that loads and stores mix evenly over the whole chip. Bulk
//   copies through shared memory, and larger blocks, are slower (dev/LOG.md).
// * `staged_kernel` serves scattered columns. A 2-byte pick costs a 32-byte sector, so at the usual densities whole
//   source rows are read anyway: they are copied to a ring in shared memory in 16-byte pieces while earlier rows are
//   picked there. A thread makes the same picks in every row of its tile, so it holds their positions in registers.
#include <cuda_pipeline_primitives.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>

#include "device.cuh"
#include "gather.h"

namespace ppf {
namespace {

constexpr int kCopyThreads = 128;
constexpr int kUnroll = 4;
// Kernel parameters hold 32,764 bytes from CUDA 12.1 on, 4 KiB before.
constexpr int kJobs = CUDART_VERSION >= 12010 ? 400 : 48;
constexpr int kFewJobs = 4;
constexpr int64_t kTileBytes = 8 << 10;
// With hundreds of jobs a block has to find its own first, which larger tiles share.
constexpr int64_t kManyJobsTileBytes = 64 << 10;
constexpr int kStagedThreads = 512;
// Few, so that blocks start and end at different times: some load while others pick, to the last row.
constexpr int kStagedTileRows = 4;
constexpr int64_t kSector = 32;

struct Job {
  const char* source;
  char* target;
  const int32_t* index;
  int64_t source_stride, target_stride;  // bytes
  int32_t rows;                          // of the result
  int32_t pieces;                        // copy: accesses per row; staged: kept columns
  int32_t row_bytes;                     // staged: bytes of a source row
  int32_t first_tile, tile_rows;
  int16_t width;  // bytes of an access (copy) or an element (staged)
  int8_t dim;
  int8_t step;  // copy along dim 1: index entries per piece
};

template <int N>
struct Jobs {
  int count;
  Job job[N];
};
static_assert(sizeof(Jobs<kJobs>) <= (kJobs > 48 ? 32764 : 4096), "descriptors exceed the parameter space");

// The job of this block: the last one whose first tile is not beyond it.
template <int N>
__device__ const Job& find_job(const Jobs<N>& jobs) {
  int low = 0, high = jobs.count - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (jobs.job[middle].first_tile <= static_cast<int>(blockIdx.x)) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return jobs.job[low];
}

template <class Piece, bool kByRow>
__device__ void copy_tile(const Job& job, int first, int last) {
  const int pieces = job.pieces, step = job.step;
  // Threads that share a row: short rows are copied several at a time.
  const int across = pieces > 64 ? kCopyThreads : pieces > 32 ? 64 : 32;
  const int32_t* __restrict__ index = job.index;
  for (int row = first + threadIdx.x / across; row < last; row += kCopyThreads / across) {
    const int64_t from = kByRow ? __ldg(index + row) : row;
    const Piece* source = reinterpret_cast<const Piece*>(job.source + from * job.source_stride);
    Piece* target = reinterpret_cast<Piece*>(job.target + row * job.target_stride);
    for (int base = threadIdx.x % across; base < pieces; base += across * kUnroll) {
      Piece held[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int piece = base + across * u;
        if (piece < pieces) {
          held[u] = __ldcs(source + (kByRow ? piece : __ldg(index + static_cast<int64_t>(piece) * step) / step));
        }
      }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        if (base + across * u < pieces) __stcs(target + base + across * u, held[u]);
      }
    }
  }
}

template <bool kByRow>
__device__ void copy_tile_of_width(const Job& job, int first, int last) {
  switch (job.width) {
    case 16: return copy_tile<uint4, kByRow>(job, first, last);
    case 8: return copy_tile<uint2, kByRow>(job, first, last);
    case 4: return copy_tile<unsigned, kByRow>(job, first, last);
    default: return copy_tile<unsigned short, kByRow>(job, first, last);
  }
}

template <int N>
__global__ void __launch_bounds__(kCopyThreads) copy_kernel(const __grid_constant__ Jobs<N> jobs) {
  const Job& job = find_job(jobs);
  const int first = (static_cast<int>(blockIdx.x) - job.first_tile) * job.tile_rows;
  const int last = min(job.rows, first + job.tile_rows);
  if (job.dim == 0) {
    copy_tile_of_width<true>(job, first, last);
  } else {
    copy_tile_of_width<false>(job, first, last);
  }
}

// A row may start anywhere within a 16-byte line; in the ring it keeps that position, so that lines stay lines.
__host__ __device__ constexpr int ring_pitch(int row_bytes) { return (row_bytes + 15 + 15) / 16 * 16; }

__device__ int line_offset(const void* address) { return static_cast<int>(reinterpret_cast<uintptr_t>(address) % 16); }

template <class Element>
__device__ void load_row(char* stage, const char* row, int row_bytes) {
  char* target = stage + line_offset(row);
  const int head = min((16 - line_offset(row)) % 16, row_bytes);
  const int lines = (row_bytes - head) / 16, tail = head + lines * 16;
  for (int line = threadIdx.x; line < lines; line += kStagedThreads) {
    __pipeline_memcpy_async(target + head + line * 16, row + head + line * 16, 16);
  }
  const int at = threadIdx.x * static_cast<int>(sizeof(Element));
  if (at < head) *reinterpret_cast<Element*>(target + at) = *reinterpret_cast<const Element*>(row + at);
  if (tail + at < row_bytes) {
    *reinterpret_cast<Element*>(target + tail + at) = *reinterpret_cast<const Element*>(row + tail + at);
  }
}

// The picks of one thread: two neighbouring results per slot, their source columns as two 16-bit numbers. Lanes take
// neighbouring pairs, so that increasing lists meet few bank conflicts and a warp writes whole lines.
template <int kSlots>
struct Picks {
  unsigned columns[kSlots];
  int count;

  __device__ Picks(const int32_t* __restrict__ index, int count) : count(count) {
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
      const int at = result(slot);
      const unsigned low = at < count ? __ldg(index + at) : 0, high = at + 1 < count ? __ldg(index + at + 1) : 0;
      columns[slot] = low | high << 16;
    }
  }

  __device__ int result(int slot) const { return 2 * (slot * kStagedThreads + static_cast<int>(threadIdx.x)); }

  __device__ void row(unsigned short* target, const unsigned short* stage) const {
    const bool pairs = reinterpret_cast<uintptr_t>(target) % 4 == 0;
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
      const int at = result(slot);
      if (at >= count) break;
      const unsigned low = stage[columns[slot] & 0xffff], high = stage[columns[slot] >> 16];
      if (pairs && at + 1 < count) {
        *reinterpret_cast<unsigned*>(target + at) = low | high << 16;
      } else {
        target[at] = static_cast<unsigned short>(low);
        if (at + 1 < count) target[at + 1] = static_cast<unsigned short>(high);
      }
    }
  }

  __device__ void row(unsigned* target, const unsigned* stage) const {
    const bool pairs = reinterpret_cast<uintptr_t>(target) % 8 == 0;
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
      const int at = result(slot);
      if (at >= count) break;
      const uint2 both = make_uint2(stage[columns[slot] & 0xffff], stage[columns[slot] >> 16]);
      if (pairs && at + 1 < count) {
        *reinterpret_cast<uint2*>(target + at) = both;
      } else {
        target[at] = both.x;
        if (at + 1 < count) target[at + 1] = both.y;
      }
    }
  }
};

template <class Element, int kStages, int kSlots>
__device__ void staged_tile(const Job& job, int first, int last, char* ring) {
  const int pitch = ring_pitch(job.row_bytes);
  const char* source = job.source;
  for (int row = first; row < first + kStages - 1; ++row) {
    if (row < last) load_row<Element>(ring + (row - first) * pitch, source + row * job.source_stride, job.row_bytes);
    __pipeline_commit();
  }
  const Picks<kSlots> picks(job.index, job.pieces);
  for (int row = first; row < last; ++row) {
    __pipeline_wait_prior(kStages - 2);
    __syncthreads();  // row has arrived for every thread, and the stage refilled below was picked by every thread
    const int next = row + kStages - 1;
    if (next < last) {
      load_row<Element>(ring + (next - first) % kStages * pitch, source + next * job.source_stride, job.row_bytes);
    }
    __pipeline_commit();
    const char* stage = ring + (row - first) % kStages * pitch + line_offset(source + row * job.source_stride);
    Element* target = reinterpret_cast<Element*>(job.target + row * job.target_stride);
    picks.row(target, reinterpret_cast<const Element*>(stage));
  }
}

// The fewer positions a thread holds, the more blocks fit a multiprocessor.
constexpr int staged_blocks(int slots) { return slots <= 8 ? 3 : slots <= 16 ? 2 : 1; }

template <int N, int kStages, int kSlots>
__global__ void __launch_bounds__(kStagedThreads, staged_blocks(kSlots))
    staged_kernel(const __grid_constant__ Jobs<N> jobs) {
  extern __shared__ __align__(16) char ring[];
  const Job& job = find_job(jobs);
  const int first = (static_cast<int>(blockIdx.x) - job.first_tile) * job.tile_rows;
  const int last = min(job.rows, first + job.tile_rows);
  if (job.width == 2) {
    staged_tile<unsigned short, kStages, kSlots>(job, first, last, ring);
  } else {
    staged_tile<unsigned, kStages, kSlots>(job, first, last, ring);
  }
}

// The widest access that divides addresses, strides and row lengths alike.
int access_width(const GatherJob& job, int64_t target_row_bytes) {
  const int64_t size = job.element_size;
  uint64_t all = reinterpret_cast<uint64_t>(job.source) | reinterpret_cast<uint64_t>(job.target) | 16;
  all |= job.source_stride * size | job.target_stride * size | target_row_bytes;
  if (job.dim == 1) all |= job.unit * size;
  return static_cast<int>(all & (~all + 1));
}

constexpr int kMaxSlots = 32;
constexpr int kMaxPicks = 2 * kStagedThreads * kMaxSlots;

struct Plan {
  std::vector<Job> copies, staged;
};

void add_job(Plan& plan, const GatherJob& job, int64_t shared_limit, int64_t tile_bytes) {
  const int64_t size = job.element_size, kept = job.dim == 0 ? job.columns : job.count;
  const int width = access_width(job, kept * size);
  Job out{};
  out.source = static_cast<const char*>(job.source);
  out.target = static_cast<char*>(job.target);
  out.index = static_cast<const int32_t*>(job.index);
  out.source_stride = job.source_stride * size;
  out.target_stride = job.target_stride * size;
  out.rows = static_cast<int32_t>(job.dim == 0 ? job.count : job.rows);
  out.dim = static_cast<int8_t>(job.dim);
  out.tile_rows = kStagedTileRows;
  if (job.dim == 1 && width < 16) {
    out.pieces = static_cast<int32_t>(job.count);
    out.width = static_cast<int16_t>(size);
    // Staging reads every row whole: not for selections so thin that their sectors are fewer bytes.
    const bool dense = job.count * kSector >= job.columns * size;
    if (dense && job.columns <= 65536 && job.count <= kMaxPicks) {
      out.row_bytes = static_cast<int32_t>(job.columns * size);
      if (2 * ring_pitch(out.row_bytes) <= shared_limit) return plan.staged.push_back(out);
    }
  }
  out.width = static_cast<int16_t>(width);
  out.step = static_cast<int8_t>(job.dim == 0 ? 1 : width / size);
  out.pieces = static_cast<int32_t>(kept * size / width);
  out.tile_rows = static_cast<int32_t>(std::max<int64_t>(tile_bytes / (kept * size), 1));
  plan.copies.push_back(out);
}

template <int N, class Launch>
void launch_chunks(const std::vector<Job>& all, const Launch& launch) {
  for (size_t at = 0; at < all.size(); at += N) {
    Jobs<N> jobs;
    jobs.count = static_cast<int>(std::min<size_t>(N, all.size() - at));
    int64_t tiles = 0;
    for (int i = 0; i < jobs.count; ++i) {
      jobs.job[i] = all[at + i];
      jobs.job[i].first_tile = static_cast<int32_t>(tiles);
      tiles += (jobs.job[i].rows + jobs.job[i].tile_rows - 1) / jobs.job[i].tile_rows;
    }
    if (tiles > 0x7fffffff) throw std::runtime_error("gather: more than 2^31 tiles in one call; split the call");
    launch(jobs, static_cast<unsigned>(tiles));
    check(cudaGetLastError(), "launch");
  }
}

template <int N>
void launch_copies(const std::vector<Job>& jobs, cudaStream_t stream) {
  launch_chunks<N>(jobs, [&](const Jobs<N>& chunk, unsigned tiles) {
    copy_kernel<N><<<tiles, kCopyThreads, 0, stream>>>(chunk);
  });
}

int most_row_bytes(const std::vector<Job>& jobs) {
  int bytes = 0;
  for (const Job& job : jobs) bytes = std::max(bytes, job.row_bytes);
  return bytes;
}

template <int N, int kStages, int kSlots>
class Staged {
 public:
  Staged(const std::vector<Job>& jobs, int64_t shared_limit)
      : bytes_(int64_t{kStages} * ring_pitch(most_row_bytes(jobs))) {
    if (bytes_ > shared_limit) return;
    check(cudaFuncSetAttribute(kernel_, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes_)), "ring");
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident_, kernel_, kStagedThreads, bytes_), "occupancy");
  }

  // Rows on their way to a multiprocessor while each of its blocks picks one.
  int rows_in_flight() const { return resident_ * (kStages - 1); }

  void launch(const std::vector<Job>& jobs, cudaStream_t stream) const {
    launch_chunks<N>(jobs, [&](const Jobs<N>& chunk, unsigned tiles) {
      kernel_<<<tiles, kStagedThreads, bytes_, stream>>>(chunk);
    });
  }

 private:
  static constexpr auto kernel_ = staged_kernel<N, kStages, kSlots>;
  int64_t bytes_;
  int resident_ = 0;
};

template <int N, int kSlots>
void launch_staged(const std::vector<Job>& jobs, int64_t limit, cudaStream_t stream, int stages) {
  const Staged<N, 2, kSlots> two(jobs, limit);
  const Staged<N, 3, kSlots> three(jobs, limit);
  const bool deep = stages == 3 || (stages == 0 && three.rows_in_flight() >= two.rows_in_flight());
  deep && three.rows_in_flight() > 0 ? three.launch(jobs, stream) : two.launch(jobs, stream);
}

template <int N>
void launch_staged(const std::vector<Job>& jobs, int64_t limit, cudaStream_t stream, int stages) {
  int picks = 0;
  for (const Job& job : jobs) picks = std::max(picks, job.pieces);
  const int slots = (picks + 2 * kStagedThreads - 1) / (2 * kStagedThreads);
  if (slots <= 8) return launch_staged<N, 8>(jobs, limit, stream, stages);
  if (slots <= 16) return launch_staged<N, 16>(jobs, limit, stream, stages);
  launch_staged<N, kMaxSlots>(jobs, limit, stream, stages);
}

}  // namespace

void gather_cuda(const std::vector<GatherJob>& jobs, int device, void* stream_address, int stages) {
  const DeviceScope scope(device);
  const auto stream = static_cast<cudaStream_t>(stream_address);
  const int64_t limit = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  const int64_t tile_bytes = jobs.size() > kFewJobs ? kManyJobsTileBytes : kTileBytes;
  Plan plan;
  for (const GatherJob& job : jobs) {
    if (job.rows > 0 && job.columns > 0 && job.count > 0) add_job(plan, job, limit, tile_bytes);
  }
  if (plan.copies.size() > kFewJobs) {
    launch_copies<kJobs>(plan.copies, stream);
  } else {
    launch_copies<kFewJobs>(plan.copies, stream);
  }
  if (plan.staged.empty()) return;
  if (plan.staged.size() > kFewJobs) {
    launch_staged<kJobs>(plan.staged, limit, stream, stages);
  } else {
    launch_staged<kFewJobs>(plan.staged, limit, stream, stages);
  }
}

const char* cuda_problem(int device) {
  try {
    const DeviceScope scope(device);
    cudaFuncAttributes found;
    const cudaError_t error = cudaFuncGetAttributes(&found, copy_kernel<kFewJobs>);
    cudaGetLastError();  // a missing image is our answer, not the next launch's error
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
  } catch (const std::runtime_error&) {
    const cudaError_t error = cudaGetLastError();
    return cudaGetErrorString(error == cudaSuccess ? cudaErrorUnknown : error);
  }
}

}  // namespace ppf
