// Products of many tokens with listed weight rows, on Hopper's matrix units: plain C++ interface, no torch, no Python.
#pragma once

#include <cstdint>

namespace ppf {

// y[t, n] = sum_k x[t, k] · w[row(n), k], 16-bit elements, fp32 sums; with `pair` silu(y of w) · (y of pair).
// Addresses and row pitches (bytes) are multiples of 16.
struct TileJob {
  const void* x;        // [tokens, depth], depth a multiple of 8
  const void* weight;   // [., depth or more]
  const void* pair;     // a second weight like it, or nullptr
  void* y;              // [tokens, width]
  const int32_t* rows;  // [width] listed rows, nullptr for the first ones
  int64_t x_pitch, weight_pitch, pair_pitch;
  int tokens, width, depth;
  bool half;  // float16, else bfloat16
};

// One launch on `stream`; nothing is allocated or synchronised. `wide` is the number of weight rows (gate and up count
// twice) of a tile, 0 = automatic. Throws std::runtime_error.
void tile_product(const TileJob& job, int device, void* stream, int wide);

}  // namespace ppf
