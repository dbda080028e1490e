"""Reading images and videos of any common format as RGB uint8 arrays (H, W, 3)."""

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


def expand_inputs(
    inputs: Iterable[str], skip: Callable[[str], bool] = lambda path: False
) -> list[str]:
    """Expand folders and glob patterns to files.

    Args:
        inputs: Paths of files, folders and glob patterns; a folder yields its images and videos.
        skip: Whether to leave out a file that a folder or pattern yields.

    Returns:
        Paths without duplicates. Paths that do not exist are kept, so that reading them reports
        the error.
    """
    found: list[str] = []
    for path in map(os.path.expanduser, inputs):
        if os.path.isdir(path):
            files = (os.path.join(path, name) for name in sorted(os.listdir(path)))
            found += [f for f in files if f.lower().endswith(IMAGES + VIDEOS) and not skip(f)]
        elif os.path.exists(path) or not glob.has_magic(path):
            found.append(path)
        else:
            files = sorted(filter(os.path.isfile, glob.glob(path, recursive=True))) or [path]
            found += [file for file in files if not skip(file)]
    return list(dict.fromkeys(found))


def is_video(path: str) -> bool:
    """Whether the file extension is that of a video."""
    return path.lower().endswith(VIDEOS)


def read_image_rgb(path: str) -> np.ndarray:
    """Read an image file as a viewer shows it.

    The image is rotated by its EXIF orientation, transparency is composited on white, grayscale is
    converted to RGB, and more than 8 bits per channel are reduced to 8: 32-bit integers by the
    smallest of the ranges of 8, 16 and 32 bits that holds them.

    Args:
        path: Path of the file.

    Returns:
        RGB uint8 image (H, W, 3).

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is not an image, or is corrupt.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"There is no file {path!r}.")
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
            image.load()
    # Pillow raises errors of many types for corrupt files.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path!r} cannot be read as an image: {error}") from error
    return _as_rgb(image)


def _as_rgb(image: Image.Image) -> np.ndarray:
    if image.mode.startswith("I;16"):
        return _gray(np.asarray(image) / 257)
    if image.mode == "I":
        values = np.asarray(image)
        largest = next(m for m in (2**8 - 1, 2**16 - 1, 2**31 - 1) if values.max() <= m)
        return _gray(values * (255 / largest))
    if image.mode == "F":
        values = np.nan_to_num(np.asarray(image))
        return _gray(values * (255 / max(values.max(), 1e-12)))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.array(image.convert("RGB"))


def _gray(values: np.ndarray) -> np.ndarray:
    return np.repeat(np.clip(values + 0.5, 0, 255).astype(np.uint8)[..., None], 3, axis=2)


def read_video(path: str) -> tuple[Iterator[np.ndarray], float]:
    """Open a video file.

    Args:
        path: Path of the file.

    Returns:
        Iterator over the frames, RGB uint8 images (H, W, 3) read one by one, and the frame rate in
        frames per second.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is not a video.
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
def video_writer(path: str, frame_rate: float) -> Iterator[Callable[[np.ndarray], None]]:
    """Write an MP4 file frame by frame.

    Args:
        path: Path of the file.
        frame_rate: Frames per second.

    Yields:
        Function that appends a frame, an RGB uint8 image (H, W, 3); all frames must have the size
        of the first one.

    Raises:
        OSError: If the file cannot be written.
    """
    writers: list[cv2.VideoWriter] = []

    def write(frame: np.ndarray) -> None:
        # Video codecs require an even width and height.
        frame = frame[: frame.shape[0] // 2 * 2, : frame.shape[1] // 2 * 2]
        if not writers:
            size = (frame.shape[1], frame.shape[0])
            codec = cv2.VideoWriter_fourcc(*"mp4v")
            writers.append(cv2.VideoWriter(path, codec, frame_rate, size))
            if not writers[0].isOpened():
                raise OSError(f"The video {path!r} cannot be written.")
        writers[0].write(cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))

    try:
        yield write
    finally:
        for writer in writers:
            writer.release()
