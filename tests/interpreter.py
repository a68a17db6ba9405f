"""Triton's interpreter, made to round to bfloat16 as GPUs do and to take a third less time."""

import types
from typing import Any

import numpy
import torch


def mend() -> None:
    numpy.seterr(all="ignore")  # infinities and NaN come and go
    patch_once_per_launch()
    round_to_nearest()


def patch_once_per_launch() -> None:
    """Not ``triton.language`` anew in every call of a device function."""
    from triton.runtime import interpreter

    patch, language = interpreter._patch_lang, interpreter.tl
    everything = types.SimpleNamespace(__globals__={"tl": language, "core": language.core})
    nothing = types.SimpleNamespace(restore=lambda: None)
    running: list[Any] = []

    def patched(function: Any) -> Any:
        if running:
            return nothing
        scope = patch(everything)
        running.append(scope)

        def restore() -> None:
            running.clear()
            scope.restore()

        return types.SimpleNamespace(restore=restore)

    interpreter._patch_lang = patched


def round_to_nearest() -> None:
    """Triton 3.9 cuts float32 off where it makes bfloat16 of it, which it keeps as uint16."""
    from triton.runtime import interpreter

    convert, language = interpreter._convert_float, interpreter.tl

    def converted(data: Any, given: Any, wanted: Any, mode: Any) -> Any:
        if (given, wanted) == (language.float32, language.bfloat16):
            narrow = torch.from_numpy(data.astype("float32")).bfloat16()
            return narrow.view(torch.int16).numpy().view("uint16").reshape(data.shape)
        return convert(data, given, wanted, mode)

    interpreter._convert_float = converted
