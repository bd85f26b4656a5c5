"""What the build promises: one self-contained native module, kernels under ppf.kernels, data files, honest switches."""

from __future__ import annotations

import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest

import ppf.errors
import ppf.kernels
from ppf import _C


def needed_libraries(path: Path) -> list[str]:
    """The NEEDED entries of a 64-bit little-endian ELF file."""
    data = path.read_bytes()
    assert data[:6] == b"\x7fELF\x02\x01", "not a 64-bit little-endian ELF file"
    start, size, count = struct.unpack_from("<Q", data, 40)[0], *struct.unpack_from("<HH", data, 58)
    sections = [struct.unpack_from("<IIQQQQIIQQ", data, start + i * size) for i in range(count)]
    dynamic = next(section for section in sections if section[1] == 6)  # SHT_DYNAMIC
    strings = sections[dynamic[6]][4]
    entries = struct.iter_unpack("<QQ", data[dynamic[4] : dynamic[4] + dynamic[5]])
    return [data[strings + at : data.index(b"\0", strings + at)].decode() for tag, at in entries if tag == 1]


def test_native_module_links_neither_torch_nor_cuda():
    needed = needed_libraries(Path(_C.__file__))
    assert any(name.startswith("libc.") for name in needed), needed
    assert not [name for name in needed if "torch" in name or "cuda" in name or "c10" in name or "nv" in name]


def test_native_module_imports_without_torch_or_gpu():
    load = "from importlib.util import module_from_spec as new, spec_from_file_location as find"
    use = f"spec = find('ppf._C', {_C.__file__!r}); module = new(spec); spec.loader.exec_module(module)"
    code = f"import sys\n{load}\n{use}\nassert module.build_info() and 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, env={"CUDA_VISIBLE_DEVICES": ""})


def test_build_info():
    info = _C.build_info()
    assert set(info) == {"version", "compiler", "simd", "cuda", "archs"}
    assert info["version"] == "0.1.0"
    assert (info["cuda"] is None) == (info["archs"] == [])
    assert hasattr(_C, "gather_cuda") == (info["cuda"] is not None)


def test_kernels_and_data_are_part_of_the_package():
    assert Path(ppf.kernels.__file__).parent.name == "kernels"
    package = Path(ppf.errors.__file__).parent
    for name in ("py.typed", "data/sample.txt", "data/tiny-2m/model.safetensors", "data/tiny-2m/tokenizer.json"):
        assert (package / name).is_file(), name


def configure(repository: Path, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    cmake = shutil.which("cmake")
    if cmake is None:
        pytest.skip("no cmake on the path")
    command = [cmake, "-S", str(repository), "-B", str(folder), "-DSKBUILD_PROJECT_VERSION=0", *options]
    return subprocess.run(command, capture_output=True, text=True)


def test_cuda_on_without_nvcc_is_an_error(repository, tmp_path):
    """Searching programs under an empty root hides every nvcc of this machine."""
    tools = {"CMAKE_CXX_COMPILER": "c++", "CMAKE_MAKE_PROGRAM": "make"}
    known = [f"-D{variable}={shutil.which(tool)}" for variable, tool in tools.items()]
    hidden = [f"-DCMAKE_FIND_ROOT_PATH={tmp_path}", "-DCMAKE_FIND_ROOT_PATH_MODE_PROGRAM=ONLY"]
    result = configure(repository, tmp_path / "build", "-GUnix Makefiles", "-DPPF_CUDA=ON", *known, *hidden)
    assert result.returncode != 0
    assert "PPF_CUDA = ON: no nvcc found" in result.stderr


def test_unknown_cuda_mode_is_an_error(repository, tmp_path):
    result = configure(repository, tmp_path / "build", "-DPPF_CUDA=MAYBE")
    assert result.returncode != 0
    assert "PPF_CUDA = MAYBE: not a mode" in result.stderr
