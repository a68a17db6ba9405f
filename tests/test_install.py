"""Every way to install: editable, from the sdist, as a wheel, without a compiler, without torch's headers."""

import os
import pathlib
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import types
import zipfile
from collections.abc import Callable
from typing import Any

import pytest

NVCC = shutil.which("nvcc")
ROOT = pathlib.Path(__file__).parent.parent
CHECK = """
import torch, onepass, pathlib, sys, warnings
assert pathlib.Path(onepass.__file__).resolve().is_relative_to(pathlib.Path(sys.argv[1]).resolve()), onepass.__file__
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(3):
        context, _ = onepass.additive_attention(torch.ones(1, 1, 4), torch.ones(1, 2, 4), torch.ones(1, 2, 3), torch.ones(4))
assert torch.equal(context, torch.ones(1, 1, 3))
print(len([w for w in caught if "onepass" in str(w.message)]), *(w.message for w in caught))
"""


def run(*command: object, **environment: str) -> str:
    """A command's output; its failure is the test's."""
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, env={**inherited, **environment}, check=False, cwd="/"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The tree as it is tracked, without what earlier builds left in it."""
    folder = tmp_path_factory.mktemp("source")
    for name in ("benchmarks", "csrc", "kernels", "python", "setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        path = ROOT / name
        if path.is_dir():
            shutil.copytree(path, folder / name, ignore=shutil.ignore_patterns("*.so", "*.egg-info", "__pycache__"))
        else:
            shutil.copy(path, folder / name)
    return folder


def fresh_environment(folder: pathlib.Path) -> pathlib.Path:
    """A new virtual environment's python, which sees this one's torch and build tools but not its onepass."""
    run(sys.executable, "-m", "venv", "--without-pip", folder)
    python = folder / "bin/python"
    packages = pathlib.Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    for path in pathlib.Path(sysconfig.get_path("purelib")).iterdir():
        if "onepass" not in path.name and path.name != "__pycache__":
            (packages / path.name).symlink_to(path)
    return python


def pip(python: pathlib.Path, *arguments: object, **environment: str) -> str:
    return run(python, "-m", "pip", *arguments, "--no-build-isolation", "--no-deps", "-v", **environment)


def test_editable(source: pathlib.Path, tmp_path: pathlib.Path) -> None:
    python = fresh_environment(tmp_path / "environment")
    pip(python, "install", "-e", source, ONEPASS_CPU="1", ONEPASS_CUDA_ARCHS="90")
    assert run(python, "-c", CHECK, source).startswith("0")
    info = run(python, "-m", "onepass", "info", "--no-measure")
    assert "backend     cpu on cpu: available" in info
    if NVCC is not None:
        assert "cuda        kernels for compute capabilities 9.0" in info


@pytest.fixture
def cuda_build(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """The build's functions, with an nvcc that says what it is told to."""

    def load(tmp_path: pathlib.Path, release: str | None, **environment: str) -> Any:
        for name in ("CUDA_HOME", "ONEPASS_CUDA", "ONEPASS_CUDA_ARCHS"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        if release is not None:
            (tmp_path / "nvcc").write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.1'\n")
            (tmp_path / "nvcc").chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path) if release is None else f"{tmp_path}:{os.environ['PATH']}")
        return types.SimpleNamespace(**runpy.run_path(str(ROOT / "csrc/cuda/build.py")))

    return load


def test_why_cuda_is_not_built(cuda_build: Callable[..., Any], tmp_path: pathlib.Path) -> None:
    assert cuda_build(tmp_path, "13.0").why_not("auto") is None
    assert "nvcc is 12.6, 12.8 or newer is needed" in cuda_build(tmp_path, "12.6").why_not("1")
    assert cuda_build(tmp_path, "13.0").why_not("0") == "ONEPASS_CUDA=0 when onepass was installed"
    (tmp_path / "nvcc").unlink()
    assert "no nvcc on the path" in cuda_build(tmp_path, None).why_not("auto")
    assert "no nvcc in $CUDA_HOME/bin, /nowhere/bin," in cuda_build(tmp_path, None, CUDA_HOME="/nowhere").why_not("auto")


def test_cuda_architectures(cuda_build: Callable[..., Any], tmp_path: pathlib.Path) -> None:
    """Machine code for each, PTX for the newest."""
    build = cuda_build(tmp_path, "13.0", ONEPASS_CUDA_ARCHS="90, 80;100a")
    assert build.archs() == ["90", "80", "100a"]
    assert build.code()[-1] == "-gencode=arch=compute_90,code=compute_90"
    assert len(build.code()) == 4
    assert len(cuda_build(tmp_path, "13.0").code()) == 7
    assert cuda_build(tmp_path, "13.0", ONEPASS_CUDA_ARCHS="80, ").archs() == ["80"]
    for bad in ("80 hopper", "9.0", "sm_90"):
        with pytest.raises(SystemExit, match=f"ONEPASS_CUDA_ARCHS takes numbers such as 80 .*; got {bad.split()[-1]}"):
            cuda_build(tmp_path, "13.0", ONEPASS_CUDA_ARCHS=bad).why_not("0")


