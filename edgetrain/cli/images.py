"""What ``edgetrain generate`` does for a generator of images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgetrain.cli import options
from edgetrain.errors import DiskError, UsageError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from edgetrain.session import Session

_OF_EACH_CLASS = 8
_GAP = 2  # pixels between two images


@dataclass(frozen=True)
class Wanted:
    """``classes``: numbers or names with commas between; None: all. ``count``: of all images."""

    file: Path
    count: int | None
    classes: str | None
    steps: int
    guidance: float
    seed: int


def paint(session: Session, wanted: Wanted, budget: int | None, device: str, threads: int, as_json: bool) -> None:
    """Writes a PNG with a grid of images, the classes in turn, as many columns as there are classes."""
    budget = options.saved_budget(session, budget)
    options.warn_of_untrained(session)
    chosen, labels = _labels(session.class_names, wanted)
    options.start_torch(threads)
    import devices
    from edgetrain.image_sampling import ImageSampler

    spec = session.spec
    micro_batch = min(session.progress(block).micro_batch for block in range(spec.num_blocks))
    opened = devices.open_device(device)
    sampler = ImageSampler(session, opened, micro_batch or 1)
    sampler.warm_up()
    with sampler.within(budget, "generating images"):
        images = sampler.generate(labels, wanted.steps, wanted.guidance, wanted.seed)
        _write(grid_of(images, len(chosen)), wanted.file)
    _report(wanted, labels, opened.memory.peak_bytes(), budget, as_json)


def paint_exported(folder: Path, wanted: Wanted, budget: int | None, threads: int, as_json: bool) -> None:
    """The same by an export to ONNX, without torch."""
    from devices.limits import prepare_process

    prepare_process(threads)
    from devices.meter import usage
    from exporters.image_runtime import ImageGenerator
    from exporters.manifest import MODEL, WEIGHTS
    from exporters.serving import within

    generator = ImageGenerator(folder, threads)
    chosen, labels = _labels(generator.manifest.class_names, wanted)
    manifest = generator.manifest
    weights_bytes = manifest.files[MODEL if manifest.single_file else WEIGHTS].bytes
    with within(budget, "generating images", weights_bytes, weights_bytes // manifest.schedule.num_blocks):
        images = generator.generate(labels, wanted.steps, wanted.guidance, wanted.seed)
    _write(grid_of(images, len(chosen)), wanted.file)
    _report(wanted, labels, usage().peak_bytes, budget, as_json)


def _report(wanted: Wanted, labels: list[int], peak_bytes: int, budget: int | None, as_json: bool) -> None:
    from edgetrain.units import format_bytes

    value: dict[str, Any] = {
        "file": str(wanted.file), "images": len(labels), "classes": labels, "steps": wanted.steps,
        "guidance": wanted.guidance, "seed": wanted.seed, "peak_bytes": peak_bytes,
        "budget_bytes": budget,
    }  # fmt: skip
    of_budget = "" if budget is None else f" of {format_bytes(budget)}"
    peak = f"peak {format_bytes(value['peak_bytes'])}{of_budget}"
    options.emit(value, as_json, lambda: f"{wanted.file}: {len(labels)} images; {peak}")


def _labels(names: Sequence[str], wanted: Wanted) -> tuple[list[int], list[int]]:
    """The classes wanted, and that of each image."""
    chosen = _chosen(names, wanted.classes)
    count = wanted.count or _OF_EACH_CLASS * len(chosen)
    return chosen, [chosen[i % len(chosen)] for i in range(count)]


def _chosen(names: Sequence[str], classes: str | None) -> list[int]:
    """The classes wanted, by number."""
    if classes is None:
        return list(range(len(names)))
    chosen = []
    for word in (part.strip() for part in classes.split(",")):
        if word in names:
            chosen.append(names.index(word))
        elif word.isdecimal() and int(word) < len(names):
            chosen.append(int(word))
        else:
            raise UsageError(f"there is no class {word!r}", f"There are 0 to {len(names) - 1}: {', '.join(names)}.")
    return chosen


def grid_of(images: NDArray[np.uint8], columns: int) -> NDArray[np.uint8]:
    """images (n, C, H, W), row by row on black -> (height, width, C)."""
    import numpy as np

    n, channels, height, width = images.shape
    rows = -(-n // columns)
    grid = np.zeros((rows * (height + _GAP) - _GAP, columns * (width + _GAP) - _GAP, channels), np.uint8)
    for number, image in enumerate(images):
        row, column = divmod(number, columns)
        top, left = row * (height + _GAP), column * (width + _GAP)
        grid[top : top + height, left : left + width] = image.transpose(1, 2, 0)
    return grid


def _write(grid: NDArray[np.uint8], file: Path) -> None:
    from PIL import Image

    pixels: Any = grid[..., 0] if grid.shape[2] == 1 else grid
    aside = file.with_name(f"{file.name}.part")
    try:
        Image.fromarray(pixels).save(aside, format="PNG")
        aside.replace(file)
    except OSError as error:
        raise DiskError(f"{file} cannot be written: {error}", "Choose another place by --to.") from error
