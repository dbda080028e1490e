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
