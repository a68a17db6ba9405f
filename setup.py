"""Builds three extension modules where it can, and the pure Python package where it cannot.

    onepass._C      torch ops on the libtorch stable ABI (one binary for every torch from 2.10 on); needs torch's headers
    onepass._cuda   the same ops for NVIDIA GPUs; needs nvcc too, but neither a GPU nor a torch with CUDA
    onepass._probe  instruction set, build and ceilings; needs pybind11 alone

| environment        | default             | meaning                                                                               |
| ------------------ | ------------------- | ------------------------------------------------------------------------------------- |
| ONEPASS_CPU        | auto                | 1: the CPU kernels must be built, else the install fails; 0: never; auto: if possible |
| ONEPASS_CUDA       | auto                | the same for the CUDA kernels                                                         |
| ONEPASS_CUDA_ARCHS | 80 86 89 90 100 120 | compute capabilities to build for, 90 for 9.0; the newest also as PTX                 |
| ONEPASS_JOBS       | cores               | source files compiled at once                                                         |
| CXX, CUDA_HOME     | c++, nvcc's own     | the compiler, nvcc's too where NVCC_CCBIN is not set; the CUDA toolkit                |
"""

import os
import pathlib
import platform
import runpy
import sys
import types
from concurrent.futures import CancelledError, ThreadPoolExecutor

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

HERE = pathlib.Path(__file__).parent
VERSION = runpy.run_path(str(HERE / "python/onepass/_version.py"))["__version__"]
CSRC, SCHEMAS = pathlib.Path("csrc"), pathlib.Path("python/onepass/schemas.inc")
CUDA = types.SimpleNamespace(**runpy.run_path(str(HERE / "csrc/cuda/build.py")))
BUILD = types.SimpleNamespace(**runpy.run_path(str(HERE / "csrc/build.py")))
ISA_FLAGS = {
    "_avx2.cpp": ["-mavx2", "-mfma", "-mf16c"],
    "_avx512.cpp": ["-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl"],
}
# No contraction: results must not depend on which product the compiler would fuse (csrc/cpu/simd.h).
FLAGS = ["-std=c++20", "-O3", *([] if "CXXFLAGS" in os.environ else ["-g0"]), "-ffp-contract=off", "-fno-math-errno"]
FLAGS += ["-fno-trapping-math", "-fvisibility=hidden", "-Wall", "-Wno-psabi"]
TARGET_TORCH = "0x020a000000000000"  # 2.10, the oldest torch that the binary serves


def extensions(folder: pathlib.Path) -> list[Extension]:
    import pybind11

    def sources(*patterns: str) -> list[str]:
        return sorted(str(path) for pattern in patterns for path in CSRC.glob(pattern))

    flags = [*FLAGS, f"-DONEPASS_FLAGS={chr(34)}{' '.join(FLAGS)}{chr(34)}"]
    flags += [f"-DONEPASS_VERSION={chr(34)}{VERSION}{chr(34)}", f"-DONEPASS_TORCH={chr(34)}{BUILD.version_of_torch(folder)}{chr(34)}"]
    if (no_cuda := CUDA.why_not(BUILD.switch("ONEPASS_CUDA"))) is not None:
        if BUILD.switch("ONEPASS_CUDA") == "1":
            raise SystemExit(f"onepass: ONEPASS_CUDA=1, but the CUDA kernels cannot be built: {no_cuda}")
        print(f"onepass: the CUDA kernels are not built: {no_cuda}", file=sys.stderr)
    flags.append(f"-DONEPASS_CUDA={chr(34)}{no_cuda or ' '.join(CUDA.archs())}{chr(34)}")
    headers = sorted(str(path) for path in (*CSRC.rglob("*"), SCHEMAS) if path.suffix in (".h", ".inc", ".cuh"))

    def torch_ops(name: str, files: list[str], includes: list[str], folders: list[str], libraries: list[str]) -> Extension:
        return Extension(
            name, files, include_dirs=[str(folder / "include"), *includes], library_dirs=[str(folder / "lib"), *folders],
            libraries=["torch_cpu", *libraries], extra_compile_args=[*flags, f"-DTORCH_TARGET_VERSION={TARGET_TORCH}"], depends=headers,
        )  # fmt: skip

    found = [torch_ops("onepass._C", sources("ops/*.cpp", "cpu/*.cpp"), [], [], [])]
    cuda = [*sources("cuda/*.cpp"), *sources("cuda/*.cu")[::-1]]  # what fails without a compiler, then what takes longest
    found += [] if no_cuda else [torch_ops("onepass._cuda", cuda, *CUDA.runtime())]
    return [*found, Extension(
        "onepass._probe", sources("probe/*.cpp"), include_dirs=[pybind11.get_include()], extra_compile_args=flags,
        extra_link_args=["-pthread"], depends=headers,
    )]  # fmt: skip


