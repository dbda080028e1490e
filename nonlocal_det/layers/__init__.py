"""Non-local mechanisms: tensors in, tensors out. Knows torch only."""

from .base import NonLocalBase
from .compact_generalized import KERNELS, CompactGeneralizedNonLocalBlock
from .disentangled import DisentangledNonLocalBlock
from .global_context import GlobalContextBlock
from .non_local import PAIRWISE, NonLocalBlock
from .windowed import WindowedNonLocalBlock

MECHANISMS = {
    "non_local": NonLocalBlock,
    "global_context": GlobalContextBlock,
    "disentangled": DisentangledNonLocalBlock,
    "compact_generalized": CompactGeneralizedNonLocalBlock,
    "grouped": WindowedNonLocalBlock,
}

__all__ = [
    "KERNELS",
    "MECHANISMS",
    "PAIRWISE",
    "CompactGeneralizedNonLocalBlock",
    "DisentangledNonLocalBlock",
    "GlobalContextBlock",
    "WindowedNonLocalBlock",
    "NonLocalBase",
    "NonLocalBlock",
]
