"""NVIDIA Jetson boards."""

from __future__ import annotations

import dataclasses

from devices.base import Profile
from devices.cuda import CudaDevice, board_model


class JetsonDevice(CudaDevice):
    """A CUDA device that shares its memory with the host. Untested; budgets do not count the process yet."""

    kind = "jetson"
    _segments_grow = False

    @classmethod
    def detect(cls) -> Profile | None:
        model = board_model()
        profile = cls._detect() if "jetson" in model.lower() else None
        if profile is None:
            return None
        capabilities = dataclasses.replace(profile.capabilities, unified_memory=True)
        return dataclasses.replace(profile, name=model, capabilities=capabilities)
