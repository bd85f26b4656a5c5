// pybind11 only: Python passes addresses, sizes and the stream; nothing is allocated or synchronised here.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

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

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native kernels of PPF. Takes raw addresses: call them through ppf.ops, which checks every argument.";
  m.def("build_info", &build_info, "What this module was compiled for: version, compiler, simd, cuda (or None), archs.");
}
