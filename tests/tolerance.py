"""How far a result may be from the fp64 reference: derived from the formulae, never chosen.

Contract: an error is at most twice that of torch's eager formula (in the dtype that the contract accumulates in: float32 for the
half-width ones), plus a rounding floor, plus one rounding of the output. The floors follow one error through the formulae, all in
fp64. Below, ``eps`` is the machine epsilon of the accumulating dtype, and every sum is granted one eps of the sum of its terms'
magnitudes; ``tol(x)`` is the floor of ``x``.

- score, additive: with at most eight channels ``sum_a v_a tanh``, where each tanh is granted one eps: ``tol = eps sum_a |v_a|``. With more
  it is ``sum_a v_a - sum_a 2 v_a r_a``, as ``tanh = 1 - 2 r``: a sum of terms ``|v_a|`` and ``2 |v_a| r_a = |v_a| (1 - tanh)``, so
  ``tol = eps sum_a |v_a| (2 - tanh)``: of ``eps sum_a |v_a|`` one to three, two where tanh is 0. Not one: where tanh is near -1, the
  terms are three times as large as what they leave. What rounds ``r_a`` is not granted again, as it differs from channel to channel
  and averages out; where one channel of ``v`` outweighs each of the others thirtyfold, or all hold the same numbers, it does not, and the
  bound does not hold. Where
  ``max|q| + max|k| < 1/16`` a score must be relatively accurate: ``tol = eps sum_a |v_a tanh|``.
- score, multiplicative: ``tol = eps |scale| sum_a |q_a k_a|``.
- weight: scores that are off by at most d move ``w`` to at most ``w e^2d / (1 - w + w e^2d)`` (its own score up, all others
  down), so by ``w (1 - w) E / (1 + w E)`` with ``E = expm1(2 d)``. The softmax itself rounds ``score - max`` and exp, sum,
  quotient: ``eps w (2 + |score - max|)``. Weights may flush to zero below the smallest normal number.
- context: ``sum_s tol(w) |value| + eps sum_s w |value|``; dvalues likewise over t with dcontext.
- dweights ``p = dcontext . value + what arrives``: ``eps (sum_d |dcontext value| + |arriving|)``.
- dscore ``g = w (p - r)``, ``r = sum_s w p``: ``tol(r) = sum_s (tol(w) |p| + w tol(p) + eps w |p|)`` and
  ``tol(g) = tol(w) |p - r| + w (tol(p) + tol(r)) + eps w (|p| + |r|)``.
- dquery, additive ``sum_s g v_a (1 - tanh^2)``: ``|v_a| sum_s (tol(g) (1 - tanh^2) + eps |g| (2 - tanh^2))``: an absolute error of
  eps in ``1 - tanh^2``, and as it is ``4 x r^2``, where what rounds ``r`` counts twice, one more of itself; dkeys likewise over t. dv
  ``sum g tanh``: ``sum (tol(g) |tanh| + eps |g|)``, relative where small; with more than eight channels it is ``sum g (1 - 2 r)``, of
  terms as large as a score's: ``eps |g| (2 - tanh)``.
- dquery, multiplicative ``scale sum_s g k``: ``|scale| sum_s (tol(g) |k| + eps |g k|)``; dkeys likewise over t.

Tensor cores take both factors of a product in the inputs' dtype. With ``factors_are_rounded``, for the Triton kernels, weights and
gradients of scores are granted one rounding to a half-width dtype before they multiply values, queries, keys or dcontext.

With ``approximate``, on a machine whose ``ex2.approx`` and ``rcp.approx`` are off by all that PTX grants them, 2^-22 = 2 eps and
2^-23 = eps of their results: ``x = e^2q e^2k`` is off by 4 eps of itself, ``r = 1 / (1 + x)`` by ``tol(r) = eps r (1 + 4 (1 - r))``. A
tanh is granted ``2 tol(r)`` more, ``1 - tanh^2 = 4 (r - r^2)`` ``4 |tanh| tol(r)``, and a weight, a quotient of exponentials, ``5 eps w``.

In fp64 the reference is eager itself: its error is what eager has in fp32 on the same inputs, scaled by the ratio of the
epsilons, and since the reference rounds as the result does, that error counts three times and the floors twice.
"""

import dataclasses
from collections.abc import Sequence

import torch
from cases import Case, Results, accumulator, results
from torch import Tensor

SMALL = 1 / 16
factors_are_rounded = False
FEW = 8


