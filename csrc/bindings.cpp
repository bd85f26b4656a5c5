// pybind11 only: Python passes addresses, sizes and the stream; nothing is allocated or synchronised here.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <sstream>
#include <string>
#include <vector>

#include "gather.h"

namespace py = pybind11;

namespace {

py::dict build_info() {
  py::dict info;
  info["version"] = PPF_VERSION;
  info["compiler"] = __VERSION__;
  info["simd"] = ppf::simd_level();
  std::string cuda = PPF_CUDA_VERSION;
  info["cuda"] = cuda.empty() ? py::object(py::none()) : py::object(py::str(cuda));
  std::vector<std::string> archs;
  std::istringstream list(PPF_CUDA_CODE);
  for (std::string arch; std::getline(list, arch, ',');) archs.push_back(arch);
  info["archs"] = archs;
  return info;
}

// source, target, index, source_stride, target_stride, rows, columns, count, element_size, dim, index_size, unit
using Fields = std::array<int64_t, 12>;

void* address(int64_t value) { return reinterpret_cast<void*>(static_cast<uintptr_t>(value)); }

ppf::GatherJob to_job(const Fields& f) {
  ppf::GatherJob job{};
  job.source = address(f[0]);
  job.target = address(f[1]);
  job.index = address(f[2]);
  job.source_stride = f[3];
  job.target_stride = f[4];
  job.rows = f[5];
  job.columns = f[6];
  job.count = f[7];
  job.element_size = static_cast<int>(f[8]);
  job.dim = static_cast<int>(f[9]);
  job.index_size = static_cast<int>(f[10]);
  job.unit = static_cast<int>(f[11]);
  return job;
}

int pack_index(const std::string& name, uintptr_t index, int index_size, int64_t count, int64_t limit,
               uintptr_t packed) {
  const py::gil_scoped_release unlocked;
  const auto* list = reinterpret_cast<const void*>(index);
  return ppf::pack_index(name.c_str(), list, index_size, count, limit, reinterpret_cast<int32_t*>(packed));
}

void gather_cpu(const Fields& fields, const std::string& index_name, int threads) {
  const py::gil_scoped_release unlocked;
  ppf::gather_cpu(to_job(fields), index_name.c_str(), threads);
}

#ifdef PPF_WITH_CUDA
void gather_cuda(const std::vector<Fields>& all, int device, uintptr_t stream, int stages) {
  const py::gil_scoped_release unlocked;
  std::vector<ppf::GatherJob> jobs;
  jobs.reserve(all.size());
  for (const Fields& fields : all) jobs.push_back(to_job(fields));
  ppf::gather_cuda(jobs, device, reinterpret_cast<void*>(stream), stages);
}
#endif

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native kernels of PPF. Takes raw addresses: call them through ppf.fast.ops, which checks every argument.";
  m.def("build_info", &build_info, "What this module was compiled for: version, compiler, simd, cuda, archs.");
  m.def("pack_index", &pack_index, "Checks an index list and copies it to int32; returns its unit (8, 4, 2 or 1).");
  m.def("gather_cpu", &gather_cpu, "One gather in host memory; checks the index list first.");
#ifdef PPF_WITH_CUDA
  m.def("gather_cuda", &gather_cuda, "Any number of gathers in device memory, on a stream, without synchronisation.");
  m.def("cuda_problem", &ppf::cuda_problem, "Why the CUDA kernels cannot run on a device, or None.");
#endif
}
