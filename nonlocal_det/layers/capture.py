"""Whether the operators of a call run once, or are captured to run again."""

import torch


def is_tracing_or_compiling() -> bool:
    """Whether operators are being captured by a tracer or compiler, for other sizes too."""
    if torch.jit.is_scripting():
        return False
    else:
        return torch.jit.is_tracing() or torch.compiler.is_compiling()
