"""Files of weights from strangers: what may be loaded, and what is refused before it runs.

Mutations tried by hand; each makes at least one test here fail: numpy's own dtype or ndarray among
the names; every name of an allowed module; `torch.load` without ``weights_only``.
"""

from __future__ import annotations

import os
import pickle
import struct
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import zoo_config

from nonlocal_det.checkpoint.detection_checkpoint import NonLocalCheckpointer
from nonlocal_det.checkpoint.predictor import Predictor
from nonlocal_det.checkpoint.safe_load import UnsafeWeightsError, load_pkl, load_pth
from nonlocal_det.engine.model_check import check_weights


class Call:
    """An object whose pickle calls a function when it is loaded."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.__reduce__ = lambda: (function, arguments)

    def __reduce_ex__(self, protocol: int) -> Any:
        return self.__reduce__()


def global_name(module: str, name: str, protocol: int = 2) -> bytes:
    """A pickle that only names something, which a normal unpickler imports."""
    if protocol < 4:
        return b"\x80\x02c" + f"{module}\n{name}\n".encode() + b"."
    texts = b"".join(b"\x8c" + bytes([len(text)]) + text.encode() for text in (module, name))
    return b"\x80\x04" + texts + b"\x93."


# Its code and its byte order are filled in; the other state is that of plain numbers.
DTYPE = (
    b"cnumpy\ndtype\nU\x02%sK\x00K\x01\x87R(K\x03U\x01%sNNN" + 2 * b"J\xff\xff\xff\xff" + b"K\x00tb"
)


def object_array() -> bytes:
    """An array of objects by a dtype whose forged flags say that it holds numbers."""
    return python2_array(DTYPE % (b"O8", b"|"), b"A" * 8, 1)


def python2_array(dtype: bytes, data: bytes, length: int) -> bytes:
    """An array as Python 2 and numpy 1 pickle it: its bytes are a string."""
    start = b"\x80\x02cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
    state = b"(K\x01K" + bytes([length]) + b"\x85" + dtype + b"\x89T"
    return start + state + struct.pack("<i", len(data)) + data + b"tb."


@pytest.fixture
def evil(tmp_path: Path) -> Call:
    """An object that leaves a file when it is loaded; none may be there in the end."""
    yield Call(os.system, f"touch {tmp_path / 'ran'}")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_that_runs_code_is_refused(
    nested: bool, protocol: int, evil: Call, tmp_path: Path
) -> None:
    path = tmp_path / "evil.pkl"
    path.write_bytes(pickle.dumps({"model": {"a": [(evil,)]}} if nested else evil, protocol))
    with pytest.raises(UnsafeWeightsError, match=r"evil\.pkl' was not loaded.* posix\.system"):
        load_pkl(str(path))


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("nested", [False, True])
def test_a_torch_file_that_runs_code_is_refused(
    nested: bool, zipped: bool, evil: Call, tmp_path: Path
) -> None:
    path = tmp_path / "evil.pth"
    content = {"model": {"a": torch.ones(2), "b": [(evil,)]}} if nested else evil
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UnsafeWeightsError, match=r"evil\.pth' was not loaded.* posix\.system"):
        load_pth(str(path))


FORBIDDEN = {
    "another function of an allowed module": (global_name("numpy", "fromfile"), "numpy.fromfile"),
    "another of numpy's core": (
        global_name("numpy.core.multiarray", "fromstring"),
        "numpy.core.multiarray.fromstring",
    ),
    "what an allowed name leads to": (
        global_name("collections", "OrderedDict.__class__", 4),
        "collections.OrderedDict.__class__",
    ),
    "what an allowed module imports": (
        global_name("numpy", "core.multiarray.os.system", 4),
        "numpy.core.multiarray.os.system",
    ),
    "a built-in function": (global_name("__builtin__", "eval"), "__builtin__.eval"),
    "the same in Python 3": (global_name("builtins", "exec", 4), "builtins.exec"),
    "an import": (global_name("no_such_module", "x"), "no_such_module.x"),
    "pointers for objects": (object_array(), "an array of dtype object"),
}


@pytest.mark.parametrize("case", FORBIDDEN)
def test_names_beside_the_allowed_ones_are_refused(case: str, tmp_path: Path) -> None:
    content, said = FORBIDDEN[case]
    path = tmp_path / "evil.pkl"
    path.write_bytes(content)
    with pytest.raises(UnsafeWeightsError) as error:
        load_pkl(str(path))
    assert f"it holds {said}, where" in str(error.value)


def test_numpy_constructors_cannot_be_called_with_a_buffer(tmp_path: Path) -> None:
    """``ndarray((1,), "O", b"AAAAAAAA")`` would take the bytes for a pointer."""
    path = tmp_path / "evil.pkl"
    path.write_bytes(b"\x80\x02cnumpy\nndarray\nK\x01\x85U\x01OC\x08AAAAAAAA\x87R.")
    with pytest.raises(TypeError):
        load_pkl(str(path))


def arrays() -> dict[str, Any]:
    return {
        "float": np.arange(6, dtype=np.float32).reshape(2, 3),
        "columns first": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "strided": np.arange(24.0).reshape(2, 3, 4).transpose(1, 0, 2),
        "big endian": np.arange(3, dtype=">i8"),
        "no element": np.zeros((0, 4), np.float16),
        "no dimension": np.array(7, np.uint8),
        "booleans": np.array([True, False]),
        "bytes": np.array([b"ab", b"c"]),
        "texts": np.array(["ab", "\u00e9"]),
        "scalar": np.float64(1.5),
        "complex scalar": np.complex64(1j),
    }


@pytest.mark.parametrize("numpy", ["as it is", "1"])
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_arrays_of_any_protocol_are_read(protocol: int, numpy: str, tmp_path: Path) -> None:
    path = tmp_path / "model.pkl"
    content = pickle.dumps(arrays(), protocol)
    if numpy == "1" and protocol < 4:  # later names have their length before them
        content = content.replace(b"numpy._core.", b"numpy.core.")
    path.write_bytes(content)
    loaded = load_pkl(str(path))
    assert loaded.keys() == arrays().keys()
    for name, expected in arrays().items():
        assert loaded[name].dtype == expected.dtype.newbyteorder("="), name  # as torch needs it
        np.testing.assert_array_equal(loaded[name], expected, err_msg=name)


def test_plain_containers_are_read(tmp_path: Path) -> None:
    content = {
        "dict": OrderedDict(a=[1, (2.5, None)], b={True, "x"}),
        "bytes": (b"", b"\xff"),
        "frozen": frozenset([1]),
    }
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        path = tmp_path / f"{protocol}.pkl"
        path.write_bytes(pickle.dumps(content, protocol))
        assert load_pkl(str(path)) == content


@pytest.mark.parametrize("order", [b"<", b">"])
def test_an_array_of_python_2_is_read(order: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.pkl"
    numbers = np.array([1.5, -2, 3e38], order.decode() + "f4")
    path.write_bytes(python2_array(DTYPE % (b"f4", order), numbers.tobytes(), 3))
    np.testing.assert_array_equal(load_pkl(str(path)), numbers)


class Stem(torch.nn.Module):
    """A model with one tensor of each zoo's name for it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = torch.nn.Module()
        self.stem.conv1 = torch.nn.Conv2d(3, 4, 1, bias=False)


