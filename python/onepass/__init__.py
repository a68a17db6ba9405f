"""Fused attention for recurrent sequence-to-sequence models: the scores, the softmax and the context vector in one pass."""

from onepass import _tree as _tree
from onepass import decompositions, reference
from onepass._version import __version__
from onepass.functional import additive_attention, additive_scores, multiplicative_attention
from onepass.memory import AttentionMemory, additive_memory, multiplicative_memory
from onepass.modules import AdditiveAttention, MultiplicativeAttention

__all__ = [
    "AdditiveAttention",
    "AttentionMemory",
    "MultiplicativeAttention",
    "__version__",
    "additive_attention",
    "additive_memory",
    "additive_scores",
    "decompositions",
    "multiplicative_attention",
    "multiplicative_memory",
    "reference",
]
