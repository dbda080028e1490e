"""How far apart two correct computations of the same numbers may be.

A processor rounds each number to within half an eps of it. It may add in any order, fuse products
with sums, or keep more digits on the way. Whatever it does, a sum of n products is, to first order,
within

    n * eps / 2 * (sum of the sizes of the products)

of the true one (Higham, "Accuracy and Stability of Numerical Algorithms", chapter 3). Both sides of
a comparison may be that far off, so a tolerance is ``roundings * eps * size``:

- ``eps`` is that of the coarsest dtype on the way.
- ``roundings`` is n; for sums of sums, the terms of each added up. Where a sum is made in blocks,
  see `blocked`.
- ``size`` is what the sizes of the terms add up to, not their sum, which may have cancelled.

No tolerance is a number that was seen to suffice.
"""

from __future__ import annotations

import copy

import torch


def blocked(terms: int, block: int) -> int:
    """Roundings of a sum of so many terms, made of sums of ``block`` of them."""
    return min(terms, block + -(-terms // block))


def assert_near(found, expected, *, roundings, size=None, dtype=None, name=""):
    """``found`` is ``expected`` up to as many roundings of terms of that size.

    ``size`` is a number, or a tensor with one for each result; by default the largest of
    ``expected``. ``dtype`` is the one in which there was rounding, by default that of ``found``.
    """
    assert found.shape == expected.shape, (name, found.shape, expected.shape)
    if not found.numel():
        return
    size = expected.abs().max() if size is None else size
    allowed = roundings * torch.finfo(dtype or found.dtype).eps * torch.as_tensor(size).double()
    difference = (found.double() - expected.double()).abs()
    worst = (difference - allowed).argmax()
    assert (difference <= allowed).all(), (
        f"{name} {found.flatten()[worst]} is {difference.flatten()[worst]} away from "
        f"{expected.flatten()[worst]}; {allowed.expand_as(difference).flatten()[worst]} is allowed"
    )


STEP = 2.0**-20


def sensitivity(results_of, block, x):
    """The ``size`` of results where terms are not counted one by one: how they depend on all.

    It is how far the results move, in proportion, when every parameter and every number of x moves
    a little, in float64, and the largest result itself. ``results_of`` makes a list of tensors of a
    copy of ``block`` and of x.
    """
    block, x = copy.deepcopy(block).double(), x.detach().double()
    before = results_of(block, x)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for values in (*block.parameters(), x := x.clone()):
            up = torch.rand(values.shape, generator=generator) < 0.5
            values.mul_(torch.where(up, 1 + STEP, 1 - STEP))
    after = results_of(block, x)
    with torch.no_grad():
        sizes = [one.abs() + (other - one).abs() / STEP for one, other in zip(before, after)]
    return max(size.max().item() if size.numel() else 0.0 for size in sizes)


def steps_of_block(x, inner):
    """Roundings on the way through a block and back, for x (B, C, *S) and ``inner`` channels.

    Forward: embeddings, comparison and output are sums over channels; the softmax and the weighted
    sums, sums over positions, or in the compact block over all channels of all positions; 20 for
    what is no sum. Backward the same again, and for parameters a sum over the batch.
    """
    positions = x[:1, :1].numel()
    forward = x.shape[1] + 2 * inner + positions * (inner + 1) + 20
    return 2 * forward + len(x) * positions
