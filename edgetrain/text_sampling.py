"""Language models that were trained from the beginning, in use: what a text costs them, and texts that they write.

One block (diffusion_blocks) or one part (exact) is resident at a time. Everything random is a function of a seed and of
the example's or the token's number.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from devices import Device
from edgetrain import masking
from edgetrain.blockwise import bind, build_modules
from edgetrain.data.tokens import TextDataset
from edgetrain.generation import Sampling, unmask
from edgetrain.models import autoregressive, build_family, build_network, recurrent
from edgetrain.models.attention import KeyValue
from edgetrain.models.base import Boundary
from edgetrain.models.codebook import network_input, read_out
from edgetrain.models.masked import masked_logits
from edgetrain.models.recurrent import first_state
from edgetrain.models.text import TextNetwork
from edgetrain.noise import euler_coefficients, masking_block
from edgetrain.optim import warm_up_kernels
from edgetrain.randomness import Purpose, Stream, normal
from edgetrain.resident import Resident
from edgetrain.sampling import CHUNK_BYTES, Batched, bound
from edgetrain.session import Session
from edgetrain.stages import Unit, exact_stages, largest_block

Denoiser = Callable[[Tensor, Tensor], Tensor]
"""z (n, tokens, width) and sigma (n,) -> logits (n, tokens, vocab_size)."""

_WARM_UP_TOKENS = 4
_BYTES_PER_TOKEN = 64  # of an example that passes blocks: tokens, targets, weights, and what each has cost so far


@dataclass(frozen=True)
class Cost:
    """Of a text: ``nats`` a token, and the standard error of that over the examples, not a number if there is one.
    ``is_bound``: at most so much."""

    readout: str
    nats: float
    error: float
    is_bound: bool

    @property
    def bits(self) -> float:
        return self.nats / math.log(2)

    @property
    def bits_error(self) -> float:
        return self.error / math.log(2)


class _Parts:
    """A session's modules with their weights."""

    def __init__(self, session: Session, device: Device, loops: int | None) -> None:
        self._session, self.spec = session, session.spec
        self._block: int | None = None
        if self.spec.is_exact:
            self._stages = exact_stages(self.spec)
            self.network = build_network(self.spec, None)
            units = [[session.layout(stage) for stage in unit.stages] for unit in self._stages.units]
            core = len(self._stages.layers) // self.spec.text_model.loops
            is_looped = self.spec.model.family == "recurrent" and loops is not None
            self._layers = self._stages.layers[:core] * cast(int, loops) if is_looped else self._stages.layers
        else:
            self._family = build_family(self.spec)
            self._modules = build_modules(self.spec, self._family, 0)
            units = [largest_block(self.spec, session.shapes)]
        self.resident = Resident(device, units, moments_resident=False, trains=False)

    def load(self, block: int) -> None:
        """Makes the parts those of a block."""
        if self.spec.is_exact or block == self._block:
            return
        self._modules = bind(self.resident, self.spec, self._session.shapes, self._family, block)
        self.resident.load(self._session.store.read)
        self._block = block

    @property
    def stem(self) -> nn.Module:
        return self._part(self._stages.stem) if self.spec.is_exact else self._modules.stem

    @property
    def layers(self) -> Iterable[nn.Module]:
        """In their order, each until the next one is asked for."""
        return map(self._part, self._layers) if self.spec.is_exact else self._modules.layers

    @property
    def head(self) -> nn.Module:
        return self._part(self._stages.head) if self.spec.is_exact else self._modules.head

    @property
    def rows(self) -> Tensor:
        """Of the codebook, (vocab_size, width)."""
        return self._modules.rows

    def _part(self, unit: Unit) -> nn.Module:
        return bound(self.resident, self._session, self.network, unit)


