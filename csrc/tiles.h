// Products of many tokens with listed weight rows, on Hopper's matrix units: plain C++ interface, no torch, no Python.
#pragma once

#include <cstdint>

namespace ppf {

// 16-bit elements, fp32 sums; addresses and row pitches (bytes) are multiples of 16. What the weight's rows are:
// outputs (over_units false): y[t, n] = sum_k x[t, k] · w[row(n), column(k)], with `pair` silu(y of w) · (y of pair);
// units (over_units true): y[t, n] = sum_k x[t, k] · w[row(k), n], the weight being held transposed.
struct TileJob {
  const void* x;          // [tokens, depth], depth a multiple of 8
  const void* weight;     // [., depth or more], or [., width] with width a multiple of 8
  const void* pair;       // a second weight like it, or nullptr
  void* y;                // [tokens, width]
  const int32_t* rows;    // [width] or, over units, [depth] listed rows; nullptr for the first ones
  const int32_t* blocks;  // nullptr, or [depth / 64] blocks of 64 columns of the weight that x's columns stand for
  int64_t x_pitch, weight_pitch, pair_pitch;
  int tokens, width, depth;
  bool over_units;
  bool half;  // float16, else bfloat16
};

// One launch on `stream`; nothing is allocated or synchronised. `wide` is the number of weight rows (gate and up count
// twice) of a tile, 0 = automatic. Throws std::runtime_error.
void tile_product(const TileJob& job, int device, void* stream, int wide);

// Why tile_product cannot run on `device`, or nullptr if it can.
const char* tiles_problem(int device);

}  // namespace ppf
