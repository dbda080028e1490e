"""Reading files of weights without running code that they may contain.

A pickle can call any function that it names. Here a ``.pth`` is read by torch's own restricted
reader (``weights_only``), and a ``.pkl``, the format of detectron2's and Caffe2's model zoos, by an
unpickler that knows numpy's arrays, scalars and dtypes and plain containers, and nothing else.

numpy's own constructors are not among the names: from a forged dtype or buffer they take object
pointers. Stand-ins build arrays of numbers and strings alone.
"""

from __future__ import annotations

import pickle
import re
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, Union

import numpy as np
import torch

_KINDS = "biufcSU"  # numpy's letters for booleans, numbers and strings
_TORCH_REFUSAL = re.compile(r"(?:GLOBAL|Unsupported class) ([\w.]+)")


class UnsafeWeightsError(ValueError):
    """A file of weights names something other than tensors, arrays and plain containers.

    Args:
        path: Path of the file.
        found: Its first such content, such as "posix.system".
    """

    def __init__(self, path: str, found: str) -> None:
        super().__init__(
            f"{path!r} was not loaded, because it could run code: it holds {found}, where weights "
            f"hold only tensors, arrays and plain containers."
        )


def load_pth(path: str) -> Any:
    """Read a file that ``torch.save`` has written, onto the CPU.

    Raises:
        UnsafeWeightsError: If it holds more than tensors and plain containers.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        refused = _TORCH_REFUSAL.search(str(error))
        if refused is None:
            raise
        raise UnsafeWeightsError(path, refused[1]) from None


def load_pkl(path: str) -> Any:
    """Read a pickle of numpy arrays, by any version of Python and numpy.

    Raises:
        UnsafeWeightsError: If it holds more than arrays and plain containers.
    """
    with open(path, "rb") as file:
        return _ArrayUnpickler(file, path).load()


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickler that builds arrays and plain containers only.

    What a name stands for is a bound method, to which a pickle cannot assign.
    """

    def __init__(self, file: Any, path: str) -> None:
        super().__init__(file, encoding="latin1")  # strings of Python 2 hold bytes
        self._path = path
        self._known = self._names()

    def _names(self) -> dict[tuple[str, str], Any]:
        known: dict[tuple[str, str], Any] = {
            ("_codecs", "encode"): self._encode,
            ("collections", "OrderedDict"): OrderedDict,
            ("numpy", "dtype"): self._dtype,
            ("numpy", "ndarray"): None,  # only an argument of _reconstruct
        }
        for module in ("__builtin__", "builtins"):
            known.update({(module, kind.__name__): kind for kind in (set, frozenset)})
            known[module, "bytes"] = self._no_bytes
        for core in ("numpy.core", "numpy._core"):
            known[f"{core}.multiarray", "_reconstruct"] = self._reconstruct
            known[f"{core}.multiarray", "scalar"] = self._scalar
            known[f"{core}.numeric", "_frombuffer"] = self._from_buffer
        return known

    def find_class(self, module: str, name: str) -> Any:
        """Return the stand-in for a name of the pickle.

        Raises:
            UnsafeWeightsError: If there is none.
        """
        if (module, name) not in self._known:
            raise UnsafeWeightsError(self._path, f"{module}.{name}")
        return self._known[module, name]

    def _encode(self, text: str, encoding: str) -> bytes:
        """``_codecs.encode``, by which Python 3 writes bytes into an old protocol."""
        if encoding not in ("latin1", "latin-1"):
            raise pickle.UnpicklingError(f"bytes in {encoding!r}")
        return text.encode("latin1")

    def _no_bytes(self) -> bytes:
        """``bytes()``, by which Python 3 writes empty bytes into an old protocol."""
        return b""

    def _dtype(self, code: str, align: bool = False, copy: bool = False) -> _DType:
        dtype = np.dtype(str(code))
        if dtype.kind not in _KINDS:
            raise UnsafeWeightsError(self._path, f"an array of dtype {dtype}")
        return _DType(dtype)

    def _reconstruct(self, kind: None, shape: Sequence[int], code: Union[str, bytes]) -> _Array:
        """An empty array, whose state follows."""
        return np.ndarray.__new__(_Array, (0,))

    def _scalar(self, dtype: _DType, data: Union[str, bytes]) -> Any:
        return np.frombuffer(_as_bytes(data), dtype.dtype)[0]

    def _from_buffer(
        self, data: bytes, dtype: _DType, shape: Sequence[int], order: str, *axes: Any
    ) -> np.ndarray:
        """An array of protocol 5; numpy 2 gives the axes of one that is neither "C" nor "F"."""
        flat = np.frombuffer(data, dtype.dtype).astype(dtype.dtype.newbyteorder("="))
        if order == "K":
            return flat.reshape(shape).transpose(*axes)
        return flat.reshape(shape, order=order)


class _DType:
    """A dtype of numbers or strings, of which a pickle can set nothing but the byte order."""

    def __init__(self, dtype: np.dtype) -> None:
        self.dtype = dtype

    def __setstate__(self, state: Sequence[Any]) -> None:
        if state[1] in ("<", ">"):
            self.dtype = self.dtype.newbyteorder(state[1])


class _Array(np.ndarray):
    """An array that takes its dtype from a `_DType` alone."""

    def __setstate__(self, state: Sequence[Any]) -> None:
        version, shape, dtype, is_fortran, data = state
        super().__setstate__((version, shape, dtype.dtype, is_fortran, _as_bytes(data)))


def _as_bytes(data: Union[str, bytes]) -> bytes:
    """The bytes that a pickle of Python 2 holds as a string."""
    return data.encode("latin1") if isinstance(data, str) else data
