"""The backend ``cuda`` where there is no GPU: what the library says of itself, why it does not serve, and what is taken in its place."""

import subprocess
import sys

import pytest
import torch
from cases import build, call

import onepass
from onepass import _backends, _info, _library, _probe
from onepass.kernels import tiles
from onepass.kernels.tiles import Device

GPU = torch.device("cuda", 0)


@pytest.fixture
def a_gpu(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """As with an H100, CUDA kernels for 8.0 and 9.0, and a driver that serves them."""
    monkeypatch.setattr(_library, "cuda_error", None)
    monkeypatch.setattr(_library, "cuda_archs", ("80", "90"))
    monkeypatch.setattr(_backends, "_capability", lambda device: (9, 0))
    monkeypatch.setattr(_backends, "_cuda_versions", lambda: (13000, 13010))
    monkeypatch.setattr(_backends, "_finds_streams", lambda: True)
    return monkeypatch


@pytest.mark.parametrize(
    ("capability", "served"), [(75, False), (80, True), (86, True), (89, True), (90, True), (100, True), (120, True)]
)
def test_which_code_runs(capability: int, served: bool) -> None:
    """Machine code of the same generation, or PTX of an older one."""
    assert _backends.serves(("80", "90"), capability) is served


def test_code_of_a_newer_one_does_not_run() -> None:
    assert not _backends.serves(("89",), 86)
    assert not _backends.serves(("100",), 90)
    assert not _backends.serves((), 90)


@pytest.mark.parametrize(
    ("archs", "capability", "served"),
    [
        (("90a",), 90, True), (("90a",), 100, False), (("80", "90a"), 100, True), (("100f",), 103, True), (("100f",), 120, False),
        (("80", "86"), 87, True), (("86", "120"), 87, False), (("87", "120"), 87, True), (("87", "120"), 89, False),
    ],
)  # fmt: skip
def test_code_of_kinds(archs: tuple[str, ...], capability: int, served: bool) -> None:
    """That for one alone, that of a family, and Jetson's 8.7, which runs the others' PTX only."""
    assert _backends.serves(archs, capability) is served


def test_serves(a_gpu: pytest.MonkeyPatch) -> None:
    assert _backends.not_supported_reasons("cuda", GPU) == []
    assert _backends.not_supported_reasons("cuda", GPU, "additive", 1000) == []
    assert _backends.not_supported_reasons("cuda", GPU, "multiplicative", 16) == []
    (reason,) = _backends.not_supported_reasons("cuda", GPU, "multiplicative", 17)
    assert reason == "it has kernels of multiplicative attention for up to 16 queries, not for 17"


def test_another_architecture(a_gpu: pytest.MonkeyPatch) -> None:
    a_gpu.setattr(_backends, "_capability", lambda device: (7, 5))
    a_gpu.setattr(_library, "cuda_archs", ("80", "90a"))
    (reason,) = _backends.not_supported_reasons("cuda", GPU)
    assert "built for compute capabilities 8.0, 9.0a, cuda:0 has 7.5" in reason
    assert "ONEPASS_CUDA_ARCHS=75" in reason


def test_an_older_driver(a_gpu: pytest.MonkeyPatch) -> None:
    """Both versions are named, and the way out."""
    a_gpu.setattr(_backends, "_cuda_versions", lambda: (13000, 12040))
    (reason,) = _backends.not_supported_reasons("cuda", GPU)
    assert "built with CUDA 13.0, the driver serves CUDA 12.4: update the driver" in reason


def test_a_torch_whose_streams_are_not_found(a_gpu: pytest.MonkeyPatch) -> None:
    """``"auto"`` takes Triton then, in place of an error at every launch."""
    a_gpu.setattr(_backends, "_finds_streams", lambda: False)
    assert _backends.not_supported_reasons("cuda", GPU) == [f"it finds no CUDA streams in torch {torch.__version__}"]


def test_auto_takes_what_is_predicted_to_be_faster(a_gpu: pytest.MonkeyPatch) -> None:
    """And Triton where CUDA has no kernel, or none for this GPU or these widths."""
    parts = pytest.importorskip("onepass.kernels.parts", reason="needs triton")
    query, keys = torch.empty(2, 100, 64, device="meta"), torch.empty(2, 200, 64, device="meta")
    a_gpu.setattr(_library, "triton_error", None)
    a_gpu.setattr(_library, "INTERPRETED", False)
    a_gpu.setattr(parts, "device_of", lambda device: Device(132, capability=90))
    a_gpu.setattr(_backends.Tensor, "device", GPU, raising=False)
    seconds = {"cuda": 1.0, "triton": 2.0}
    asked, kept = [], []

    def launches(op: str, *arguments: object, **more: int) -> list[dict[str, float]]:
        asked.append(op)
        kept.append(more["kept"])
        return [{"seconds": seconds["cuda"]}]

    a_gpu.setattr(_probe, "cuda_launches", launches)
    a_gpu.setattr(tiles, "attend_seconds", lambda *arguments: seconds["triton"])
    a_gpu.setattr(_backends, "_faster", _backends._faster.__wrapped__)
    assert _backends.pick_backend("auto", query, keys, keys) == "cuda"
    seconds["cuda"] = 3.0
    assert _backends.pick_backend("auto", query, keys, keys) == "triton"
    seconds["cuda"] = 1.0
    assert _backends.pick_backend("auto", query[:, :16], keys, keys) == "cuda"
    assert _backends.pick_backend("auto", query[:, :16], keys) == "cuda"
    assert asked == [*["additive_forward"] * 2, "additive_step_forward", "additive_forward"]  # no step's where scores are asked
    assert _backends.pick_backend("auto", query, keys, keys, "multiplicative") == "triton"
    assert _backends.pick_backend("auto", query[:, :16], keys, keys, "multiplicative") == "cuda"
    assert _backends.pick_backend("auto", query[:, :16], keys, keys, kept=torch.bfloat16) == "cuda"
    assert kept[-2:] == [0, 2]
    a_gpu.setattr(_library, "cuda_error", "nothing was built")
    assert _backends.pick_backend("auto", query, keys, keys) == "triton"


def test_answers_are_kept(a_gpu: pytest.MonkeyPatch) -> None:
    """Of a step's call, whose few microseconds this is a part of."""
    pytest.importorskip("onepass.kernels.parts", reason="needs triton")
    arguments = (3, 1, 1, 7, 40, 24), False, True, torch.float32, None, GPU
    _backends._faster.cache_clear()
    a_gpu.setattr("onepass.kernels.parts.device_of", lambda device: Device(132, capability=90))
    assert _backends._faster(*arguments) == _backends._faster(*arguments)
    assert _backends._faster.cache_info().hits == 1
    _backends._faster.cache_clear()


@pytest.mark.parametrize("additive", [False, True])
@pytest.mark.parametrize(("dtype", "kept"), [(torch.float32, None), (torch.float32, torch.bfloat16), (torch.float64, None)], ids=str)
def test_widths_of_steps(additive: bool, dtype: torch.dtype, kept: torch.dtype | None) -> None:
    """The most queries at a time of which there are kernels: so many are launched, one more is not."""
    family = "additive" if additive else "multiplicative"
    for A, D in ((64, 64), (1300, 64), (64, 1400), (2700, 700), (5300, 5300), (64, 21000), (60000, 60000)):
        forward, backward = _backends.most_queries(additive, A, D, dtype, kept)
        for T in (1, 2, 4, 5, 8, 9, 16):
            ways = (f"{family}_step_{way}" for way in ("forward", "backward"))
            steps = [bool(_backends._launches(way, (2, 1, T, 300, A, D), dtype, kept)) for way in ways]
            if additive:
                assert (forward >= T) is (steps[0] or (kept is None and A <= 8192))
                assert (backward >= T) is steps[1]
            else:
                assert (forward >= T) is (backward >= T) is all(steps)
    assert _backends.has_kernels(8192, dtype)
    assert not _backends.has_kernels(8193, dtype)


def test_predictions() -> None:
    """Twice the work takes twice as long, and widths that no kernel takes take forever."""
    sizes = [64, 1, 512, 512, 256, 256]
    one, two = (_probe.cuda_launches("additive_forward", [B, *sizes[1:]], 0, 132, 90)[0]["seconds"] for B in (64, 128))
    assert 1.9 < two / one < 2.1
    assert _probe.cuda_launches("additive_forward", [64, 1, 512, 512, 10**6, 256], 0, 132, 90) == []
    device = Device(132, capability=90)
    one, two = (tiles.attend_seconds(B, *sizes[1:], torch.float32, True, device) for B in (64, 128))
    assert 1.9 < two / one < 2.1


def test_named_without_a_gpu() -> None:
    with pytest.raises(RuntimeError, match=r"backend 'cuda' cannot serve this call: .*it serves tensors on an NVIDIA GPU, not on cpu"):
        call(build("additive"), "cuda")
    assert any(line.startswith("backend     cuda on cpu: not available: ") for line in _info.lines(measure=False))


def test_not_built(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reason of the installation, in the caller's error."""
    monkeypatch.setattr(_library, "cuda_build", lambda: "ONEPASS_CUDA=0 when onepass was installed")
    error = _library._load_cuda()  # also where the library of an earlier build in this place still lies there
    assert error is not None
    assert error.startswith("the CUDA kernels were not built (ONEPASS_CUDA=0 when onepass was installed;")
    monkeypatch.setattr(_library.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(_library, "cuda_build", lambda: "80 90")
    assert "nvcc failed for 80 90" in str(_library._load_cuda())


def test_a_library_that_does_not_load(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both sides are named."""

    def refuse(path: str) -> None:
        raise OSError("undefined symbol: aoti_torch_of_tomorrow")

    monkeypatch.setattr(_library, "cuda_build", lambda: "80 90")
    monkeypatch.setattr(_library.importlib.util, "find_spec", lambda name: type("Spec", (), {"origin": "/somewhere/_cuda.so"}))
    monkeypatch.setattr(torch.ops, "load_library", refuse)
    error = str(_library._load_cuda())
    assert f"_cuda.so do not load into torch {torch.__version__}: undefined symbol: aoti_torch_of_tomorrow" in error


@pytest.mark.skipif(_library.cuda_error is not None, reason=f"no CUDA kernels: {_library.cuda_error}")
def test_built_here() -> None:
    """The library loads into this torch, of whatever build, tells its versions, and knows what it was built for."""
    runtime, driver = torch.ops.onepass_cuda.versions()
    assert torch.ops.onepass_cuda.finds_streams() is (torch.version.cuda is not None)
    assert runtime >= 12080
    assert driver >= 0
    assert _library.cuda_archs


def test_every_op_has_its_twin() -> None:
    """The ops of both namespaces have the same schemas, shapes without data and gradients."""
    for schema in _library.SCHEMAS:
        name = schema[: schema.index("(")]
        one, two = (getattr(getattr(torch.ops, namespace), name).default for namespace in ("onepass", "onepass_cuda"))
        assert str(one._schema).split("::")[1] == str(two._schema).split("::")[1]
    query, keys, values, v = (torch.empty(shape, device="meta", requires_grad=True) for shape in ((2, 3, 8), (2, 5, 8), (2, 5, 4), (8,)))
    context, weights = torch.ops.onepass_cuda.additive_forward(query, keys, values, v, None, None)
    assert context.shape == (2, 3, 4)
    assert weights.shape == (2, 3, 5)
    grads = torch.autograd.grad(context.sum(), (query, keys, values, v))
    assert [grad.shape for grad in grads] == [query.shape, keys.shape, values.shape, v.shape]


def test_loads_without_cuda_in_sight() -> None:
    """Importing asks no GPU anything."""
    code = "import onepass, torch; print(torch.cuda.is_initialized())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
    assert onepass.__version__
