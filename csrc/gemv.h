// Products of 1 to 16 tokens with kept weight rows or columns: plain C++ interface, no torch, no Python.
#pragma once

#include <cstdint>

namespace ppf {

// y[t, n] = sum_k x[t, k] · w[row(n), column(k)], 16-bit elements, fp32 sums; with `pair` silu(y of w) · (y of pair).
// Addresses and row pitches (bytes) of x and of the weights are multiples of 16, `depth` is one of 8.
struct GemvRows {
  const void* x;         // [tokens, depth]
  const void* weight;    // [., depth or more]
  const void* pair;      // a second weight of the same shape, or nullptr
  void* y;               // [tokens, y_stride]
  const int32_t* rows;   // [width] kept rows, nullptr for the first `width`
  const uint16_t* mask;  // nullptr, or [depth] all ones where a column counts, else zero: what others hold is not used
  const int32_t* blocks; // nullptr, or [depth / 64] blocks of 64 columns of the weight that x's columns stand for
  int64_t x_pitch, weight_pitch, pair_pitch, y_stride;
  int tokens, width, depth;
  bool scatter;  // output n goes to column rows[n] of y instead of n
  bool half;     // float16, else bfloat16
};

// y[t, n] = sum_k x[t, k] · w[unit(k), n]: the weight is held transposed, a kept unit is one contiguous row of it.
// Address and row pitch of the weight are multiples of 16 bytes, `columns` is one of 8.
struct GemvColumns {
  const void* x;        // [tokens, x_stride]
  const void* weight;   // [., columns]
  void* y;              // [tokens, columns]
  float* partial;       // [splits, tokens, columns], nullptr if splits is 1
  const int32_t* rows;  // [depth] kept units, nullptr for the first `depth`
  int64_t x_stride, weight_pitch;
  int tokens, depth, columns, splits;
  bool half;
};

// y[t, rows[i]] = x[t, i] for i < count; the rest of y stays as it is. Strides in elements.
struct Scatter {
  const void* x;
  void* y;
  const int32_t* rows;
  int64_t x_stride, y_stride;
  int tokens, count;
};

// How many ways gemv_columns should split the kept units on this device.
int gemv_splits(int tokens, int depth, int columns, int device);

// `dependent`: the previous launch on the stream was one of these kernels, whose end this one may await by itself,
// fetching weights meanwhile. Nothing is allocated or synchronised. Both throw std::runtime_error.
void gemv_rows(const GemvRows& job, int device, void* stream, bool dependent);
void gemv_columns(const GemvColumns& job, int device, void* stream, bool dependent);
void gemv_scatter(const Scatter& job, int device, void* stream);

}  // namespace ppf
