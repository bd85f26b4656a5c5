// A program of its own for compute-sanitizer: both forms of the native products on exactly sized memory, against the
// host. What is pruned holds NaN.
//   cd csrc; nvcc -gencode=arch=compute_90a,code=sm_90a -std=c++17 check_products.cu tiles_cuda.cu -o check_products
//   for tool in memcheck racecheck initcheck; do compute-sanitizer --tool $tool --error-exitcode 1 ./check_products; done
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "tiles.h"

namespace {

using Bits = std::vector<uint16_t>;  // bfloat16

void check(cudaError_t error) {
  if (error == cudaSuccess) return;
  std::printf("CUDA error: %s\n", cudaGetErrorString(error));
  std::exit(1);
}

std::mt19937 generator(0);

double value(uint16_t bits) {
  const uint32_t wide = uint32_t{bits} << 16;
  float out;
  std::memcpy(&out, &wide, 4);
  return out;
}

Bits random_bits(int64_t count) {
  std::uniform_real_distribution<float> uniform(-1, 1);
  Bits out(count);
  for (uint16_t& bits : out) {
    const float drawn = uniform(generator);
    uint32_t wide;
    std::memcpy(&wide, &drawn, 4);
    bits = static_cast<uint16_t>(wide >> 16);
  }
  return out;
}

std::vector<int32_t> some_of(int total, int count) {
  std::vector<int32_t> all(total);
  for (int i = 0; i < total; ++i) all[i] = i;
  std::shuffle(all.begin(), all.end(), generator);
  all.resize(count);
  return all;
}

template <class T>
T* upload(const std::vector<T>& host) {
  T* device = nullptr;
  check(cudaMalloc(&device, std::max<size_t>(1, host.size()) * sizeof(T)));
  check(cudaMemcpy(device, host.data(), host.size() * sizeof(T), cudaMemcpyHostToDevice));
  return device;
}

Bits download(const uint16_t* device, int64_t count) {
  Bits out(count);
  check(cudaDeviceSynchronize());
  check(cudaMemcpy(out.data(), device, count * 2, cudaMemcpyDeviceToHost));
  return out;
}

// Rows of `weight` [rows, columns] that are not listed become NaN.
Bits poisoned(Bits weight, int rows, int columns, const std::vector<int32_t>& kept) {
  for (int row = 0; row < rows; ++row) {
    if (std::find(kept.begin(), kept.end(), row) != kept.end()) continue;
    std::fill_n(weight.begin() + int64_t{row} * columns, columns, uint16_t{0x7fc0});
  }
  return weight;
}

// x [tokens, depth] times the rows `at` of weight, all columns.
std::vector<double> product(const Bits& x, const Bits& weight, int tokens, int depth, const std::vector<int32_t>& at) {
  std::vector<double> out;
  for (int t = 0; t < tokens; ++t) {
    for (const int row : at) {
      double sum = 0;
      for (int k = 0; k < depth; ++k) sum += value(x[int64_t{t} * depth + k]) * value(weight[int64_t{row} * depth + k]);
      out.push_back(sum);
    }
  }
  return out;
}

int wrong = 0;

void expect(const char* name, const Bits& found, const std::vector<double>& wanted) {
  double difference = 0, norm = 0;
  for (size_t i = 0; i < wanted.size(); ++i) {
    difference += std::pow(value(found[i]) - wanted[i], 2);
    norm += wanted[i] * wanted[i];
  }
  const bool right = std::sqrt(difference / norm) < 5e-3;  // NaN is not
  wrong += !right;
  if (!right) std::printf("%s: error %.1e\n", name, std::sqrt(difference / norm));
}

std::vector<double> silu_times(const std::vector<double>& gate, const std::vector<double>& up) {
  std::vector<double> out(gate.size());
  for (size_t i = 0; i < gate.size(); ++i) out[i] = gate[i] / (1 + std::exp(-gate[i])) * up[i];
  return out;
}

// gate and up, or one weight, with listed rows.
void run(int tokens, int rows, int depth, int count) {
  const auto kept = some_of(rows, count);
  const Bits x = random_bits(int64_t{tokens} * depth), gate = random_bits(int64_t{rows} * depth);
  const Bits up = random_bits(int64_t{rows} * depth);
  auto* index = upload(kept);
  auto* device_x = upload(x);
  auto* device_gate = upload(poisoned(gate, rows, depth, kept));
  auto* device_up = upload(poisoned(up, rows, depth, kept));
  auto* y = upload(Bits(int64_t{tokens} * count));
  const auto plain = product(x, gate, tokens, depth, kept);
  const auto both = silu_times(plain, product(x, up, tokens, depth, kept));
  for (const bool pair : {false, true}) {
    ppf::TileJob job{device_x, device_gate, pair ? device_up : nullptr, y, index,
                     depth * 2, depth * 2, depth * 2, tokens, count, depth, false};
    ppf::tile_product(job, 0, nullptr, 0);
    expect(pair ? "gate and up" : "outputs", download(y, int64_t{tokens} * count), pair ? both : plain);
  }
  for (void* memory : {(void*)index, (void*)device_x, (void*)device_gate, (void*)device_up, (void*)y}) {
    check(cudaFree(memory));
  }
}

}  // namespace

int main() {
  for (const int tokens : {1, 5, 16, 150}) {
    run(tokens, 300, 136, 152);
    run(tokens, 40, 512, 33);
    run(tokens, 700, 72, 696);
  }
  std::printf("%s: %d wrong results\n", wrong ? "FAILED" : "passed", wrong);
  return wrong != 0;
}