def floors(case: Case, dtype: torch.dtype, factors: torch.dtype, approximate: bool = False) -> Results:
    """The rounding floor of every result of a case (in fp64) that is computed in ``dtype``; weights and gradients of scores are rounded to
    ``factors`` before they multiply."""
    eps, tiny = torch.finfo(dtype).eps, torch.finfo(dtype).tiny

    def cut(factor: Tensor) -> Tensor:
        return torch.zeros_like(factor) if factors == dtype else rounding(factor.abs(), factors)

    visible = case.visible()
    seen = visible.any(-2)[..., None]
    query, keys, values = case.query, case.keys.masked_fill(~seen, 0.0), case.values.masked_fill(~seen, 0.0)
    if case.family == "multiplicative":
        column = slope = None
        scores = case.scale * query @ keys.mT
        score_floor = eps * abs(case.scale) * query.abs() @ keys.abs().mT
    else:
        column = case.v[..., None, None, :]
        tangent = torch.tanh(query.unsqueeze(-2) + keys.unsqueeze(-3))  # [B, (H,) T, S, A]
        slope = 1 - tangent * tangent
        small = bool(query.numel() and keys.numel() and query.abs().max() + keys.abs().max() < SMALL)
        bend = tangent.abs()
        scores = (tangent * column).sum(-1)
        terms = bend if small else torch.ones_like(bend) if query.shape[-1] <= FEW else 2 - tangent
        bend_floor, slope_floor = eps * terms, eps * (1 + slope)
        if approximate:
            reciprocal = (1 - tangent) / 2
            reciprocal_floor = eps * reciprocal * (5 - 4 * reciprocal)
            bend_floor, slope_floor = bend_floor + 2 * reciprocal_floor, slope_floor + 4 * bend * reciprocal_floor
        score_floor = (column.abs() * bend_floor).sum(-1)
    if case.family == "scores":
        found = {"scores": score_floor.masked_fill(~visible, 0.0)}
        g, g_floor = case.grad_weights.masked_fill(~visible, 0.0), torch.zeros_like(scores)
    else:
        w, w_floor = _weights(scores.masked_fill(~visible, -torch.inf), score_floor.masked_fill(~visible, 0.0), eps, tiny)
        w_floor = w_floor + 5 * eps * w if approximate else w_floor
        grad_context = query.new_zeros((*query.shape[:-1], values.shape[-1])) if case.grad_context is None else case.grad_context
        arriving = torch.zeros_like(w) if case.grad_weights is None else case.grad_weights.masked_fill(~visible, 0.0)
        found = {
            "context": (w_floor + cut(w)) @ values.abs() + eps * w @ values.abs(),
            "weights": w_floor,
            "d_values": (w_floor + cut(w)).mT @ grad_context.abs() + eps * w.mT @ grad_context.abs(),
        }
        p = grad_context @ values.mT + arriving
        p_floor = eps * (grad_context.abs() @ values.abs().mT + arriving.abs())
        r = (w * p).sum(-1, keepdim=True)
        r_floor = (w_floor * p.abs() + w * p_floor + eps * w * p.abs()).sum(-1, keepdim=True)
        g = w * (p - r)
        g_floor = w_floor * (p - r).abs() + w * (p_floor + r_floor) + eps * w * (p.abs() + r.abs())
    if column is None:
        found["d_query"] = abs(case.scale) * (g_floor + eps * g.abs() + cut(g)) @ keys.abs()
        found["d_keys"] = abs(case.scale) * (g_floor + eps * g.abs() + cut(g)).mT @ query.abs()
    else:
        assert slope is not None
        assert bend is not None
        moved = g_floor[..., None] * slope + g.abs()[..., None] * slope_floor
        found["d_query"] = case.v.abs()[..., None, :] * moved.sum(-2)
        found["d_keys"] = case.v.abs()[..., None, :] * moved.sum(-3)
        d_v = (g_floor[..., None] * bend + g.abs()[..., None] * bend_floor).sum((-3, -2))
        found["d_v"] = d_v.sum(0)
    return found


def _weights(scores: Tensor, score_floor: Tensor, eps: float, tiny: float) -> tuple[Tensor, Tensor]:
    """Softmax and its floor; all rows of ``-inf`` give zeros."""
    if scores.shape[-1] == 0:
        return scores, scores
    top, where = scores.max(-1, keepdim=True)
    total = scores.logsumexp(-1, keepdim=True)
    w = (scores - total).exp().nan_to_num(0.0)
    rest = torch.log1p(-w).scatter(-1, where, scores.scatter(-1, where, -torch.inf).logsumexp(-1, keepdim=True) - total)  # log(1 - w)
    reach = 2 * score_floor.amax(-1, keepdim=True)
    change = reach.clamp(max=1.0).expm1()
    near = w * rest.exp() * change / (1 + torch.minimum(w, rest.exp()) * change)
    odds = scores - total - rest
    far = torch.maximum(torch.sigmoid(odds + reach) - w, w - torch.sigmoid(odds - reach))
    below_top = (top - scores).masked_fill(scores == -torch.inf, 0.0)
    floor = torch.where(reach <= 1, near, far) + eps * w * (2 + below_top) + tiny
    return w, floor.masked_fill(scores == -torch.inf, 0.0).nan_to_num(0.0, posinf=torch.inf)


