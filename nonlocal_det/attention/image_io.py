"""Pictures and videos from files, whatever kind they are, as RGB uint8 arrays (H, W, 3)."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Callable

import cv2
import numpy as np
from PIL import Image, ImageOps

IMAGES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
VIDEOS = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".webm")


def expand_inputs(inputs: Iterable[str]) -> list[str]:
    """The files that paths, folders and patterns stand for; a folder gives its images and videos.

    A path that does not exist stays, for whoever opens it to say so.
    """
    found: list[str] = []
    for path in map(os.path.expanduser, inputs):
        if os.path.isdir(path):
            names = sorted(os.listdir(path))
            found += [os.path.join(path, n) for n in names if n.lower().endswith(IMAGES + VIDEOS)]
        elif os.path.exists(path) or not glob.has_magic(path):
            found.append(path)
        else:
            found += sorted(filter(os.path.isfile, glob.glob(path, recursive=True))) or [path]
    return list(dict.fromkeys(found))


def is_video(path: str) -> bool:
    """Whether a file's name ends as videos' do."""
    return path.lower().endswith(VIDEOS)


def read_image_rgb(path: str) -> np.ndarray:
    """An image file as it is meant to be seen.

    It is turned as its EXIF data say; what is transparent is laid on white; grey becomes RGB; more
    than 8 bits become 8.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no image, or a broken one.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"There is no file {path!r}.")
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
            image.load()
    # Pillow raises errors of many kinds for broken files.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path!r} cannot be read as an image: {error}") from error
    return _as_rgb(image)


def _as_rgb(image: Image.Image) -> np.ndarray:
    if image.mode.startswith("I"):
        return _grey(np.asarray(image) / 257)
    if image.mode == "F":
        values = np.nan_to_num(np.asarray(image))
        return _grey(values * (255 / max(values.max(), 1e-12)))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.array(image.convert("RGB"))


def _grey(values: np.ndarray) -> np.ndarray:
    return np.repeat(np.clip(values + 0.5, 0, 255).astype(np.uint8)[..., None], 3, axis=2)


def read_video(path: str) -> tuple[Iterator[np.ndarray], float]:
    """The frames of a video, read one by one, and how many there are in a second.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no video.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"There is no file {path!r}.")
    video = cv2.VideoCapture(path)
    more, first = video.read()
    if not more:
        raise ValueError(f"{path!r} cannot be read as a video.")
    return _frames(video, first), video.get(cv2.CAP_PROP_FPS) or 25.0


def _frames(video: cv2.VideoCapture, frame: np.ndarray) -> Iterator[np.ndarray]:
    more = True
    while more:
        yield cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)
        more, frame = video.read()
    video.release()


@contextmanager
def video_writer(path: str, rate: float) -> Iterator[Callable[[np.ndarray], None]]:
    """A function that adds a frame to an MP4 file; the first frame sets its size.

    Raises:
        OSError: if the file cannot be written.
    """
    writers: list[cv2.VideoWriter] = []

    def write(frame: np.ndarray) -> None:
        # Codecs take even sizes only.
        frame = frame[: frame.shape[0] // 2 * 2, : frame.shape[1] // 2 * 2]
        if not writers:
            size = (frame.shape[1], frame.shape[0])
            writers.append(cv2.VideoWriter(path, cv2.VideoWriter_fourcc(*"mp4v"), rate, size))
            if not writers[0].isOpened():
                raise OSError(f"The video {path!r} cannot be written.")
        writers[0].write(cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))

    try:
        yield write
    finally:
        for writer in writers:
            writer.release()
