"""``python -m onepass profile``: where the time of a model goes, and how far its kernels are from what the machine allows. Once this is
imported, ``torch.utils.flop_counter.FlopCounterMode`` counts the ops too, by ``flops.py``.

``targets.py`` finds what to call, ``measure.py`` calls it, ``events.py`` sorts what torch's profiler saw, ``floors.py`` has the ceilings,
``report.py`` the table, ``gpu.py`` what else there is on a GPU, and ``command.py`` the options.
"""

from onepass.profiling import flops as flops
