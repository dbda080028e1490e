"""Non-local mechanisms: tensors in, tensors out. Knows torch only."""

from .base import NonLocalBase
from .compact_generalized import KERNELS, CompactGeneralizedBlock
from .disentangled import DisentangledBlock
from .global_context import GlobalContextBlock
from .grouped import GroupedNonLocalBlock
from .non_local import PAIRWISE, NonLocalBlock

MECHANISMS = {
    "non_local": NonLocalBlock,
    "global_context": GlobalContextBlock,
    "disentangled": DisentangledBlock,
    "compact_generalized": CompactGeneralizedBlock,
    "grouped": GroupedNonLocalBlock,
}

__all__ = [
    "KERNELS",
    "MECHANISMS",
    "PAIRWISE",
    "CompactGeneralizedBlock",
    "DisentangledBlock",
    "GlobalContextBlock",
    "GroupedNonLocalBlock",
    "NonLocalBase",
    "NonLocalBlock",
]
