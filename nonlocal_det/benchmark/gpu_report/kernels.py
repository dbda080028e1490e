"""Which attention kernels the softmax really runs: seen by the profiler, alone, and by memory."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from ...errors import summarize_error
from ...layers.pairwise import softmax_attention
from ..cases import DTYPES, precision
from ..measure import median_seconds, peak_memory

# Operators that PyTorch dispatches attention to, and our own, by part of their name. "dense" holds
# all attention weights.
PATHS = {
    "_TiledSoftmaxAttention": "tiles",
    "_scaled_dot_product_flash_attention": "flash",
    "_scaled_dot_product_efficient_attention": "memory-efficient",
    "_scaled_dot_product_cudnn_attention": "cuDNN",
    "_scaled_dot_product_fused_attention_overrideable": "fused",
    "_scaled_dot_product_attention_math": "dense",
}
BACKENDS = {
    "flash": "FLASH_ATTENTION",
    "memory-efficient": "EFFICIENT_ATTENTION",
    "cuDNN": "CUDNN_ATTENTION",
    "dense": "MATH",
}
_SECONDS = 0.1  # of timing
_MAX_KERNELS = 4


@dataclass(frozen=True)
class Call:
    """A call of `softmax_attention`.

    Attributes:
        width: Channels of queries and keys, D.
        value_width: Channels of the values, V.
        positions: Number of queries and of keys.
        dtype: Name of the dtype, one of `DTYPES`.
        mode: "inference" for the forward pass, "training" for forward and backward.
        device: "cpu" or "cuda".
        masked: Whether some keys are padding.
    """

    width: int
    value_width: int
    positions: int
    dtype: str
    mode: str
    device: str
    masked: bool = False

    @property
    def name(self) -> str:
        """Label in tables."""
        values = "" if self.width == self.value_width else f" and {self.value_width}"
        masked = ", masked" if self.masked else ""
        return f"{self.width}{values}, {self.dtype}, {self.mode}{masked}"


def measure_kernels(call: Call) -> dict[str, Any]:
    """Find the path that a call takes, and try each backend of PyTorch alone.

    Returns:
        ``taken``: one of the values of `PATHS`; ``kernels``: the GPU's kernels that took longest;
        ``seconds``; ``bytes``: peak memory; ``bytes_per_weight``: the part of it that grows with
        queries times keys, None on a CPU, where it is not exact; ``dense``: whether that, or the
        path, shows that all attention weights are held; ``alone``: for each of `BACKENDS`, unless
        none is called, its ``seconds``, or why it ``refused``.
    """
    with precision(call.dtype):
        inputs = _inputs(call)
        _attend(call, inputs)  # loads code
        taken, kernels = _profiled(call, inputs)
        seconds = median_seconds(call.device, lambda: _attend(call, inputs), _SECONDS)
        backends = {} if taken == "tiles" else BACKENDS
        alone = {name: _alone(call, inputs, backend) for name, backend in backends.items()}
        peak, half = _peak(call), _peak(replace(call, positions=call.positions // 2))
    # What grows with the positions is twice as much, and cancels.
    per_weight = (peak - 2 * half) / (call.positions**2 / 2) if call.device == "cuda" else None
    return {
        "taken": taken,
        "kernels": kernels,
        "seconds": seconds,
        "bytes": peak,
        "bytes_per_weight": per_weight,
        "dense": taken == "dense" or (per_weight is not None and per_weight >= 1),
        "alone": alone,
    }


def _peak(call: Call) -> float:
    inputs = _inputs(call)
    return peak_memory(call.device, lambda: _attend(call, inputs))


def _inputs(call: Call) -> list[Tensor]:
    torch.manual_seed(0)
    options = {
        "dtype": DTYPES[call.dtype],
        "device": call.device,
        "requires_grad": call.mode == "training",
    }
    widths = call.width, call.width, call.value_width
    return [torch.randn(1, width, call.positions, **options) for width in widths]


def _attend(call: Call, inputs: list[Tensor]) -> None:
    mask = None
    if call.masked:
        mask = torch.arange(call.positions, device=call.device)[None] < call.positions * 3 // 4
    y = softmax_attention(*inputs, mask, call.width**-0.5)
    if call.mode == "training":
        torch.autograd.grad(y, inputs, torch.ones_like(y))


def _profiled(call: Call, inputs: list[Tensor]) -> tuple[str, list[str]]:
    activities = [ProfilerActivity.CPU]
    if call.device == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as profiler:
        _attend(call, inputs)
        if call.device == "cuda":
            torch.cuda.synchronize()
    events = profiler.events()
    return path_of(event.name for event in events), longest_kernels(events)


def path_of(operators: Iterable[str]) -> str:
    """The value of `PATHS` for the operators that ran, or "unknown"."""
    names = list(operators)
    taken = [path for part, path in PATHS.items() if any(part in name for name in names)]
    return taken[0] if taken else "unknown"


def longest_kernels(events: Iterable[Any]) -> list[str]:
    """Names of the GPU's kernels among a profiler's events that took longest in total."""
    seconds: dict[str, float] = {}
    for event in events:
        if event.device_type == DeviceType.CUDA:
            seconds[event.name] = seconds.get(event.name, 0.0) + event.time_range.elapsed_us()
    return sorted(seconds, key=lambda name: -seconds[name])[:_MAX_KERNELS]


def _alone(call: Call, inputs: list[Tensor], backend: str) -> dict[str, Any]:
    """Seconds with one backend allowed, or the reason why it refuses."""
    from torch.nn.attention import SDPBackend, sdpa_kernel  # not in torch before 2.3

    if backend not in SDPBackend.__members__:
        return {"refused": "not in this torch"}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            with sdpa_kernel(SDPBackend.__members__[backend]):
                run = partial(_attend, call, inputs)
                return {"seconds": median_seconds(call.device, run, _SECONDS)}
        except RuntimeError as error:
            return {"refused": refusal([str(warning.message) for warning in caught], error)}


def refusal(messages: Sequence[str], error: Exception) -> str:
    """Why a backend refuses, from PyTorch's warnings, which also name the others as disabled."""
    said = [message.partition(" (Triggered")[0].strip() for message in messages]
    reasons = [text for text in said if "disabled" not in text and not text.endswith("because:")]
    return reasons[0].partition("\n")[0] if reasons else summarize_error(error)
