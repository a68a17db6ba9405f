"""GPU kernels in Triton, imported as ``onepass.kernels``.

A call comes as an op of ``ops.py``: ``parts.py`` sizes its launches by ``tiles.py`` and makes the outputs; ``forward.py``,
``backward.py`` and ``tanh_gradients.py`` are the kernels, of ``scores.py``, ``visible.py`` and ``arithmetic.py``. ``launches.py`` compiles
without a GPU. ``tuning.py`` tries other tiles than those of ``tiles.py``, where ``ONEPASS_TUNE=1``.
"""
