"""Byte sizes and durations, as people write and read them."""

from __future__ import annotations

import math
import re

from edgetrain.errors import UsageError

MIB = 1 << 20
_MARGIN_OF_ADVICE = 0.01  # a budget that is advised must do, though the next probe may measure a little more

_FACTORS = {
    "": 1, "b": 1,
    "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
    "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40,
}  # fmt: skip
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", re.IGNORECASE)


def parse_bytes(text: str) -> int:
    """``"350MiB"`` -> 367001600. MB is 10^6 bytes, MiB is 2^20.

    Raises:
        UsageError: the text is no positive size.
    """
    match = _SIZE.fullmatch(text)
    factor = _FACTORS.get(match[2].lower()) if match else None
    num_bytes = int(float(match[1]) * factor) if match and factor else 0
    if num_bytes <= 0:
        raise UsageError(f"{text!r} is not a size in bytes", "Write it like 350MiB, 1.5GB or 400000000.")
    return num_bytes


def format_bytes(num_bytes: float) -> str:
    """``367001600`` -> ``"350.0 MiB"``; the unit keeps the number readable."""
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if abs(num_bytes) >= size * (10 if unit == "GiB" else 1):
            return f"{num_bytes / size:.1f} {unit}"
    return f"{num_bytes:.0f} B"


def advised_mib(needed_bytes: float) -> int:
    """The budget to name, in whole MiB, where so much is needed."""
    return math.ceil(needed_bytes * (1 + _MARGIN_OF_ADVICE) / MIB)


def format_seconds(seconds: float) -> str:
    """``0.0123`` -> ``"12.3 ms"``; ``12.3`` -> ``"12.3 s"``."""
    return f"{seconds:.1f} s" if seconds >= 1 else f"{seconds * 1000:.1f} ms"


def format_duration(seconds: float) -> str:
    """``3725`` -> ``"1:02:05"``; ``59.6`` -> ``"1:00"``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