class Build(build_ext):
    """Compiles all files side by side, each with the flags of its instruction set, and goes on without an extension where that fails."""

    def build_extensions(self) -> None:
        self.failed: list[Extension] = []
        self.pool = ThreadPoolExecutor(BUILD.jobs())
        done, conditions = self.start_over_where_needed()
        compile_one = self.compiler._compile

        def with_isa(obj, src, ext, cc_args, extra, pp_opts):  # type: ignore[no-untyped-def]
            if src.endswith(".cu"):
                return CUDA.compile_one(src, obj)
            isa = next((flags for ending, flags in ISA_FLAGS.items() if src.endswith(ending)), [])
            compile_one(obj, src, ext, cc_args, extra + (isa if platform.machine() == "x86_64" else []), pp_opts)

        def compile_all(sources, output_dir=None, macros=None, include_dirs=None, debug=0, extra_preargs=None,
                        extra_postargs=None, depends=None):  # type: ignore[no-untyped-def]  # fmt: skip
            how = self.compiler._setup_compile(output_dir, macros, include_dirs, sources, depends, extra_postargs)
            _, objects, extra, pp_opts, build = how
            cc = self.compiler._get_cc_args(pp_opts, debug, extra_preargs)
            list(self.pool.map(lambda item: with_isa(item[0], *item[1], cc, extra, pp_opts), build.items()))
            return objects

        self.compiler.compile = compile_all
        self.compiler.src_extensions.append(".cu")
        self.parallel = len(self.extensions)
        try:
            super().build_extensions()
        finally:
            self.pool.shutdown(wait=False, cancel_futures=True)
        if not self.failed:
            done.write_text(conditions)
        self.extensions = [ext for ext in self.extensions if ext not in self.failed]

    def start_over_where_needed(self) -> tuple[pathlib.Path, str]:
        """Nothing is kept of a build under other conditions, or that did not end well. Where to say that this one did, and under which."""
        how = [(ext.name, ext.sources, ext.include_dirs, ext.library_dirs, ext.extra_compile_args) for ext in self.extensions]
        names = ("CC", "CXX", "CFLAGS", "CXXFLAGS", "CPPFLAGS", "LDFLAGS", "CUDA_HOME", "NVCC_CCBIN")
        given = {name: os.environ.get(name) for name in names}
        done, conditions = pathlib.Path(self.build_temp) / "done", f"{sys.version}\n{how}\n{given}"
        done.parent.mkdir(parents=True, exist_ok=True)
        if not done.exists() or done.read_text() != conditions:
            self.force = True
            for name in ("onepass._C", "onepass._cuda", "onepass._probe"):
                for path in (self.get_ext_fullpath(name), pathlib.Path(self.build_lib) / self.get_ext_filename(name)):
                    pathlib.Path(path).unlink(missing_ok=True)
        done.unlink(missing_ok=True)
        return done, conditions

    def build_extension(self, ext: Extension) -> None:
        try:
            super().build_extension(ext)
        except Exception as problem:
            required = BUILD.switch("ONEPASS_CUDA" if ext.name == "onepass._cuda" else "ONEPASS_CPU") == "1"
            if required or isinstance(problem, CancelledError):
                self.pool.shutdown(wait=False, cancel_futures=True)
                raise
            self.failed.append(ext)
            print(f"onepass: {ext.name} was not built, the package goes on without it: {problem}", file=sys.stderr)
            if ext.name == "onepass._C":
                print("onepass: install a C++20 compiler (Debian: apt-get install g++), then onepass again.", file=sys.stderr)


def main() -> None:
    reason = BUILD.why_not(folder := BUILD.folder_of_torch())
    if reason is not None:
        for switch, kernels in (("ONEPASS_CPU", "the CPU kernels"), ("ONEPASS_CUDA", "the CPU kernels, which CUDA's go with,")):
            if BUILD.switch(switch) == "1":
                raise SystemExit(f"onepass: {switch}=1, but {kernels} cannot be built: {reason}")
        print(f"onepass: the CPU kernels are not built: {reason}", file=sys.stderr)
    modules = [] if reason or folder is None else extensions(folder)
    setup(version=VERSION, ext_modules=modules, cmdclass={"build_ext": Build})


if __name__ == "__main__":
    main()