def test_the_compiler_of_the_host(cuda_build: Callable[..., Any], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for given, expected in ((None, []), ("g++-12", ["-ccbin", "g++-12"]), ("ccache g++", ["-ccbin", "g++"])):
        monkeypatch.delenv("CXX", raising=False) if given is None else monkeypatch.setenv("CXX", given)
        assert cuda_build(tmp_path, "13.0").host() == expected
    assert cuda_build(tmp_path, "13.0", NVCC_CCBIN="clang++").host() == []


def test_switches(monkeypatch: pytest.MonkeyPatch) -> None:
    build = types.SimpleNamespace(**runpy.run_path(str(ROOT / "csrc/build.py")))
    for given, expected in (("", "auto"), ("0", "0"), ("1", "1"), ("auto", "auto")):
        monkeypatch.setenv("ONEPASS_CUDA", given)
        assert build.switch("ONEPASS_CUDA") == expected
    monkeypatch.setenv("ONEPASS_CUDA", "off")
    with pytest.raises(SystemExit, match="ONEPASS_CUDA is 0, 1 or auto; got off"):
        build.switch("ONEPASS_CUDA")
    for given in ("0", "-1", "many"):
        monkeypatch.setenv("ONEPASS_JOBS", given)
        with pytest.raises(SystemExit, match=f"ONEPASS_JOBS is a number of at least 1; got {given}"):
            build.jobs()
    monkeypatch.setenv("ONEPASS_JOBS", "3")
    assert build.jobs() == 3


def test_a_build_keeps_nothing_of_one_under_other_conditions(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor of one that did not end: what it left is gone before anything is compiled."""
    from setuptools import Distribution, Extension

    build = runpy.run_path(str(ROOT / "setup.py"), run_name="setup")["Build"]
    monkeypatch.delenv("CXX", raising=False)

    def begun(flags: list[str]) -> tuple[bool, bool, Callable[[], Any]]:
        """Whether all is compiled anew, whether the older library is still there, and what to call at the end."""
        command = build(Distribution({"ext_modules": [Extension("onepass._C", ["a.cpp"], extra_compile_args=flags)]}))
        command.ensure_finalized()
        command.build_lib, command.build_temp, command.force = str(tmp_path / "lib"), str(tmp_path / "temp"), False
        library = tmp_path / "lib" / command.get_ext_filename("onepass._cuda")
        library.parent.mkdir(parents=True, exist_ok=True)
        library.touch()
        done, conditions = command.start_over_where_needed()
        return command.force, library.exists(), lambda: done.write_text(conditions)

    first, there, end = begun(["-O3"])
    assert (first, there) == (True, False)
    assert begun(["-O3"])[:2] == (True, False)  # the first did not end
    end()
    assert begun(["-O3"])[:2] == (False, True)
    end()
    assert begun(["-O2"])[:2] == (True, False)
    end()
    monkeypatch.setenv("CXX", "clang++")
    assert begun(["-O3"])[:2] == (True, False)


def test_cuda_required_but_not_there(source: pathlib.Path, tmp_path: pathlib.Path) -> None:
    python = fresh_environment(tmp_path / "environment")
    with pytest.raises(AssertionError, match="ONEPASS_CUDA=1, but the CUDA kernels cannot be built: there was no nvcc"):
        pip(python, "install", source, ONEPASS_CUDA="1", CUDA_HOME="/nonexistent")
    with pytest.raises(AssertionError, match="ONEPASS_CUDA=1, but the CPU kernels, which CUDA's go with, cannot be built: ONEPASS_CPU=0"):
        pip(python, "install", source, ONEPASS_CUDA="1", ONEPASS_CPU="0")


def test_sdist_to_wheel_to_fresh_environment(source: pathlib.Path, tmp_path: pathlib.Path) -> None:
    build = "import os, sys, setuptools.build_meta as b; os.chdir(sys.argv[1]); print(b.build_sdist(sys.argv[2]))"
    run(sys.executable, "-c", build, source, tmp_path)
    (sdist,) = tmp_path.glob("onepass_attention-*.tar.gz")
    pip(pathlib.Path(sys.executable), "wheel", sdist, "-w", tmp_path, ONEPASS_CPU="1", ONEPASS_CUDA="0")
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert any(name.startswith("onepass/_C.") for name in names)
    assert {"onepass/py.typed", "onepass/_probe.pyi", "onepass/benchmarks/command.py", "onepass/kernels/__init__.py"} <= set(names)
    python = fresh_environment(tmp_path / "environment")
    pip(python, "install", wheel)
    assert run(python, "-c", CHECK, tmp_path / "environment").startswith("0")


def test_without_a_compiler(source: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """It installs, works on the reference, and says once what is missing. What an earlier build left in the tree is not installed."""
    python = fresh_environment(tmp_path / "environment")
    left = source / f"build/lib.{sysconfig.get_platform()}-{sys.implementation.cache_tag}/onepass"
    left.mkdir(parents=True, exist_ok=True)
    for name in ("_C", "_cuda", "_probe"):
        (left / f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}").write_text("not of this build")
    said = pip(python, "install", source, CXX="/nonexistent/c++", CC="/nonexistent/cc", ONEPASS_CUDA_ARCHS="80")
    assert "install a C++20 compiler" in said
    assert not list((tmp_path / "environment").glob(f"lib/*/site-packages/onepass/*{sysconfig.get_config_var('EXT_SUFFIX')}"))
    out = run(python, "-c", CHECK, tmp_path / "environment")
    assert out.startswith("1 onepass runs its plain torch reference")
    assert "were not built" in out
    assert "not available: the CPU kernels were not built" in run(python, "-m", "onepass", "info")


def test_without_a_compiler_but_told_to_build(source: pathlib.Path, tmp_path: pathlib.Path) -> None:
    python = fresh_environment(tmp_path / "environment")
    with pytest.raises(AssertionError, match="/nonexistent/c"):
        pip(python, "install", source, CXX="/nonexistent/c++", CC="/nonexistent/cc", ONEPASS_CPU="1")


def test_torch_is_found_from_an_isolated_build(source: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An isolated build hides the environment's packages, but not where they lie."""
    build = runpy.run_path(str(source / "csrc/build.py"))
    monkeypatch.setattr(sys, "path", [path for path in sys.path if "site-packages" not in path])
    assert build["folder_of_torch"]().name == "torch"


def test_sanitizers(tmp_path: pathlib.Path) -> None:
    """All kernels under AddressSanitizer and UndefinedBehaviorSanitizer, on buffers of exactly the right size."""
    flags = ["-std=c++20", "-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-ffp-contract=off"]
    flags.append("-Wno-psabi")
    sets: dict[str, list[str]] = {"baseline": [], "avx2": ["-mavx2", "-mfma", "-mf16c"]}
    sets["avx512"] = [*sets["avx2"], "-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl"]
    compiler = os.environ.get("CXX", "c++")
    if os.uname().machine != "x86_64":
        sets = {name: [] for name in sets}
    for name, isa in sets.items():
        run(compiler, *flags, *isa, "-c", ROOT / f"csrc/cpu/kernels_{name}.cpp", "-o", tmp_path / f"{name}.o")
    run(compiler, *flags, ROOT / "tests/cpp/sanitize.cpp", *sorted(tmp_path.glob("*.o")), "-o", tmp_path / "sanitize")
    assert "runs clean" in run(tmp_path / "sanitize")


# What torch's headers and libraries have had since 2.10, tried with it: there `make .venv/installed TORCH=torch==2.10.0` builds.
SINCE_2_10 = {
    "AOTITorchError", "AtenRecordFunctionHandle", "AtenTensorHandle", "C10IValueHandle", "IValueMapHandle", "STABLE_TORCH_LIBRARY",
    "STABLE_TORCH_LIBRARY_IMPL", "TORCH_BOX", "TORCH_ERROR_CODE_CHECK", "aoti_torch_device_type_cpu", "aoti_torch_empty_strided",
    "aoti_torch_get_storage_size", "aoti_torch_layout_strided", "torch::headeronly::ScalarType", "torch::stable::Tensor",
    "torch::stable::accelerator::DeviceGuard", "torch::stable::contiguous", "torch::stable::detail::from", "torch::stable::detail::to",
    "torch::stable::get_num_threads", "torch::stable::new_empty", "torch::stable::new_zeros", "torch::stable::parallel_for",
    "torch::stable::to",
}  # fmt: skip
NULL_WHERE_ABSENT = {
    "aoti_record_function_end", "aoti_record_function_start", "aoti_torch_get_current_cuda_stream", "at::hasCallbacks", "torch_from_blob",
}  # fmt: skip


def test_the_oldest_torch_has_what_is_taken_from_it() -> None:
    """The version that headers are asked for (TORCH_TARGET_VERSION) does not keep all that is newer away. What is new here, and in no set,
    is to be tried with the oldest torch first."""
    kinds = (r"(?:torch|at|c10)(?:::\w+)+", r"\w*TORCH_[A-Z_]+", r"(?:aoti|torch)_[a-z_]+", r"(?:AOTI|Aten|C10|IValue)\w+")
    names = re.compile(rf"\b(?:{'|'.join(kinds)})")
    code = [line.split("//")[0] for path in (ROOT / "csrc").rglob("*") if path.is_file() for line in path.read_text().splitlines()]
    taken = {name for line in code if "#include" not in line for name in names.findall(line)}
    ours = {name for name in taken if name.startswith("ONEPASS_")}
    assert taken - ours == SINCE_2_10 | NULL_WHERE_ABSENT