WEIGHT = np.arange(12, dtype=np.float32).reshape(4, 3, 1, 1)
ZOO = {
    "detectron2": ("pkl", {"model": {"stem.conv1.weight": WEIGHT}, "__author__": "somebody"}),
    "matched by heuristics": (
        "pkl",
        {"model": {"conv1.weight": WEIGHT}, "__author__": "MSRA", "matching_heuristics": True},
    ),
    "Caffe2's ImageNet": ("pkl", {"conv1_w": WEIGHT, "conv1_w_momentum": WEIGHT}),
    "Detectron": ("pkl", {"blobs": {"conv1_w": WEIGHT}, "cfg": "MODEL:\n"}),
    "pycls": ("pyth", {"model_state": {"conv1.weight": torch.as_tensor(WEIGHT)}, "epoch": 1}),
    "torch": ("pth", {"model": {"stem.conv1.weight": torch.as_tensor(WEIGHT)}}),
    "state dict alone": ("pth", OrderedDict({"stem.conv1.weight": torch.as_tensor(WEIGHT)})),
}


@pytest.mark.parametrize("zoo", ZOO)
def test_the_weights_of_every_zoo_are_loaded(zoo: str, tmp_path: Path) -> None:
    ending, content = ZOO[zoo]
    path = tmp_path / f"model.{ending}"
    if ending == "pkl":
        path.write_bytes(pickle.dumps(content, 2))
    else:
        torch.save(content, path)
    model = Stem()
    NonLocalCheckpointer(model).load(str(path))
    np.testing.assert_array_equal(model.stem.conv1.weight.detach(), WEIGHT)


@pytest.mark.parametrize("ending", ["pkl", "pth", "pyth"])
def test_nothing_runs_by_any_way_into_a_model(ending: str, evil: Call, tmp_path: Path) -> None:
    path = tmp_path / f"evil.{ending}"
    content = {"model": {"stem.conv1.weight": evil}, "__author__": "x", "model_state": {}}
    if ending == "pkl":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path)
    with pytest.raises(UnsafeWeightsError):
        check_weights(str(path), Stem(), require_complete=False)
    with pytest.raises(UnsafeWeightsError):
        NonLocalCheckpointer(Stem()).load(str(path))
    cfg = zoo_config("COCO-Detection/retinanet_R_50_FPN_1x.yaml")
    cfg.MODEL.WEIGHTS = str(path)
    with pytest.raises(UnsafeWeightsError):
        Predictor(cfg)
