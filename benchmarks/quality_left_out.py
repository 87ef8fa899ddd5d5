"""What edgetrain leaves out of block-wise training, and what it would be worth: averaged weights, chained contexts.

EMA: of a block's weights after each step, beside the weights themselves; the loss of held-out examples at the noise
levels of its band. Every family, block 0 alone.

A chained context: the clean tokens of block i go on from those of block i - 1, which is trained before it and then
fixed (what it says of the training text would be cached on disk), so that a noisy token sees a context as deep as the
whole model instead of one block. All blocks are trained at the noise levels of block 0: how many bits a character they
have at sigma_max, next to the transformer of as many layers trained as a whole (``quality_ar.py`` has those).

Trained by torch in a plain loop: this is about the mathematics, and none of it is in the runtime.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import torch
from common import progress, report, temporary_folder
from language import king_james
from quality import quality_parser, split_text, split_train_set
from torch import Tensor

from edgetrain.activations import Activations, Keep
from edgetrain.blockwise import build_modules
from edgetrain.cli.options import with_shapes
from edgetrain.data import open_dataset
from edgetrain.data.text import HELD_OUT, TRAIN, open_text
from edgetrain.models import build_family
from edgetrain.models.base import Boundary
from edgetrain.models.codebook import enter, read_out
from edgetrain.models.text import cross_entropy
from edgetrain.objectives.base import Block, Objective
from edgetrain.objectives.diffusion_blocks import DenoisedTokens, diffusion_blocks
from edgetrain.parameters import codebook_rows, decays, initial_values
from edgetrain.randomness import Purpose, Stream, normal
from edgetrain.recipe import load_recipe, resolve
from edgetrain.schedule import learning_rate
from edgetrain.spec import Spec, TextModelSpec
from edgetrain.training_data import training_batches
from edgetrain.vocabulary import put_tokenizer

_USUAL_FOLDER = "/usr/share/datasets/fashion-mnist"
_TEXT = {"model.width": 64, "train.batch_size": 16, "optimizer.lr": 3e-3}
_IMAGES = {"model.width": 64, "optimizer.lr": 2e-3}
FAMILIES = {
    "vit-fashion-mnist": _IMAGES, "dit-fashion-mnist": _IMAGES, "masked-text": _TEXT, "ar-text": _TEXT,
    "recurrent-text": _TEXT,
}  # fmt: skip
_DECAYS = (0.9, 0.98)
_HELD_OUT_STEP = 1 << 20  # the number of the first batch of the other split


def main() -> None:
    made = quality_parser(__doc__)
    made.add_argument("--data", type=Path, default=Path(os.environ.get("EDGETRAIN_FASHION_MNIST", _USUAL_FOLDER)))
    made.add_argument("--only", choices=["ema", "context"])
    options = made.parse_args()
    torch.set_num_threads(options.threads)
    folder = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    text = cache(lambda: split_text(king_james(), folder)[0])
    images = cache(lambda: split_train_set(options.data, folder, 10_000)[0])
    steps = 5 if options.quick else options.steps or 300
    seeds = range(1 if options.quick else options.seeds)
    with temporary_folder() as scratch:
        rows: list[list[object]] = []
        for recipe, changes in FAMILIES.items() if options.only in (None, "ema") else ():
            data = str((text if recipe.endswith("text") else images)())
            for seed in seeds:
                spec = _spec(recipe, changes | {"data.source": data, "train.seed": seed}, steps)
                rows.append([recipe, seed, *(f"{loss:.4f}" for loss in _averaged(spec, scratch, steps))])
                progress(" ".join(map(str, rows[-1])))
        if rows:
            report(
                options.out and options.out.with_name(f"{options.out.stem}-ema.md"),
                f"EMA of the weights of block 0, {steps} steps: loss of held-out examples in its band",
                ["recipe", "seed", "the weights", *(f"decay {decay}" for decay in _DECAYS)], rows,
            )  # fmt: skip
        rows = []
        for seed in seeds if options.only in (None, "context") else ():
            spec = _spec("ar-text", _TEXT | {"data.source": str(text()), "train.seed": seed}, steps)
            rows += [[seed, name, f"{bits:.3f}"] for name, bits in _chained(spec, scratch, steps)]
        if rows:
            report(
                options.out and options.out.with_name(f"{options.out.stem}-context.md"),
                f"Clean contexts, {steps} steps a block: bits a character at sigma_max, held-out text",
                ["seed", "block", "bits a character"], rows,
            )  # fmt: skip


def _spec(recipe: str, changes: dict[str, Any], steps: int) -> Spec:
    spec, _ = with_shapes(resolve(load_recipe(recipe), changes | {"train.steps": steps}))
    return spec


def _batches(spec: Spec, scratch: Path, held_out: bool) -> Any:
    """Batches of one split."""
    if not isinstance(spec.model, TextModelSpec):
        return training_batches(spec, open_dataset(spec.images.source, "test" if held_out else "train", scratch))
    put_tokenizer(spec.model.tokenizer, scratch)
    split = HELD_OUT if held_out else TRAIN
    dataset = open_text(spec.text, split, scratch, spec.model.vocab_size, scratch, spec.train.seed)
    return training_batches(spec, dataset)


def _averaged(spec: Spec, scratch: Path, steps: int) -> list[float]:
    """The held-out losses of block 0 with its weights, and with their averages."""
    block = initial_block(spec, 0)
    averages = [deepcopy(block) for _ in _DECAYS]

    def average() -> None:
        for decay, kept in zip(_DECAYS, averages, strict=True):
            for mine, new in zip(_parameters(kept), _parameters(block), strict=True):
                mine.data.lerp_(new.data, 1 - decay)

    fit(spec, diffusion_blocks(spec, _batches(spec, scratch, False)), block, steps, after=average)
    other = diffusion_blocks(spec, _batches(spec, scratch, True))
    return [_held_out(spec, other, one) for one in (block, *averages)]


@torch.no_grad()
def _held_out(spec: Spec, objective: Objective, block: Block, batches: int = 32) -> float:
    losses = []
    for step in range(_HELD_OUT_STEP, _HELD_OUT_STEP + batches):
        draw = objective.draw(block.index, step, 0, spec.train.batch_size)
        losses.append(objective.loss(block, _tensors(draw), Keep()).item())
    return sum(losses) / len(losses)


class _ChainedTokens(DenoisedTokens):
    """Clean tokens that have passed some blocks before this one."""

    def __init__(self, spec: Spec, batches: Any, before: Sequence[Block]) -> None:
        super().__init__(spec, batches)
        self._before = before

    def logits(self, block: Block, tokens: Tensor, z: Tensor, sigma: Tensor) -> Tensor:
        boundary = enter(self.spec, block.stem, block.rows, tokens, z, sigma)
        if self._before:
            clean = self._context(tokens)
            boundary = Boundary({**boundary.carried, "clean": clean}, boundary.context)
        for layer in block.layers:
            boundary = layer(boundary)
        return read_out(self.spec, block.head, block.rows, boundary, z, sigma)

    def loss(self, block: Block, draw: dict[str, Tensor], activations: Activations) -> Tensor:  # type: ignore[override]
        z = block.rows[draw["targets"]] + draw["sigma"][:, None, None] * draw["eps"]
        logits = self.logits(block, draw["tokens"], z, draw["sigma"])
        return cross_entropy(logits, draw["targets"], draw["weights"])

    @torch.no_grad()
    def _context(self, tokens: Tensor) -> Tensor:
        """What the blocks before leave of clean tokens, (n, length, width)."""
        clean: Tensor | None = None
        for block in self._before:
            made: Boundary = block.stem.clean(tokens)  # type: ignore[operator]
            clean = made.carried["clean"] if clean is None else clean
            for layer in block.layers:
                clean, _ = layer.clean(clean, made.context["clean_condition"])  # type: ignore[operator]
        assert clean is not None
        return clean


def _chained(spec: Spec, scratch: Path, steps: int) -> list[tuple[str, float]]:
    """Bits at sigma_max of each block at the levels of block 0: from a context of its own, and chained."""
    fitting, other = _batches(spec, scratch, False), _batches(spec, scratch, True)
    before: list[Block] = []
    found = []
    depth = spec.text_model.depth // spec.num_blocks
    for number in range(spec.num_blocks):
        block = initial_block(spec, 0, number)
        fit(spec, _ChainedTokens(spec, fitting, before), block, steps)
        objective = _ChainedTokens(spec, other, before)
        bits = _at_sigma_max(spec, objective, block)
        found.append((f"{depth * (number + 1)} layers of context, {depth} of them trained now", bits))
        progress(f"seed {spec.train.seed}, {found[-1]}")
        before.append(block)
    return found


@torch.no_grad()
def _at_sigma_max(spec: Spec, objective: _ChainedTokens, block: Block, batches: int = 16) -> float:
    sigma_max, nats = spec.diffusion_blocks.noise.sigma_max, 0.0
    for step in range(batches):
        draw = _tensors(objective.draw(0, _HELD_OUT_STEP + step, 0, spec.train.batch_size))
        sigma = torch.full_like(draw["sigma"], sigma_max)
        logits = objective.logits(block, draw["tokens"], math.sqrt(1 + sigma_max**2) * draw["eps"], sigma)
        nats += cross_entropy(logits, draw["targets"], draw["weights"]).item()
    return nats / batches / math.log(2)


def initial_block(spec: Spec, index: int, number: int = 0) -> Block:
    """With initial values drawn as a session's are, those of one ``number`` unlike another's."""
    block = build_modules(spec, build_family(spec), index)
    for place, module in enumerate(block.modules):
        module.to_empty(device="cpu")
        for position, (name, parameter) in enumerate(module.named_parameters()):
            stream = Stream(spec.train.seed, Purpose.INIT, 1000 * number + place, position)
            draws = normal(stream, 0, 1, parameter.numel()).reshape(parameter.shape)
            is_codebook = module is block.codebook
            values = codebook_rows(draws) if is_codebook else initial_values(spec, name, draws)
            parameter.data.copy_(torch.from_numpy(values))
            parameter.requires_grad_(not is_codebook)
    return block


def fit(
    spec: Spec, objective: Objective, block: Block, steps: int, *, after: Callable[[], None] = lambda: None
) -> None:
    """AdamW with the spec's schedule and clipping."""
    named = [(name, one) for module in block.modules for name, one in module.named_parameters() if one.requires_grad]
    groups = [
        {"params": [one for name, one in named if decays(name) == decayed],
         "weight_decay": spec.optimizer.weight_decay * decayed}
        for decayed in (True, False)
    ]  # fmt: skip
    optimizer = torch.optim.AdamW(
        groups, betas=(spec.optimizer.beta1, spec.optimizer.beta2), eps=spec.optimizer.eps
    )  # fmt: skip
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(spec.optimizer, step, spec.train.steps)
        optimizer.zero_grad()
        draw = objective.draw(block.index, step, 0, spec.train.batch_size)
        objective.loss(block, _tensors(draw), Keep()).backward()
        torch.nn.utils.clip_grad_norm_([one for _, one in named], spec.optimizer.clip)
        optimizer.step()
        after()


def _parameters(block: Block) -> list[Tensor]:
    return [one for module in block.modules for one in module.parameters()]


def _tensors(draw: Any) -> dict[str, Tensor]:
    return {name: torch.from_numpy(array) for name, array in draw.items()}


if __name__ == "__main__":
    main()
