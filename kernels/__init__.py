"""GPU kernels in Triton, imported as ``onepass.kernels``. This version has none: on a GPU the library runs its reference, and says so."""
