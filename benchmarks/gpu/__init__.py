"""What can be known about GPU kernels without a GPU; `benchmarks/gpuless.py` puts it together."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2] / "tests"))  # for ptx, the machine that executes PTX
