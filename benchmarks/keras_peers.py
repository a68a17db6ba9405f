"""Keras' own layers on jax, in one ``jax.jit`` as its ``fit`` runs them, with their projections (``Dense``) where the family has some."""

import importlib
import os
from typing import Any

import torch

from .providers import UnavailableError, provider
from .workloads import BOTH, Run, Workload

NEEDS = {"keras": "make peers", "jax": "make peers"}
ON_JAX: dict[str, Any] = {"needs": NEEDS, "devices": ("cpu",), "dtypes": (torch.float32,), "compiles": True}


def _keras() -> Any:
    os.environ.setdefault("KERAS_BACKEND", "jax")
    keras = importlib.import_module("keras")
    if keras.backend.backend() != "jax":
        raise UnavailableError(f"keras runs on {keras.backend.backend()} here: set KERAS_BACKEND=jax")
    return keras


@provider("keras", {"additive", "multiplicative"}, **ON_JAX)
def function(workload: Workload, direction: str) -> Run:
    """``v`` is the layer's ``scale``."""
    layers = _keras().layers
    shape = workload.shape
    attention = layers.AdditiveAttention() if workload.family == "additive" else layers.Attention()
    attention.build([(shape.B, shape.T, shape.A), (shape.B, shape.S, shape.D), (shape.B, shape.S, shape.A)])

    def context(query: Any, keys: Any, values: Any, *v: Any) -> Any:
        return attention.stateless_call(list(v), [], [query, values, keys])[0]

    return _jitted(context, workload, direction)


@provider("keras", {"additive layer"}, **ON_JAX)
def additive_layer(workload: Workload, direction: str) -> Run:
    keras = _keras()
    shape = workload.shape
    query, memory = keras.Input((shape.T, shape.A)), keras.Input((shape.S, shape.D))
    project_query, project_keys, attention = (
        keras.layers.Dense(shape.A, use_bias=False),
        keras.layers.Dense(shape.A, use_bias=False),
        keras.layers.AdditiveAttention(),
    )
    model = keras.Model([query, memory], attention([project_query(query), memory, project_keys(memory)]))
    order = [variable.path for variable in model.trainable_variables]

    def context(query: Any, memory: Any, w_q: Any, w_k: Any, v: Any) -> Any:
        given = {project_query.kernel.path: w_q.T, project_keys.kernel.path: w_k.T, attention.scale.path: v}
        return model.stateless_call([given[path] for path in order], [], [query, memory])[0]

    return _jitted(context, workload, direction)


def _jitted(function: Any, workload: Workload, direction: str) -> Run:
    jax = importlib.import_module("jax")
    arrays = [jax.numpy.asarray(tensor.detach().numpy()) for tensor in workload.inputs]
    upstream = jax.numpy.asarray(workload.tensors["upstream"].numpy())
    run = jax.jit((lambda *a: jax.vjp(function, *a)[1](upstream)) if direction == BOTH else function)
    return lambda: jax.block_until_ready(run(*arrays))
