"""Non-local blocks, one module per mechanism. They depend on torch alone."""

from ..utils.deprecation import renamed_attributes
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
    "windowed": WindowedNonLocalBlock,
}

__all__ = [
    "KERNELS",
    "MECHANISMS",
    "PAIRWISE",
    "CompactGeneralizedNonLocalBlock",
    "DisentangledNonLocalBlock",
    "GlobalContextBlock",
    "NonLocalBase",
    "NonLocalBlock",
    "WindowedNonLocalBlock",
]

__getattr__ = renamed_attributes(
    __name__,
    {
        "CompactGeneralizedBlock": "CompactGeneralizedNonLocalBlock",
        "DisentangledBlock": "DisentangledNonLocalBlock",
        "GroupedNonLocalBlock": "WindowedNonLocalBlock",
    },
)
