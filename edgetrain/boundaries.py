"""The tensors between two visits of exact training: kept in device memory, or moved to a slower tier."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from devices import Buffer, Device, Offloaded, Tier

Key = tuple[str, int, int]
"""(what, position, micro-batch)."""


class Boundaries:
    """Named tensors by key. ``moves``: whether they go to ``tier`` until they are asked for."""

    def __init__(self, device: Device, moves: bool, tier: Tier) -> None:
        self._device, self.moves, self._tier = device, moves, tier
        self._held: dict[Key, dict[str, Tensor | Offloaded]] = {}
        self.moved_bytes = 0

    def put(self, key: Key, tensors: Mapping[str, Tensor], moves: bool = False) -> None:
        """Takes the tensors, in place of what the key had. ``moves``: these move in any case."""
        self.drop(key)
        self._held[key] = {name: self._out(tensor, moves or self.moves) for name, tensor in tensors.items()}

    def get(self, key: Key) -> dict[str, Tensor]:
        """The tensors, without history; they stay here too."""
        return {n: held if isinstance(held, Tensor) else held.restore() for n, held in self._held[key].items()}

    def has(self, key: Key) -> bool:
        return key in self._held

    def drop(self, key: Key) -> None:
        """Forgets a key, if it is there."""
        for held in self._held.pop(key, {}).values():
            if isinstance(held, Offloaded):
                held.release()

    def clear(self) -> None:
        for key in list(self._held):
            self.drop(key)

    def _out(self, tensor: Tensor, moves: bool) -> Tensor | Offloaded:
        tensor = tensor.detach()
        if not moves:
            return tensor
        moved = self._device.offload(tensor, self._tier)
        self.moved_bytes += moved.nbytes
        return moved


class Spill:
    """Gradients on their way from one visit to another: copies of the first bytes of a buffer, by name."""

    def __init__(self, device: Device, moves: bool, tier: Tier) -> None:
        self._device, self._tier = device, tier if moves else Tier.DEVICE
        self._held: dict[str, Buffer] = {}
        self.moved_bytes = 0

    def put(self, name: str, source: Buffer, nbytes: int) -> None:
        held = self._held.get(name)
        if held is None:
            held = self._held[name] = self._device.buffer(nbytes, self._tier)
        self._device.copy_async(source, held, nbytes).wait()
        self.moved_bytes += nbytes

    def take(self, name: str, into: Buffer) -> None:
        """Copies back what was put; the space is used again by the next ``put`` of that name."""
        held = self._held[name]
        self._device.copy_async(held, into, held.nbytes).wait()
