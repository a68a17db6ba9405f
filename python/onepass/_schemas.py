"""The ops ``onepass::*``: what they take and give. Each backend implements them for its devices, and the compiled libraries, which have the
same file in them, define them; where there is none, Python does.

Without weights, the ``grad_weights`` of a step's backward is the gradient of its raw scores. Without ``of_query`` a query's gradient is not
asked for, and is of no elements.
"""

import ast
import pathlib

SCHEMAS: tuple[str, ...] = ast.literal_eval(f"({pathlib.Path(__file__).with_name('schemas.inc').read_text()})")