class TextModel(Batched):
    """A session's language model. ``loops``: how often exact training's recurrent core runs; None: as in training."""

    def __init__(self, session: Session, device: Device, batch_size: int, loops: int | None = None) -> None:
        self.session, self.device, self.batch_size = session, device, batch_size
        self.spec, self.model = session.spec, session.spec.text_model
        self.modules = _Parts(session, device, loops)

    def warm_up(self) -> None:
        """Touches the buffers and runs every operation once, so that the limit can be drawn around them."""
        self.modules.resident.touch()
        tokens = np.zeros((1, _WARM_UP_TOKENS), np.int64)
        if self.model.family == "masked":
            self.unmask(np.full(_WARM_UP_TOKENS, self.model.vocab_size), 2, Sampling())
            self._unmasking(tokens, 0, self.spec.num_blocks)
        else:
            self.context(2, 0).read(tokens[0])
            self._costs(tokens, tokens, 0, 2, 1)
        warm_up_kernels(self.device)

    # ---------------------------------------------------------------------------------------------------- what it costs

    @property
    def chunk_examples(self) -> int:
        """How many pass a block together, for ``CHUNK_BYTES``."""
        return max(1, CHUNK_BYTES // (_BYTES_PER_TOKEN * self.spec.text.length))

    def costs(self, dataset: TextDataset, num_steps: int, draws: int, limit: int | None = None) -> list[Cost]:
        """What the examples of a text cost, a token.

        Of a next-token model: at sigma_max, where z carries nothing, which is its true negative log-likelihood, and so
        is that from z = 0, for which nothing is drawn; and of a chain of ``num_steps`` the variational bound, the mean
        over ``draws`` (Kingma et al., arXiv 2107.00630, equation 13: half the gain of 1 / sigma^2 in each step times
        |y - D|^2, and the last step's cross-entropy), for ancestral steps with the denoisers that the Euler steps of a
        generation have. Of masked diffusion: the bound of MD4's equation 4, t spread evenly over ``draws`` parts of
        each block's band. Trained as a whole: the likelihood itself, or the same bound.
        """
        num_examples = dataset.num_examples if limit is None else min(limit, dataset.num_examples)
        found: dict[str, list[NDArray[np.float64]]] = {}
        weight: list[NDArray[np.float64]] = []
        chunk = self.chunk_examples
        for start in range(0, num_examples, chunk):
            indices = np.arange(start, min(start + chunk, num_examples))
            tokens, targets, weights = dataset.read(indices)
            if self.model.family == "masked":
                tokens, weights = masking.texts(tokens, targets, weights)
                work = self._masked_work(tokens, weights > 0, start, draws * self.spec.num_blocks)
                weight.append((weights > 0).sum(1).astype(np.float64))
            else:
                work = self._next_token_work(tokens, targets, weights, start, num_steps, draws)
                weight.append(weights.sum(1).astype(np.float64))
            for name, each in self.halving(len(tokens), work).items():
                found.setdefault(name, []).append(each)
        total = np.concatenate(weight)
        return [_cost(name, np.concatenate(parts), total) for name, parts in found.items()]

    def _masked_work(
        self, tokens: NDArray[np.int64], counts: NDArray[np.bool_], start: int, levels: int
    ) -> Callable[[], dict[str, NDArray[np.float64]]]:
        def work() -> dict[str, NDArray[np.float64]]:
            return {"elbo": self._unmasking(tokens, start, levels, counts)}

        return work

    def _next_token_work(  # noqa: PLR0917
        self,
        tokens: NDArray[np.int64],
        targets: NDArray[np.int64],
        weights: NDArray[np.float32],
        start: int,
        num_steps: int,
        draws: int,
    ) -> Callable[[], dict[str, NDArray[np.float64]]]:
        def work() -> dict[str, NDArray[np.float64]]:
            each = self._costs(tokens, targets, start, num_steps, draws)
            return {name: (one * weights).sum(1) for name, one in each.items()}

        return work

    @torch.no_grad()
    def _costs(
        self, tokens: NDArray[np.int64], targets: NDArray[np.int64], start: int, num_steps: int, draws: int
    ) -> dict[str, NDArray[np.float64]]:
        """By readout, the cost of each target (n, length)."""
        if self.spec.is_exact:
            parts = [
                _negative_log(self._whole_logits(tokens[part], start + part.start), self._tensor(targets[part]))
                for part in self.parts(len(tokens))
            ]
            return {"whole": np.concatenate(parts)}
        schedule = self.spec.diffusion_blocks.noise
        grid = schedule.grid(num_steps)
        sigmas = [sigma for sigma, _ in grid]
        first, mode = np.zeros(tokens.shape), np.zeros(tokens.shape)
        bound = np.full(tokens.shape, _start_cost(schedule.sigma_max, self.model.width))
        for block in dict.fromkeys(block for _, block in grid):
            self.modules.load(block)
            for part in self.parts(len(tokens)):
                wanted = self._tensor(targets[part])
                y = torch.nn.functional.embedding(wanted, self.modules.rows)
                denoiser = self._denoiser(self._tensor(tokens[part]))
                if block == grid[0][1]:
                    mode[part] = _negative_log(self._at(denoiser, torch.zeros_like(y), sigmas[0]), wanted)
                for draw, k in itertools.product(range(draws), range(num_steps)):
                    if grid[k][1] != block:
                        continue
                    stream = Stream(self.spec.train.seed, Purpose.EVALUATION_NOISE, k, draw)
                    eps = self._tensor(first_state(stream, start + part.start, tokens[part].shape, self.model.width))
                    if k == 0:
                        at_sigma_max = self._at(denoiser, (1 + sigmas[0] ** 2) ** 0.5 * eps, sigmas[0])
                        first[part] += _negative_log(at_sigma_max, wanted) / draws
                    logits = self._at(denoiser, y + sigmas[k] * eps, sigmas[k])
                    if k == num_steps - 1:
                        bound[part] += _negative_log(logits, wanted) / draws
                    else:
                        gained = sigmas[k + 1] ** -2 - sigmas[k] ** -2
                        error = (y - logits.softmax(-1) @ self.modules.rows).double().square().sum(-1).cpu().numpy()
                        bound[part] += gained / 2 * error / draws
        return {"sigma_max": first, "sigma_max-mode": mode, "chain": bound}

    def _at(self, denoiser: Denoiser, z: Tensor, sigma: float) -> Tensor:
        """Logits where the noise level is the same everywhere."""
        return denoiser(z, torch.full((len(z),), sigma, device=z.device))

    def _step(self, denoiser: Denoiser, z: Tensor, sigma: float, following: float) -> tuple[Tensor, Tensor]:
        """An Euler step: the next z, and the logits of this one."""
        logits = self._at(denoiser, z, sigma)
        a, b = euler_coefficients(sigma, following)
        return a * z + b * (logits.softmax(-1) @ self.modules.rows), logits

    def _denoiser(self, tokens: Tensor, last: bool = False) -> Denoiser:
        """For tokens (n, length), of the block that is loaded. What depends on the tokens alone is computed once.
        ``last``: logits of the last token alone."""
        if self.model.family == "recurrent":
            return self._recurrent_denoiser(tokens, last)
        if self.spec.diffusion_blocks.streams == 1:
            return self._one_stream_denoiser(tokens, last)
        return self._ar_denoiser(tokens)

    def _recurrent_denoiser(self, tokens: Tensor, last: bool) -> Denoiser:
        rows, stem = self.modules.rows, cast(recurrent.Stem, self.modules.stem)
        injected = stem.injected(tokens)

        def logits(z: Tensor, sigma: Tensor) -> Tensor:
            scaled_z, c_noise = network_input(self.spec, rows, z, sigma)
            boundary = Boundary({"state": scaled_z}, {"injected": injected, "condition": stem.condition(c_noise)})
            for layer in self.modules.layers:
                boundary = layer(boundary)
            return read_out(self.spec, self.modules.head, rows, boundary, z, sigma, last)

        return logits

    def _ar_denoiser(self, tokens: Tensor, caches: Sequence[KeyValue] | None = None) -> Denoiser:
        """With ``caches``, one for each layer, the tokens follow on what these hold, and only the last is denoised."""
        rows, stem = self.modules.rows, cast(autoregressive.Stem, self.modules.stem)
        layers = cast(Sequence[autoregressive.Layer], self.modules.layers)
        boundary = stem.clean(tokens)
        clean, constant = boundary.carried["clean"], boundary.context["clean_condition"]
        seen = []
        pasts: Sequence[KeyValue | None] = caches or [None] * len(layers)
        for layer, past in zip(layers, pasts, strict=True):
            clean, own = layer.clean(clean, constant, past)
            seen.append(own)
        beside, clean = (tokens, clean) if caches is None else (tokens[:, -1:], clean[:, -1:])

        def logits(z: Tensor, sigma: Tensor) -> Tensor:
            boundary = stem.noised(beside, *network_input(self.spec, rows, z, sigma))
            noisy, condition = boundary.carried["noisy"], boundary.context["condition"]
            for layer, own in zip(layers, seen, strict=True):
                noisy = layer.noisy(noisy, condition, own)
            return read_out(
                self.spec, self.modules.head, rows, boundary.advance({"clean": clean, "noisy": noisy}), z, sigma
            )

        return logits

    def _one_stream_denoiser(self, tokens: Tensor, last: bool) -> Denoiser:
        """Where clean tokens have the condition of the noisy ones, they depend on sigma."""
        rows = self.modules.rows

        def logits(z: Tensor, sigma: Tensor) -> Tensor:
            boundary: Boundary = self.modules.stem(tokens, *network_input(self.spec, rows, z, sigma))
            for layer in self.modules.layers:
                boundary = layer(boundary)
            return read_out(self.spec, self.modules.head, rows, boundary, z, sigma, last)

        return logits

    def _noise(self, stream: Stream, first: int, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """Where a chain begins, (n, length, width): at sigma_max, of the norm that a noised row has."""
        scale = np.float32((1 + self.spec.diffusion_blocks.noise.sigma_max**2) ** 0.5)
        return scale * first_state(stream, first, shape, self.model.width)

    def _whole_logits(
        self, tokens: NDArray[np.int64], first: int, caches: Sequence[KeyValue] | None = None, last: bool = False
    ) -> Tensor:
        """Of a next-token model that was trained as a whole: tokens (n, length) -> (n, length, vocab_size)."""
        batch = {"tokens": self._tensor(tokens)}
        if self.model.family == "recurrent":
            stream = Stream(self.spec.train.seed, Purpose.EVALUATION_NOISE)
            batch["state"] = self._tensor(first_state(stream, first, tokens.shape, self.model.width))
        return self._whole_logits_of(batch, caches, last)

    def _whole_logits_of(
        self, batch: Mapping[str, Tensor], caches: Sequence[KeyValue] | None = None, last: bool = False
    ) -> Tensor:
        """Of tokens (n, length) and the state, if there is one, that the core begins with (n, length, width)."""
        network = cast(TextNetwork, self.modules.network)
        boundary = network.enter(self.modules.stem, batch)
        for number, layer in enumerate(self.modules.layers):
            if caches is None:
                boundary = network.layer(layer, boundary)
            else:
                clean, constant = boundary.carried["clean"], boundary.context["clean_condition"]
                clean, _ = cast(autoregressive.Layer, layer).clean(clean, constant, caches[number])
                boundary = boundary.advance({"clean": clean})
        return network.logits(self.modules.head, boundary, last)

    @torch.no_grad()
    def _unmasking(
        self, tokens: NDArray[np.int64], start: int, levels: int, counts: NDArray[np.bool_] | None = None
    ) -> NDArray[np.float64]:
        """The bound of each example (n,): a t of its own in each of ``levels`` equal parts."""
        total = np.zeros(len(tokens))
        for middle, t, is_masked in masking.levels(self.spec.train.seed, tokens, start, levels, counts):
            given = masking.hidden(tokens, is_masked, self.model.vocab_size)
            self.modules.load(masking_block(self.spec.num_blocks, middle))
            for part in self.parts(len(tokens)):
                logits = self._masked_logits(given[part], t[part])
                each = _negative_log(logits, self._tensor(np.maximum(tokens[part], 0)))
                total[part] += (each * is_masked[part]).sum(1) / t[part] / levels
        return total

    def _masked_logits(self, tokens: NDArray[np.int64], t: NDArray[np.float64]) -> Tensor:
        """(n, length, vocab_size) of the block that is loaded."""
        boundary: Boundary = self.modules.stem(self._tensor(tokens), self._tensor(t.astype(np.float32)))
        for layer in self.modules.layers:
            boundary = layer(boundary)
        return masked_logits(self.modules.head, boundary)

    def _tensor(self, array: NDArray[Any]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device.torch_device)

    # ------------------------------------------------------------------------------------------------------- texts

    def context(self, num_steps: int, seed: int) -> Context:
        """What a next-token model has read of one text; each token takes ``num_steps`` Euler steps."""
        return Context(self, num_steps, seed)

    @torch.no_grad()
    def unmask(self, tokens: NDArray[np.int64], num_steps: int, sampling: Sampling) -> NDArray[np.int64]:
        """As ``generation.unmask``, by the blocks that own t."""

        def logits(tokens: NDArray[np.int64], t: float) -> NDArray[np.float32]:
            self.modules.load(masking_block(self.spec.num_blocks, t))
            found: NDArray[np.float32] = self._masked_logits(tokens, np.array([t])).cpu().numpy()
            return found

        return unmask(logits, tokens, self.model.vocab_size, num_steps, sampling)

    @torch.no_grad()
    def outputs(self, block: int, given: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[np.float32]]:
        """What an exported graph of a block, or of a model trained as a whole, computes: ``logits``, by blocks of
        next-token models ``denoised``, and of ar the keys and values ``present.N.key`` and ``present.N.value``. Given
        are input_ids (n, length) and, as the graph has them, t (n,), z (n, length, width) and sigma (n,), or state (n,
        length, width)."""
        self.modules.load(block)
        tokens = given["input_ids"]
        if "t" in given:
            return {"logits": self._masked_logits(tokens, given["t"]).numpy()}
        presents = self._keys_and_values(given) if self.model.family == "ar" else {}
        if self.spec.is_exact:
            batch = {"tokens": self._tensor(tokens)} | (
                {"state": self._tensor(given["state"])} if "state" in given else {}
            )
            return {"logits": self._whole_logits_of(batch).numpy(), **presents}
        logits = self._denoiser(self._tensor(tokens))(self._tensor(given["z"]), self._tensor(given["sigma"]))
        denoised = logits.softmax(-1) @ self.modules.rows
        return {"logits": logits.numpy(), "denoised": denoised.numpy(), **presents}

    def _keys_and_values(self, given: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[np.float32]]:
        """Of the clean tokens, each (n, heads, length, head_dim), of the layers that are loaded."""
        stem, tokens = self.modules.stem, self._tensor(given["input_ids"])
        if self.spec.is_exact:
            boundary = cast(TextNetwork, self.modules.network).enter(stem, {"tokens": tokens})
        else:
            inputs = network_input(self.spec, self.modules.rows, *map(self._tensor, (given["z"], given["sigma"])))
            boundary = stem(tokens, *inputs)
        clean, context = boundary.carried["clean"], boundary.context
        constant = context["clean_condition"] if "clean_condition" in context else context["condition"]
        found: dict[str, NDArray[np.float32]] = {}
        for number, layer in enumerate(cast(Sequence[autoregressive.Layer], self.modules.layers)):
            clean, (keys, values) = layer.clean(clean, constant)
            found |= {f"present.{number}.key": keys.numpy(), f"present.{number}.value": values.numpy()}
        return found


class Context:
    """Reads on from what it has read before, and gives the logits of what comes next."""

    def __init__(self, model: TextModel, num_steps: int, seed: int) -> None:
        self._model, self._seed = model, seed
        self._num_steps = num_steps
        self._tokens = np.empty(0, np.int64)
        self._caches: dict[int, list[KeyValue]] = {}

    @torch.no_grad()
    def read(self, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        """Logits (vocab_size,) after ``tokens`` (n,)."""
        model = self._model
        self._tokens = np.concatenate([self._tokens, tokens])
        if model.spec.is_exact:
            caches = self._cache(0) if model.model.family == "ar" else None
            given = tokens if caches is not None else self._tokens
            logits = model._whole_logits(given[None], 0, caches, last=True)
        else:
            logits = self._chain(tokens)
        last: NDArray[np.float32] = logits[0, -1].cpu().numpy()
        return last

    def _chain(self, tokens: NDArray[np.int64]) -> Tensor:
        """Logits of the last of the tokens at the chain's end."""
        model = self._model
        grid = [*model.spec.diffusion_blocks.noise.grid(self._num_steps), (0.0, -1)]
        number = len(self._tokens) - 1
        state = model._tensor(model._noise(Stream(self._seed, Purpose.NOISE, 0, number), 0, (1, 1)))
        logits = state
        for block in dict.fromkeys(block for _, block in grid[:-1]):
            model.modules.load(block)
            denoise = self._last_denoiser(block, tokens)
            for (sigma, owner), (following, _) in itertools.pairwise(grid):
                if owner == block:
                    state, logits = model._step(denoise, state, sigma, following)
        return logits

    def _last_denoiser(self, block: int, tokens: NDArray[np.int64]) -> Denoiser:
        """For z (1, 1, width) of the token after the last one read."""
        model = self._model
        if model.model.family == "ar" and model.spec.diffusion_blocks.streams == 2:
            return model._ar_denoiser(model._tensor(tokens[None]), self._cache(block))
        whole = model._denoiser(model._tensor(self._tokens[None]), last=True)
        # Before the last one stand the rows of tokens that are known, as noisy as in training.
        known = torch.nn.functional.embedding(model._tensor(self._tokens[None, 1:]), model.modules.rows)
        eps = normal(Stream(self._seed, Purpose.EVALUATION_NOISE), 0, known.shape[1], model.model.width)
        noise = model._tensor(eps[None])

        def logits(z: Tensor, sigma: Tensor) -> Tensor:
            return whole(torch.cat([known + sigma[:, None, None] * noise, z], 1), sigma)

        return logits

    def _cache(self, block: int) -> list[KeyValue]:
        """Keys and values of the block's clean tokens, with room for as many as have been read."""
        model = self._model
        layers = model.spec.layers_of(block)
        if block not in self._caches:
            self._caches[block] = [self._room(2 * len(self._tokens)) for _ in layers]
        held = self._caches[block]
        if held[0].keys.shape[2] < len(self._tokens):
            self._caches[block] = held = [_grown(one, self._room(2 * len(self._tokens))) for one in held]
        return held

    def _room(self, tokens: int) -> KeyValue:
        model = self._model.model
        return KeyValue(1, model.heads, tokens, model.head_dim, device=self._model.device.torch_device)


def _grown(held: KeyValue, into: KeyValue) -> KeyValue:
    if held.length:
        into.append(held.keys[:, :, : held.length], held.values[:, :, : held.length])
    return into


def _start_cost(sigma_max: float, width: int) -> float:
    """Nats between a row noised to sigma_max and where chains begin: KL(N(y, s^2) || N(0, 1 + s^2)), |y| = 1."""
    ratio = 1 / (1 + sigma_max**2)
    return 0.5 * (ratio * (1 - width) - width * math.log1p(-ratio))


def _negative_log(logits: Tensor, targets: Tensor) -> NDArray[np.float64]:
    """Of the softmax at the targets: logits (n, length, vocab_size), targets (n, length) -> (n, length)."""
    chosen = logits.gather(-1, targets[..., None])[..., 0]
    found: NDArray[np.float64] = (logits.logsumexp(-1) - chosen).double().cpu().numpy()
    return found


def _cost(name: str, each: NDArray[np.float64], weight: NDArray[np.float64]) -> Cost:
    """``each``: the cost of each example, ``weight``: the tokens of each that count."""
    mean = float(each.sum() / weight.sum())
    n = len(each)
    residuals = each - mean * weight  # of a ratio of sums
    square = float((residuals**2).sum()) * n / max(1, n - 1)
    error = math.sqrt(square) / float(weight.sum()) if n > 1 else math.nan
    return Cost(name, mean, error, name not in ("sigma_max", "sigma_max-mode", "whole"))