def rounding(size: Tensor, dtype: torch.dtype) -> Tensor:
    """Half a unit in the last place of ``dtype``, or of its subnormal numbers, for results up to a size."""
    info = torch.finfo(dtype)
    return torch.clamp(size * info.eps / 2, min=info.tiny * info.eps / 2)


@dataclasses.dataclass(frozen=True)
class Bound:
    """The exact result, eager's (in the accumulating dtype), and how far from the exact one a result may be."""

    exact: Tensor
    eager: Tensor
    tolerance: Tensor


def bounds(case: Case, approximate: bool = False) -> dict[str, Bound]:
    """The bound of every result of a case."""
    dtype = case.query.dtype
    wide, compute = case.to(torch.float64), accumulator(dtype)
    exact = results(wide, "reference")
    eager = exact if dtype == torch.float64 else results(case.to(compute), "reference")
    theirs = _eager_errors(case) if dtype == torch.float64 else _largest(eager, exact)
    times, floor_times = (3, 2) if dtype == torch.float64 else (2, 1)
    grants = floors(wide, compute, dtype if factors_are_rounded else compute, approximate)
    found = {}
    for name, value in exact.items():
        error = times * theirs[name] + floor_times * grants[name]
        found[name] = Bound(value, eager[name], error + rounding(value.abs() + error, dtype))
    return found


def _largest(eager: Results, exact: Results) -> dict[str, float]:
    """The largest finite error of each result."""
    errors = {name: (eager[name].double() - value).abs() for name, value in exact.items()}
    return {name: float(error[error.isfinite()].amax()) if error.isfinite().any() else 0.0 for name, error in errors.items()}


def _eager_errors(case: Case) -> dict[str, float]:
    """What eager's errors in fp64 would be: those in fp32 times the ratio of the epsilons."""
    narrow = case.to(torch.float32)
    ratio = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
    errors = _largest(results(narrow, "reference"), results(narrow.to(torch.float64), "reference"))
    return {name: error * ratio for name, error in errors.items()}


def check(got: Results, case: Case, part: bool = False, approximate: bool = False) -> None:
    """Assert that every result is within its bound, and not finite exactly where eager's and the exact one are not.

    With ``part``, of those results that there are. Where eager overflows and fp64 does not, eager's error is infinite: anything goes there.
    """
    limits = bounds(case, approximate)
    assert got.keys() <= limits.keys() if part else got.keys() == limits.keys()
    for name, result in got.items():
        bound = limits[name]
        assert (result.dtype, result.shape) == (case.query.dtype, bound.exact.shape), name
        exact = bound.exact.to(result.dtype)
        close = (result.double() - bound.exact).abs() <= bound.tolerance
        same = (result == exact) | (result.isnan() & exact.isnan())
        overflows = exact.isfinite() & ~bound.eager.to(result.dtype).isfinite()
        wrong = ~(close & exact.isfinite() | same | overflows)
        if wrong.any():
            raise AssertionError(_say(name, result, bound, wrong))


def as_near(got: Sequence[Tensor | None], eager: Sequence[Tensor | None], exact: Sequence[Tensor | None]) -> None:
    """Assert what the contract says of anything built upon the functions, in norms: errors at most twice eager's, where all have eager's
    roundings to half-width dtypes before and after, plus one rounding of the result."""
    for found, theirs, wanted in zip(got, eager, exact, strict=True):
        assert (found is None) == (wanted is None)
        if found is None or theirs is None or wanted is None:
            continue
        error, granted = (float((tensor.detach().double() - wanted.detach().double()).norm()) for tensor in (found, theirs))
        limit = 2 * granted + float(rounding(wanted.detach().double().abs(), theirs.dtype).norm())
        assert error <= limit, f"off by {error:.3g} in norm, eager by {granted:.3g}"


def _say(name: str, result: Tensor, bound: Bound, wrong: Tensor) -> str:
    excess = ((result.double() - bound.exact).abs() / bound.tolerance).masked_fill(~wrong, -1.0).nan_to_num(torch.inf)
    worst = tuple(int(index) for index in torch.unravel_index(excess.argmax(), excess.shape))
    got, exact, eager, tolerance, times = (
        f"{tensor[worst].item():.9g}" for tensor in (result, bound.exact, bound.eager, bound.tolerance, excess)
    )
    count = f"{int(wrong.sum())} of {wrong.numel()} are wrong"
    return f"{name}{list(worst)}: got {got}, exact {exact}, eager {eager}, tolerance {tolerance} ({times} times); {count}"
