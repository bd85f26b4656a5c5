// The channel gather: plain C++ interface, no torch, no Python.
//
// Every tensor is a matrix of 2- or 4-byte elements whose rows are contiguous and lie `stride` elements apart.
// An index list names rows or columns of the source, in any order, with repetitions.
#pragma once

#include <cstdint>

namespace ppf {

// The instruction set the CPU gather uses on this machine: "avx512-vbmi2", "avx2" or "scalar".
const char* simd_level();

}  // namespace ppf
