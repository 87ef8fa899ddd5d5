"""Image files, decoded with Pillow, which is imported when the first one is opened."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from edgetrain.data.files import reading
from edgetrain.errors import BadInput

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
_FORMATS = ("PNG", "JPEG", "BMP", "WEBP")  # no other decoder is offered a file, whatever it is named


def image_shape(path: Path) -> tuple[int, int, int]:
    """``(channels, height, width)`` by the header alone: 1 channel for a grey image, 3 for all others.

    Raises:
        BadInput: the file is missing, unreadable, no image, or larger than Pillow thinks safe.
    """
    with _opened(path) as image:
        return (1 if image.mode == "L" else 3, image.height, image.width)


def load_image(path: Path, image_shape: tuple[int, int, int]) -> NDArray[np.uint8]:
    """Any image file as pixels of ``image_shape = (C, H, W)``, C = 1 (grey) or 3 (RGB).

    Another size is scaled, not cropped, with the bilinear filter, widened where the image shrinks.

    Raises:
        BadInput: the file is missing, unreadable, no image, damaged, or larger than Pillow thinks safe.
    """
    from PIL.Image import Resampling

    channels, height, width = image_shape
    with _opened(path) as image:
        converted = image.convert("L" if channels == 1 else "RGB")
        if converted.size != (width, height):
            converted = converted.resize((width, height), Resampling.BILINEAR)
        pixels = np.array(converted, np.uint8).reshape(height, width, channels)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))  # (C, H, W)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Image]:
    from PIL import Image, UnidentifiedImageError

    with reading(path), path.open("rb") as file:
        try:
            with Image.open(file, formats=_FORMATS) as image:
                limit = Image.MAX_IMAGE_PIXELS
                if limit is not None and image.width * image.height > limit:
                    raise Image.DecompressionBombError(f"{image.width}x{image.height} is over {limit} pixels")
                yield image
        except MemoryError:
            raise
        except Image.DecompressionBombError as error:
            raise BadInput(f"{path} is too large an image: {error}", "Scale it down first.") from error
        except UnidentifiedImageError as error:
            raise BadInput(
                f"{path} is no PNG, JPEG, BMP or WebP image, or its header is damaged",
                "Convert, replace or remove it.",
            ) from error
        except Exception as error:  # damaged files make the decoders raise nearly anything
            raise BadInput(f"{path} is a damaged image: {error}", "Replace or remove it.") from error
