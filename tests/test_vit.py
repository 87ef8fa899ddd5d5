"""The ViT and the diffusion_blocks objective, against plain PyTorch written here."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from edgetrain.activations import Keep
from edgetrain.blockwise import build_modules
from edgetrain.data import Dataset, to_float
from edgetrain.models import build_family
from edgetrain.models.base import Boundary
from edgetrain.models.codebook import enter, read_out
from edgetrain.models.vit import ViTLayer
from edgetrain.noise import preconditioning, time_frequencies
from edgetrain.objectives.base import Block, Objective
from edgetrain.objectives.diffusion_blocks import diffusion_blocks
from edgetrain.parameters import codebook_rows, initial_values
from edgetrain.randomness import Purpose, Stream, normal
from edgetrain.recipe import resolve
from edgetrain.spec import Spec

BATCH = 16

pytestmark = pytest.mark.usefixtures("one_thread")


def small(**changes: Any) -> Spec:
    base = {
        "model.width": 16, "model.depth": 4, "model.heads": 2, "model.patch": 2, "model.image_shape": [1, 8, 8],
        "model.num_classes": 10, "diffusion_blocks.num_blocks": 2, "train.batch_size": BATCH,
    }  # fmt: skip
    return resolve({}, base | {name.replace("__", "."): value for name, value in changes.items()})


def paper(**changes: Any) -> Spec:
    return small(diffusion_blocks__preset="paper", **changes)


def initial_block(spec: Spec, index: int = 0) -> Block:
    """With the initial values that a session gets, on the CPU."""
    block = build_modules(spec, build_family(spec), index)
    kinds = ["codebook", "stem", *["layer"] * len(block.layers), "head"]
    for number, (kind, module) in enumerate(zip(kinds, block.modules, strict=True)):
        module.to_empty(device="cpu")
        for position, (name, parameter) in enumerate(module.named_parameters()):
            draws = normal(Stream(position, Purpose.INIT, number), 0, 1, parameter.numel()).reshape(parameter.shape)
            values = codebook_rows(draws) if kind == "codebook" else initial_values(spec, name, draws)
            parameter.data.copy_(torch.from_numpy(values))
            parameter.requires_grad_(kind != "codebook")
    return block


def random_block(spec: Spec, index: int = 0) -> Block:
    """Every parameter random, so that nothing is hidden by a zero."""
    block = initial_block(spec, index)
    generator = torch.Generator().manual_seed(5)
    for module in block.modules[1:]:
        for parameter in module.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    return block


def random_inputs(spec: Spec, count: int = 5, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Images, z and sigma."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(count, *spec.model.image_shape, generator=generator) * 2 - 1
    return (
        images,
        torch.randn(count, spec.model.width, generator=generator) * 3,
        torch.linspace(0.05, 20, count),
    )


def run(spec: Spec, block: Block, images: Tensor, z: Tensor, sigma: Tensor) -> tuple[Tensor, Boundary]:
    boundary = enter(spec, block.stem, block.rows, images, z, sigma)
    for layer in block.layers:
        boundary = Keep().run(layer, boundary)
    return read_out(spec, block.head, block.rows, boundary, z, sigma), boundary


# ------------------------------------------------------------------------------------------- plain PyTorch


def plain_norm(x: Tensor) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    return (x - mean) / torch.sqrt(((x - mean) ** 2).mean(-1, keepdim=True) + 1e-6)


def plain_layer(weights: Mapping[str, Tensor], x: Tensor, condition: Tensor, mask: Tensor, heads: int) -> Tensor:
    """x (n, tokens, width), a condition for each token (n, tokens, width), mask[i, j]: token i sees token j."""
    n, tokens, width = x.shape

    def linear(name: str, value: Tensor) -> Tensor:
        return value @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    parts = linear("modulation", condition).reshape(n, tokens, 6, width)
    shift1, scale1, gate1, shift2, scale2, gate2 = (parts[:, :, i] for i in range(6))
    qkv = linear("qkv", plain_norm(x) * (1 + scale1) + shift1)
    size = width // heads
    mixed = torch.empty(n, tokens, width)
    for head in range(heads):
        q, k, v = (qkv[..., i * width + head * size : i * width + (head + 1) * size] for i in range(3))
        scores = torch.einsum("nid,njd->nij", q, k) / math.sqrt(size)
        scores = scores.masked_fill(~mask, -math.inf)
        weight = scores.exp() / scores.exp().sum(-1, keepdim=True)
        mixed[..., head * size : (head + 1) * size] = torch.einsum("nij,njd->nid", weight, v)
    x = x + gate1 * linear("out", mixed)
    up = linear("up", plain_norm(x) * (1 + scale2) + shift2)
    hidden = 0.5 * up * (1 + torch.tanh(math.sqrt(2 / math.pi) * (up + 0.044715 * up**3)))
    return x + gate2 * linear("down", hidden)


def random_layer(width: int = 16, heads: int = 2) -> ViTLayer:
    layer = ViTLayer(width, heads, 4)
    generator = torch.Generator().manual_seed(3)
    for parameter in layer.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    return layer


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_a_two_stream_layer_is_one_masked_attention_over_both(heads):
    n, patches, width = 3, 6, 16
    layer = random_layer(width, heads)
    generator = torch.Generator().manual_seed(1)
    clean = torch.randn(n, patches, width, generator=generator)
    noisy, condition = torch.randn(2, n, 1, width, generator=generator)
    clean_condition = torch.randn(width, generator=generator)
    done = layer(
        Boundary({"clean": clean, "noisy": noisy}, {"clean_condition": clean_condition, "condition": condition})
    )
    mask = torch.ones(patches + 1, patches + 1, dtype=torch.bool)
    mask[:patches, patches:] = False  # clean -> noisy never
    conditions = torch.cat([clean_condition.expand(n, patches, width), condition], 1)
    expected = plain_layer(dict(layer.named_parameters()), torch.cat([clean, noisy], 1), conditions, mask, heads)
    torch.testing.assert_close(done.carried["clean"], expected[:, :patches], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(done.carried["noisy"], expected[:, patches:], rtol=1e-4, atol=1e-5)
    assert done.context["condition"] is condition


def test_a_one_stream_layer_attends_to_everything():
    n, tokens, width = 3, 7, 16
    layer = random_layer(width)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, tokens, width, generator=generator)
    condition = torch.randn(n, 1, width, generator=generator)
    done = layer(Boundary({"tokens": x}, {"condition": condition})).carried["tokens"]
    mask = torch.ones(tokens, tokens, dtype=torch.bool)
    expected = plain_layer(dict(layer.named_parameters()), x, condition.expand(n, tokens, width), mask, 2)
    torch.testing.assert_close(done, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("neighbours", [0, 1, 2])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_stem_in_plain_pytorch(channels, neighbours):
    spec = small(
        model__image_shape=[channels, 8, 12], model__patch=4, model__neighbours=neighbours,
        diffusion_blocks__preconditioning="edm",
    )  # fmt: skip
    block = random_block(spec)
    stem: Any = block.stem
    images, z, sigma = random_inputs(spec)
    boundary = enter(spec, stem, block.rows, images, z, sigma)
    weight = stem.patches.weight[:, None]
    if neighbours:  # those around a patch row by row, itself in the middle of them
        around = stem.around.weight.unflatten(1, (-1, channels * 16))
        before, after = around.chunk(2, 1)
        weight = torch.cat([before, weight, after], 1)
    side = 2 * neighbours + 1
    weight = weight.reshape(16, side, side, channels, 4, 4).permute(0, 3, 1, 4, 2, 5)  # (width, C, side, 4, side, 4)
    weight = weight.reshape(16, channels, 4 * side, 4 * side)
    patches = torch.nn.functional.conv2d(images, weight, stem.patches.bias, stride=4, padding=4 * neighbours)
    tokens = patches.flatten(2).transpose(1, 2) + stem.positions
    torch.testing.assert_close(boundary.carried["clean"], tokens, rtol=1e-4, atol=1e-5)
    c_in = 1 / torch.sqrt(sigma**2 + 1 / 16)
    noisy = (c_in[:, None] * z) @ stem.noisy.weight.T + stem.noisy.bias
    torch.testing.assert_close(boundary.carried["noisy"][:, 0], noisy, rtol=1e-4, atol=1e-5)
    angles = (sigma.log() / 4)[:, None] * torch.tensor(time_frequencies())
    time = torch.nn.functional.silu(stem.time_in(torch.cat([angles.sin(), angles.cos()], 1)))
    condition = torch.nn.functional.silu(stem.time_out(time))
    torch.testing.assert_close(boundary.context["condition"][:, 0], condition, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", [small, paper])
def test_the_loss_is_unweighted_cross_entropy_over_the_whole_batch(make, digits):
    spec = make(model__width=32)
    block = random_block(spec)
    objective = objective_of(spec, digits)
    drawn = {name: torch.from_numpy(array) for name, array in objective.draw(0, 3, 0, 6).items()}
    z = block.rows[drawn["labels"]] + drawn["sigma"][:, None] * drawn["eps"]
    logits, boundary = run(spec, block, drawn["images"], z, drawn["sigma"])
    expected = -logits.log_softmax(1)[range(6), drawn["labels"]].sum() / BATCH
    torch.testing.assert_close(objective.loss(block, drawn, Keep()), expected)
    # The logits: an untied linear map of an adaptive norm, of F, or of D = c_skip z + c_out F with the paper's preset.
    tokens = boundary.carried["tokens" if spec.diffusion_blocks.streams == 1 else "noisy"]
    output = tokens[:, 0]
    if spec.diffusion_blocks.skip:
        c_skip, c_out, _ = preconditioning(drawn["sigma"][:, None], 0.5)
        output = c_skip * z + c_out * output
    head: Any = block.head
    shift, scale = head.modulation(boundary.context["condition"][:, 0]).chunk(2, 1)
    torch.testing.assert_close(logits, head.readout(plain_norm(output) * (1 + scale) + shift), rtol=1e-4, atol=1e-4)


def test_the_auxiliary_loss_reads_the_mean_of_the_clean_tokens(digits):
    spec = small(diffusion_blocks__auxiliary=0.7)
    block = random_block(spec)
    objective = objective_of(spec, digits)
    drawn = {name: torch.from_numpy(array) for name, array in objective.draw(0, 0, 0, BATCH).items()}
    z = block.rows[drawn["labels"]] + drawn["sigma"][:, None] * drawn["eps"]
    logits, boundary = run(spec, block, drawn["images"], z, drawn["sigma"])
    head: Any = block.head
    auxiliary = head.auxiliary(plain_norm(boundary.carried["clean"].mean(1)))
    expected = torch.nn.functional.cross_entropy(logits, drawn["labels"])
    expected = expected + 0.7 * torch.nn.functional.cross_entropy(auxiliary, drawn["labels"])
    torch.testing.assert_close(objective.loss(block, drawn, Keep()), expected)


# ----------------------------------------------------------------------------------- who sees what, and when


def test_the_clean_stream_depends_on_the_image_alone():
    spec = small()
    block = random_block(spec)
    images, z, sigma = random_inputs(spec)
    _, first = run(spec, block, images, z, sigma)
    _, other = run(spec, block, images, z * -7 + 1, sigma.flip(0) * 3)
    assert torch.equal(first.carried["clean"], other.carried["clean"])
    assert not torch.allclose(first.carried["noisy"], other.carried["noisy"])
    moved = images.clone()
    moved[2, 0, 7, 7] += 0.5  # one pixel of one image, in the last patch
    _, changed = run(spec, block, moved, z, sigma)
    rows = [i for i in range(5) if not torch.equal(changed.carried["noisy"][i], first.carried["noisy"][i])]
    assert rows == [2], "the noisy token sees its own image, and no other"
    assert (changed.carried["noisy"][2] - first.carried["noisy"][2]).abs().max() > 1e-3


def test_with_one_stream_the_image_tokens_do_see_the_noise():
    """The control of the test above."""
    spec = paper()
    block = random_block(spec)
    images, z, sigma = random_inputs(spec)
    _, first = run(spec, block, images, z, sigma)
    _, other = run(spec, block, images, z + 1, sigma)
    assert not torch.allclose(first.carried["tokens"][:, 1:], other.carried["tokens"][:, 1:])


@pytest.mark.parametrize("spec", [small(), paper(), small(diffusion_blocks__streams=1, model__depth=5)])
@pytest.mark.parametrize("index", [0, 1])
def test_the_initial_loss_is_that_of_guessing(spec, index, digits):
    block = initial_block(spec, index)
    objective = objective_of(spec, digits)
    drawn = {name: torch.from_numpy(array) for name, array in objective.draw(index, 0, 0, BATCH).items()}
    assert objective.loss(block, drawn, Keep()).item() == pytest.approx(math.log(10), rel=1e-6)


def test_gates_start_where_the_spec_says():
    for spec, gate in ((small(), 0.5), (paper(), 0.0), (small(diffusion_blocks__gate=0.25), 0.25)):
        layer: Any = initial_block(spec).layers[0]
        shift1, scale1, gate1, shift2, scale2, gate2 = layer.modulation.bias.detach().chunk(6)
        assert (gate1 == gate).all()
        assert (gate2 == gate).all()
        assert not torch.cat([shift1, scale1, shift2, scale2, layer.modulation.weight.detach().flatten()]).any()


@pytest.mark.parametrize(("num_classes", "width"), [(10, 16), (10, 10), (10, 4), (1, 8), (100, 128)])
def test_codebook_rows_are_orthonormal(num_classes, width):
    rows = codebook_rows(normal(Stream(0, Purpose.CODEBOOK), 0, num_classes, width)).astype(np.float64)
    np.testing.assert_allclose((rows**2).sum(1), 1, atol=1e-6)
    count = min(num_classes, width)
    np.testing.assert_allclose(rows[:count] @ rows[:count].T, np.eye(count), atol=1e-6)
    assert len(np.unique(rows.round(4), axis=0)) == num_classes


def test_the_codebook_is_read_normalised():
    codebook: Any = initial_block(small()).codebook
    rows = codebook().detach().clone()
    codebook.rows.data *= torch.linspace(0.1, 9, 10)[:, None]
    torch.testing.assert_close(codebook(), rows)


# ------------------------------------------------------------------------------------------ what it can learn


def objective_of(spec: Spec, dataset: Dataset, same_batch: bool = False) -> Objective:
    def batches(block: int, step: int, first: int, count: int) -> tuple[Any, Any]:
        start = first if same_batch else step * spec.train.batch_size + first
        images, labels = dataset.read(np.arange(start, start + count))
        return to_float(images), labels

    return diffusion_blocks(spec, batches)


class Trained:
    """A block 0 that saw one batch many times at sigma_max, always with other noise."""

    def __init__(self, spec: Spec, dataset: Dataset) -> None:
        self.spec, self.block = spec, initial_block(spec)
        self.objective = objective_of(spec, dataset, same_batch=True)
        parameters = [p for module in self.block.modules for p in module.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=5e-3)
        for step in range(250):
            loss = self.objective.loss(self.block, self.draw(step), Keep())
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()

    def draw(self, step: int, sigma: float | None = None) -> dict[str, Tensor]:
        drawn = {k: torch.from_numpy(v) for k, v in self.objective.draw(0, step, 0, BATCH).items()}
        level = self.spec.diffusion_blocks.sigma_max if sigma is None else sigma
        return drawn | {"sigma": torch.full((BATCH,), level)}

    @torch.no_grad()
    def loss(self, drawn: dict[str, Tensor]) -> float:
        return self.objective.loss(self.block, drawn, Keep()).item()

    @torch.no_grad()
    def logits(self, drawn: dict[str, Tensor], noised: Tensor) -> Tensor:
        """With ``noised`` in place of the labels that are diffused."""
        z = self.block.rows[noised] + drawn["sigma"][:, None] * drawn["eps"]
        return run(self.spec, self.block, drawn["images"], z, drawn["sigma"])[0]


@pytest.fixture(scope="module", params=["calibrated", "paper"])
def trained(request, digits) -> Trained:
    return Trained((small if request.param == "calibrated" else paper)(), digits)


def test_one_batch_overfits_at_sigma_max(trained):
    drawn = trained.draw(10_000)  # noise that training never saw
    assert len(drawn["labels"].unique()) > 5
    assert trained.loss(drawn) < 0.2
    assert (trained.logits(drawn, drawn["labels"]).argmax(1) == drawn["labels"]).all()


def test_with_another_image_the_answer_is_lost(trained):
    """Shuffled context: what was learnt at sigma_max is in the image, and nowhere else."""
    drawn = trained.draw(10_000)
    labels = drawn["labels"]
    assert (labels.roll(3) != labels).float().mean() > 0.8
    shuffled = drawn | {"images": drawn["images"].roll(3, 0)}
    assert trained.loss(shuffled) > 5 * trained.loss(drawn) + 1


def test_logits_at_sigma_max_do_not_depend_on_the_label(trained):
    drawn = trained.draw(10_000)
    true = trained.logits(drawn, drawn["labels"])
    spread = true.std()
    for shift in (1, 4, 7):
        other = trained.logits(drawn, (drawn["labels"] + shift) % 10)
        assert (other - true).abs().max() < 0.05 * spread
        assert (other.argmax(1) == true.argmax(1)).all()


def test_logits_at_a_low_sigma_do_depend_on_the_label(digits):
    """The control of the test above: a low block reads the label off z."""
    spec = small(diffusion_blocks__sigma_max=0.1, diffusion_blocks__sigma_min=0.05)
    low = Trained(spec, digits)
    drawn = low.draw(10_000)
    others = (drawn["labels"] + 4) % 10
    assert (low.logits(drawn, others).argmax(1) == others).float().mean() > 0.8
