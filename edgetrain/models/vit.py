"""A vision transformer that denoises the embedding of an image's label (DiffusionBlocks, arXiv 2506.14202, section 4).

Input of a block: an image x and a noisy unit codebook row z = y + sigma * eps; output: what its head says about y.
With two streams the image tokens are computed without sight of the noisy token, under a learned constant as
condition, so they serve any number of denoising steps; with one stream all tokens attend to all.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from edgetrain.models.base import Boundary, Family, Layer, Network
from edgetrain.noise import time_frequencies
from edgetrain.parameters import decays
from edgetrain.spec import ModelSpec, Spec
from edgetrain.training_data import Batches, guess

NUM_FREQUENCIES = 32
_EPS = 1e-6

KeyValue = tuple[Tensor, Tensor]


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Layer norm without parameters of its own, then the condition's shift and scale (DiT, arXiv 2212.09748)."""
    return F.layer_norm(x, x.shape[-1:], eps=_EPS) * (1 + scale) + shift


def patch_pixels(images: Tensor, patch: int) -> Tensor:
    """(n, C, H, W) -> (n, patches, C * patch * patch)."""
    n, channels, height, width = images.shape
    grid = images.reshape(n, channels, height // patch, patch, width // patch, patch)
    return grid.permute(0, 2, 4, 1, 3, 5).reshape(n, -1, channels * patch * patch)


def embed_noise(c_noise: Tensor, time_in: nn.Linear, time_out: nn.Linear) -> Tensor:
    """The embedding (n, width) of noise levels c_noise (n,)."""
    angles = c_noise[:, None] * torch.tensor(time_frequencies(NUM_FREQUENCIES), device=c_noise.device)
    features = torch.cat([angles.sin(), angles.cos()], dim=1)
    embedded: Tensor = time_out(F.silu(time_in(features)))
    return embedded


class PatchStem(nn.Module):
    """Patches and positions. With ``neighbours`` a patch's token is also given a linear map of the pixels of so many
    patches on each side of it, nothing beyond the edges: what is near needs no layer then."""

    def __init__(self, model: ModelSpec) -> None:
        super().__init__()
        self.image_shape, self.patch, self.neighbours = model.image_shape, model.patch, model.neighbours
        self.patches = nn.Linear(model.patch_pixels, model.width)
        self.positions = nn.Parameter(torch.empty(model.num_patches, model.width))
        if model.neighbours:
            self.around = nn.Linear(model.num_around * model.patch_pixels, model.width, bias=False)

    def tokens_of(self, images: Tensor) -> Tensor:
        """(n, C, H, W) -> (n, patches, width)."""
        pixels = patch_pixels(images, self.patch)
        tokens = self.patches(pixels) + self.positions
        return tokens + self.around(self._around(pixels)) if self.neighbours else tokens

    def _around(self, pixels: Tensor) -> Tensor:
        """Of patches (n, patches, pixels of one), those around each, row by row: (n, patches, num_around * pixels)."""
        reach, rows, columns = self.neighbours, *(size // self.patch for size in self.image_shape[1:])
        grid = F.pad(pixels.unflatten(1, (rows, columns)), (0, 0, reach, reach, reach, reach))
        places = itertools.product(range(2 * reach + 1), repeat=2)
        seen = [grid[:, y : y + rows, x : x + columns] for y, x in places if (y, x) != (reach, reach)]
        return torch.cat(seen, -1).flatten(1, 2)


class TimedPatchStem(PatchStem):
    """The same, and the embedding of a noise level."""

    def __init__(self, model: ModelSpec) -> None:
        super().__init__(model)
        self.time_in = nn.Linear(2 * NUM_FREQUENCIES, model.width)
        self.time_out = nn.Linear(model.width, model.width)

    def embed_time(self, c_noise: Tensor) -> Tensor:
        """c_noise (n,) -> (n, width)."""
        return embed_noise(c_noise, self.time_in, self.time_out)


class Stem(TimedPatchStem):
    """That of the classifier: the noisy token beside the patches, and the condition."""

    def __init__(self, model: ModelSpec, streams: int) -> None:
        super().__init__(model)
        self.streams = streams
        self.noisy = nn.Linear(model.width, model.width)
        if streams == 2:
            self.clean_condition = nn.Parameter(torch.empty(model.width))

    def condition(self, c_noise: Tensor) -> Tensor:
        """c_noise (n,) -> SiLU of the condition, (n, 1, width)."""
        return F.silu(self.embed_time(c_noise))[:, None]

    def clean(self, images: Tensor) -> Boundary:
        """Of two streams, the one that depends on the images alone."""
        return Boundary({"clean": self.tokens_of(images)}, {"clean_condition": F.silu(self.clean_condition)})

    def noised(self, scaled_z: Tensor, c_noise: Tensor) -> Boundary:
        """The other one: what is given of z (n, width), c_noise (n,)."""
        return Boundary({"noisy": self.noisy(scaled_z)[:, None]}, {"condition": self.condition(c_noise)})

    def forward(self, images: Tensor, scaled_z: Tensor, c_noise: Tensor) -> Boundary:
        """images (n, C, H, W), what is given of z (n, width), c_noise (n,)."""
        noised = self.noised(scaled_z, c_noise)
        if self.streams == 1:
            tokens = torch.cat([noised.carried["noisy"], self.tokens_of(images)], 1)
            return Boundary({"tokens": tokens}, noised.context)
        clean = self.clean(images)
        return Boundary({**clean.carried, **noised.carried}, {**clean.context, **noised.context})


class ViTLayer(Layer):
    """A pre-norm layer with adaptive layer norm. Of two streams, the noisy one also attends to the clean one."""

    def __init__(self, width: int, heads: int, mlp_ratio: int) -> None:
        super().__init__()
        self.heads = heads
        self.modulation = nn.Linear(width, 6 * width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.up = nn.Linear(width, mlp_ratio * width)
        self.down = nn.Linear(mlp_ratio * width, width)

    def stream(self, x: Tensor, condition: Tensor, seen: KeyValue | None = None) -> tuple[Tensor, KeyValue]:
        """One stream through the layer.

        Args:
            x: (n, tokens, width).
            condition: SiLU of the condition, (n, 1, width) or (width,).
            seen: keys and values of the other stream, each (n, heads, tokens, width / heads), attended to as well.

        Returns:
            The new tokens, and the keys and values of this stream.
        """
        n, tokens, width = x.shape
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition).chunk(6, -1)
        qkv = self.qkv(modulate(x, shift1, scale1)).view(n, tokens, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind()  # each (n, heads, tokens, width / heads)
        own = (k, v)
        if seen is not None:
            k, v = torch.cat([seen[0], k], 2), torch.cat([seen[1], v], 2)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, tokens, width)
        x = x + gate1 * self.out(mixed)
        hidden = F.gelu(self.up(modulate(x, shift2, scale2)), approximate="tanh")
        return x + gate2 * self.down(hidden), own

    def forward(self, boundary: Boundary) -> Boundary:
        context = boundary.context
        if "tokens" in boundary.carried:
            tokens, _ = self.stream(boundary.carried["tokens"], context["condition"])
            return boundary.advance({"tokens": tokens})
        clean, seen = self.stream(boundary.carried["clean"], context["clean_condition"])
        noisy, _ = self.stream(boundary.carried["noisy"], context["condition"], seen)
        return boundary.advance({"clean": clean, "noisy": noisy})


class Head(nn.Module):
    """Reads the noisy token: F of EDM's preconditioning, and logits by an untied linear map after a norm of its own
    that adapts to the condition. ``auxiliary`` logits come from the mean of the clean tokens."""

    def __init__(self, width: int, num_classes: int, auxiliary: bool) -> None:
        super().__init__()
        self.modulation = nn.Linear(width, 2 * width)
        self.readout = nn.Linear(width, num_classes)
        if auxiliary:
            self.auxiliary = nn.Linear(width, num_classes)

    @staticmethod
    def network_output(boundary: Boundary) -> Tensor:
        """F, (n, width)."""
        carried = boundary.carried
        return carried["tokens"][:, 0] if "tokens" in carried else carried["noisy"][:, 0]

    def forward(self, denoised: Tensor, condition: Tensor) -> Tensor:
        """D or F (n, width) and the condition (n, 1, width) -> logits (n, classes)."""
        shift, scale = self.modulation(condition[:, 0]).chunk(2, -1)
        return self.readout(modulate(denoised, shift, scale))

    def auxiliary_logits(self, boundary: Boundary) -> Tensor:
        mean = boundary.carried["clean"].mean(1)
        return self.auxiliary(F.layer_norm(mean, mean.shape[-1:], eps=_EPS))


class ClassifierStem(PatchStem):
    """Patches after a token that is to be read, and a learned constant in place of the condition."""

    def __init__(self, model: ModelSpec) -> None:
        super().__init__(model)
        self.token = nn.Parameter(torch.empty(model.width))
        self.clean_condition = nn.Parameter(torch.empty(model.width))

    def forward(self, images: Tensor) -> Boundary:
        """images (n, C, H, W)."""
        patches = self.tokens_of(images)
        token = self.token.expand(len(images), 1, -1)
        condition = F.silu(self.clean_condition)[None, None]  # (1, 1, width)
        return Boundary({"tokens": torch.cat([token, patches], 1)}, {"condition": condition})


class ViT(Family):
    """Stages of the classifier."""

    def build(self, kind: str) -> nn.Module:
        model, method = self.spec.image_model, self.spec.diffusion_blocks
        if kind == "stem":
            return Stem(model, method.streams)
        if kind == "head":
            return Head(model.width, model.num_classes, method.auxiliary > 0)
        return ViTLayer(model.width, model.heads, model.mlp_ratio)


class ClassifierNetwork(Network):
    """The same transformer trained as a whole: no noisy token, cross-entropy of a token that sees the image."""

    def __init__(self, spec: Spec, batches: Batches | None) -> None:
        self.spec, self.family, self.batches = spec, ViT(spec), batches
        self.guess = guess(spec)

    @property
    def examples(self) -> str:
        return "images"

    def build(self, kind: str) -> nn.Module:
        model = self.spec.image_model
        if kind == "stem":
            return ClassifierStem(model)
        return Head(model.width, model.num_classes, False) if kind == "head" else self.family.build(kind)

    def draw(self, step: int, first: int, count: int) -> Mapping[str, NDArray[Any]]:
        """images (n, C, H, W), labels (n,)."""
        assert self.batches is not None
        images, labels = self.batches(0, step, first, count)
        return {"images": images, "labels": labels}

    def enter(self, stem: nn.Module, batch: Mapping[str, Tensor]) -> Boundary:
        boundary: Boundary = stem(batch["images"])
        return boundary

    def layer(self, layer: nn.Module, boundary: Boundary) -> Boundary:
        advanced: Boundary = layer(boundary)
        return advanced

    @staticmethod
    def logits(head: nn.Module, boundary: Boundary) -> Tensor:
        """(n, classes)."""
        logits: Tensor = head(boundary.carried["tokens"][:, 0], boundary.context["condition"])
        return logits

    def head(self, head: nn.Module, boundary: Boundary, batch: Mapping[str, Tensor]) -> Tensor:
        total = F.cross_entropy(self.logits(head, boundary), batch["labels"], reduction="sum")
        return total / self.spec.train.batch_size

    def decays(self, kind: str, name: str, shape: tuple[int, ...]) -> bool:
        return decays(name)
