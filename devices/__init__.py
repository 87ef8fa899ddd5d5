"""Devices to train on, behind one interface; the limits and meters of the process around them.

Importing this package does not import torch; opening a device does.
"""

from __future__ import annotations

import importlib
from pathlib import Path

from devices.base import Buffer, Capabilities, Device, DeviceOutOfMemory, Event, Offloaded, Profile, Tier

__all__ = [
    "KINDS",
    "Buffer",
    "Capabilities",
    "Device",
    "DeviceOutOfMemory",
    "Event",
    "Offloaded",
    "Profile",
    "Tier",
    "available",
    "detect",
    "open_device",
]

_CLASSES = {
    "jetson": "JetsonDevice",
    "cuda": "CudaDevice",
    "mps": "MpsDevice",
    "cpu": "CpuDevice",
    "emulated": "EmulatedDevice",
}
KINDS = tuple(_CLASSES)
"""Every kind of device; `devices.KIND` is its module."""


def available() -> list[Profile]:
    """This machine's devices, the one that "auto" opens first. Imports torch only beside an accelerator."""
    found = [detect(kind) for kind in KINDS if kind != "emulated"]
    return [profile for profile in found if profile is not None]


def detect(kind: str) -> Profile | None:
    """This machine's device of that kind, None without one. Imports torch only for an accelerator that may be there."""
    return _device_class(kind).detect()


def open_device(kind: str = "auto", scratch: Path | None = None) -> Device:
    """The device of that kind; ``scratch`` is the folder for its disk tier.

    Raises:
        ValueError: no such kind.
        RuntimeError: this machine has no such device.
        OSError: the scratch folder is missing or not writable.
    """
    if kind != "auto" and kind not in _CLASSES:
        raise ValueError(f"{kind!r} is not a kind of device; there are auto, {', '.join(KINDS)}")
    return _device_class(available()[0].kind if kind == "auto" else kind)(scratch=scratch)


def _device_class(kind: str) -> type[Device]:
    device_class: type[Device] = getattr(importlib.import_module(f"devices.{kind}"), _CLASSES[kind])
    return device_class
