// The channel gather: plain C++ interface, no torch, no Python.
#pragma once

#include <cstdint>
#include <vector>

namespace ppf {

// One matrix to gather from: rows of 2- or 4-byte elements, contiguous within a row, rows `*_stride` elements apart.
struct GatherJob {
  const void* source;  // [rows, columns]
  void* target;        // dim 0: [count, columns], dim 1: [rows, count]
  const void* index;   // `count` integers, any order, repetitions allowed
  int64_t source_stride, target_stride;
  int64_t rows, columns, count;
  int element_size;  // 2 or 4 bytes
  int dim;           // 0 picks rows, 1 picks columns
  int index_size;    // 4 or 8 bytes (CUDA: 4)
  int unit;          // CUDA, dim 1: what pack_index returned
};

// Copies an index list to int32 and throws std::out_of_range, naming position, value and limit, if an entry lies
// outside [0, limit). Returns the largest unit in {8, 4, 2, 1} for which the list consists of whole aligned blocks of
// `unit` consecutive channels: with unit 8 the columns can be moved in 16-byte pieces.
int pack_index(const char* name, const void* index, int index_size, int64_t count, int64_t limit, int32_t* packed);

// Host memory to host memory on up to `threads` threads. The index list is checked before anything is written.
void gather_cpu(const GatherJob& job, const char* index_name, int threads);

// The instruction set that gather_cpu uses here: "avx512-vbmi2" or "scalar" (streaming stores are part of x86-64).
const char* simd_level();

#ifdef PPF_WITH_CUDA
// Device memory to device memory on `stream`: all jobs in one launch, two if some need staging, more beyond hundreds.
// Index lists are int32 on the device and were checked by pack_index; nothing is allocated or synchronised.
// `stages` is the depth of the column gather's ring of rows, 2 or 3 (0 = automatic). Throws std::runtime_error.
void gather_cuda(const std::vector<GatherJob>& jobs, int device, void* stream, int stages);

// Why the kernels cannot run on `device` (no machine code for it, driver too old), or nullptr if they can.
const char* cuda_problem(int device);
#endif

}  // namespace ppf
