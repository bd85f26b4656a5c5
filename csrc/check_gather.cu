// A program of its own for compute-sanitizer: every path of the CUDA gather on exactly sized memory, against the host.
//   cd csrc; nvcc -arch=native -std=c++17 -DPPF_WITH_CUDA check_gather.cu gather_cuda.cu index.cpp -o check_gather
//   for tool in memcheck racecheck initcheck; do compute-sanitizer --tool $tool --error-exitcode 1 ./check_gather; done
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "gather.h"

namespace {

void check(cudaError_t error) {
  if (error == cudaSuccess) return;
  std::printf("CUDA error: %s\n", cudaGetErrorString(error));
  std::exit(1);
}

std::mt19937 random_bits(0);

template <class T>
T* upload(const std::vector<T>& host) {
  T* device = nullptr;
  check(cudaMalloc(&device, std::max<size_t>(1, host.size()) * sizeof(T)));
  check(cudaMemcpy(device, host.data(), host.size() * sizeof(T), cudaMemcpyHostToDevice));
  return device;
}

std::vector<int64_t> make_list(int kind, int64_t size) {
  std::vector<int64_t> all(size), out;
  for (int64_t i = 0; i < size; ++i) all[i] = i;
  if (kind == 0) std::shuffle(all.begin(), all.end(), random_bits), all.resize((size + 1) / 2);
  if (kind == 1) all.resize(size / 3);
  if (kind == 2) all.insert(all.end(), all.begin(), all.begin() + size / 2);
  if (kind == 3) all.resize(std::min<int64_t>(size, 3)), std::reverse(all.begin(), all.end());
  if (kind == 4) {
    for (int64_t i = 0; i + 8 <= size; i += 16) out.insert(out.end(), all.begin() + i, all.begin() + i + 8);
    return out;
  }
  return all;
}

// A job, the memory it owns, and what it should produce.
template <class T>
struct Case {
  std::vector<T> source, expected;
  std::vector<void*> memory;
  ppf::GatherJob job{};

  Case(int64_t rows, int64_t columns, int64_t stride, int shift, int dim, int kind) : source(shift + rows * stride) {
    for (T& value : source) value = static_cast<T>(random_bits());
    const auto list = make_list(kind, dim == 0 ? rows : columns);
    const int64_t count = static_cast<int64_t>(list.size());
    std::vector<int32_t> packed(count);
    const int unit = ppf::pack_index("list", list.data(), 8, count, dim == 0 ? rows : columns, packed.data());
    for (int64_t r = 0; r < (dim == 0 ? count : rows); ++r) {
      for (int64_t c = 0; c < (dim == 0 ? columns : count); ++c) {
        expected.push_back(source[shift + (dim == 0 ? list[r] : r) * stride + (dim == 0 ? c : list[c])]);
      }
    }
    T* x = upload(source);
    T* out = nullptr;
    check(cudaMalloc(&out, std::max<size_t>(1, expected.size()) * sizeof(T)));
    int32_t* index = upload(packed);
    memory = {x, out, index};
    job = {x + shift, out, index, stride, 0, rows, columns, count, int(sizeof(T)), dim, 4, unit};
    job.target_stride = dim == 0 ? columns : count;
  }

  bool right() const {
    std::vector<T> found(expected.size());
    check(cudaMemcpy(found.data(), job.target, found.size() * sizeof(T), cudaMemcpyDeviceToHost));
    return found == expected;
  }
};

template <class T>
int run_all() {
  int wrong = 0;
  const int64_t shapes[][2] = {{1, 1}, {3, 40}, {37, 131}, {70, 1024}, {19, 4103}, {5, 23003}};
  for (const int stages : {0, 2, 3}) {
    std::vector<Case<T>> cases;
    for (const auto& shape : shapes) {
      for (int variant = 0; variant < 20; ++variant) {
        const int64_t stride = shape[1] + (variant / 10 == 0 ? 0 : 5);
        cases.emplace_back(shape[0], shape[1], stride, variant / 10 == 0 ? 0 : 1, variant % 2, variant / 2 % 5);
      }
    }
    std::vector<ppf::GatherJob> jobs;
    for (const auto& one : cases) jobs.push_back(one.job);
    ppf::gather_cuda(jobs, 0, nullptr, stages);                                   // all in one launch
    for (const auto& one : cases) {
      wrong += !one.right();
      check(cudaMemset(one.job.target, 0x5a, one.expected.size() * sizeof(T)));
    }
    for (const auto& job : jobs) ppf::gather_cuda(std::vector<ppf::GatherJob>{job}, 0, nullptr, stages);  // one by one
    check(cudaDeviceSynchronize());
    for (const auto& one : cases) wrong += !one.right();
    for (auto& one : cases) {
      for (void* memory : one.memory) check(cudaFree(memory));
    }
  }
  return wrong;
}

}  // namespace

int main() {
  if (const char* problem = ppf::cuda_problem(0)) {
    std::printf("no gather on this device: %s\n", problem);
    return 1;
  }
  const int wrong = run_all<uint16_t>() + run_all<uint32_t>();
  std::printf("%s: %d wrong results\n", wrong ? "FAILED" : "passed", wrong);
  return wrong != 0;
}
