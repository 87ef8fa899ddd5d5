"""What ``edgetrain generate`` does for a language model that was trained from the beginning."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgetrain.cli import options
from edgetrain.errors import UsageError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from edgetrain.generation import Sampling, Text
    from edgetrain.session import Session

_MASK = re.compile(r"\[MASK(?::(\d+))?\]")
_MOST_MASKED = 1 << 16


def write(
    session: Session,
    prompt: str,
    sampling: tuple[float, float, int],
    max_tokens: int | None,
    steps: int | None,
    budget: int | None,
    device: str,
    threads: int,
    as_json: bool,
) -> None:
    """Prints a text. ``sampling``: temperature, top_p and seed."""
    from devices.limits import prepare_process, return_freed_memory

    prepare_process(threads)  # before tokenizing: memory that it frees then leaves the process
    from edgetrain import generation

    spec, budget = session.spec, options.saved_budget(session, budget)
    options.warn_of_untrained(session)
    asked = _Asked(
        session.model_files, prompt, max_tokens, spec.text_model.vocab_size, spec.model.family == "masked",
        spec.text.length,
    )  # fmt: skip
    return_freed_memory()
    options.start_torch(threads)
    import devices
    from edgetrain.text_sampling import TextModel

    opened = devices.open_device(device)
    model = TextModel(session, opened, 1, steps if spec.is_exact else None)
    model.warm_up()
    how, seed = generation.Sampling(*sampling), sampling[2]
    with model.within(budget, "generating text"):
        began = time.perf_counter()
        if asked.is_masked:
            made, finish, num_tokens = asked.filled(lambda tokens: model.unmask(tokens, steps or asked.num_masked, how))
        else:
            # One step gives the distribution of the next token; a longer chain draws from it by its own noise.
            made, finish, num_tokens = asked.followed(model.context(steps or 1, seed).read, how)
        seconds = time.perf_counter() - began
    asked.emit(made, finish, num_tokens, seconds, opened.memory.peak_bytes(), budget, as_json)


def write_exported(
    folder: Path,
    prompt: str,
    sampling: tuple[float, float, int],
    max_tokens: int | None,
    steps: int | None,
    budget: int | None,
    threads: int,
    as_json: bool,
) -> None:
    """As ``write``, for an export: onnxruntime alone, no torch."""
    from devices.limits import prepare_process, return_freed_memory

    prepare_process(threads)
    from devices.meter import usage
    from edgetrain import generation
    from exporters.manifest import TextManifest
    from exporters.text_runtime import TextContext, TextRunner

    manifest = TextManifest.read(folder)
    asked = _Asked(folder, prompt, max_tokens, manifest.vocab_size, manifest.family == "masked", manifest.length)
    if steps and manifest.single_file and not (asked.is_masked or manifest.whole):
        raise UsageError(
            f"the one graph in {folder} takes no steps", "Leave --steps out, or export without --single-file."
        )
    return_freed_memory()
    runner = TextRunner(folder, threads, budget)
    how = generation.Sampling(*sampling)
    began = time.perf_counter()
    with runner.within("generating text"):
        if asked.is_masked:

            def unmask(tokens: NDArray[np.int64]) -> NDArray[np.int64]:
                number = steps or asked.num_masked
                return generation.unmask(runner.unmasking_logits, tokens, manifest.vocab_size, number, how)

            made, finish, num_tokens = asked.filled(unmask)
        else:
            context = TextContext(runner, steps or 1, how.seed, steps)
            made, finish, num_tokens = asked.followed(context.read, how)
    asked.emit(made, finish, num_tokens, time.perf_counter() - began, usage().peak_bytes, budget, as_json)


class _Asked:
    """A prompt, its tokens, and what is made of it. ``max_tokens`` None: what there is room for.

    Raises:
        UsageError: the prompt has no tokens.
    """

    def __init__(
        self, folder: Path, prompt: str, max_tokens: int | None, vocab_size: int, is_masked: bool, trained_length: int
    ) -> None:
        from edgetrain import generation

        self._text = generation.Text(folder, vocab_size)
        self._prompt, self.is_masked = prompt, is_masked
        given = _encoded(self._text, prompt)
        self._max_tokens = max_tokens or min(options.MAX_TOKENS, max(1, trained_length - len(given)))
        self._tokens = _masked(self._text, prompt, self._max_tokens, vocab_size) if is_masked else given
        if not len(self._tokens):
            raise UsageError("the prompt has no tokens", "Give a word to begin with: --prompt Once")
        self.num_masked = int((self._tokens == vocab_size).sum())
        self._ends = generation.end_tokens(folder, self._text)
        total = len(self._tokens) + (0 if is_masked else self._max_tokens)
        if total > trained_length:
            click.echo(f"{total} tokens are more than the {trained_length} that the model was trained on", err=True)

    def filled(self, unmask: Callable[[NDArray[np.int64]], NDArray[np.int64]]) -> tuple[list[int], str, int]:
        """The tokens of a text without masks, why it finished, and how many were filled in."""
        made: list[int] = unmask(self._tokens).tolist()
        finish = "filled"
        if not _MASK.search(self._prompt):
            made, finish = until_end(made, len(self._tokens) - self._max_tokens, self._ends)
        return made, finish, self.num_masked

    def followed(
        self, read: Callable[[NDArray[np.int64]], NDArray[np.float32]], sampling: Sampling
    ) -> tuple[list[int], str, int]:
        """The tokens that follow, why they finished, and their number."""
        from edgetrain.generation import generate

        made = list(generate(read, self._tokens, self._max_tokens, self._ends, sampling))
        return made, "stop" if made[-1] in self._ends else "length", len(made)

    def emit(
        self,
        made: list[int],
        finish: str,
        num_tokens: int,
        seconds: float,
        peak_bytes: int,
        budget: int | None,
        as_json: bool,
    ) -> None:
        """Prints the text."""
        written = self._text.decode(made)
        value: dict[str, Any] = {
            "text": written, "tokens": num_tokens, "finish": finish, "tokens_per_s": num_tokens / seconds,
            "peak_bytes": peak_bytes, "budget_bytes": budget,
        }  # fmt: skip
        options.emit(value, as_json, lambda: written)


def until_end(tokens: list[int], first: int, ends: frozenset[int]) -> tuple[list[int], str]:
    """A text that goes on from token ``first``, up to the first of ``ends`` from there on, and why it finished."""
    for i in range(first, len(tokens)):
        if tokens[i] in ends:
            return tokens[: i + 1], "stop"
    return tokens, "length"


def _encoded(text: Text, prompt: str) -> NDArray[np.int64]:
    import numpy as np

    return np.concatenate([np.empty(0, np.int64), *(tokens.ids for tokens in text.encode([prompt]))])


def _masked(text: Text, prompt: str, max_tokens: int, mask: int) -> NDArray[np.int64]:
    """The tokens of a prompt with the id ``mask`` where one is to be filled in; at the end, if it names none."""
    import numpy as np

    parts: list[NDArray[np.int64]] = []
    end = 0
    for found in _MASK.finditer(prompt):
        count = int(found[1] or 1)
        if not 1 <= count <= _MOST_MASKED:
            raise UsageError(f"{found[0]} masks {count} tokens", f"Between 1 and {_MOST_MASKED} can be filled.")
        parts += [_encoded(text, prompt[end : found.start()]), np.full(count, mask, np.int64)]
        end = found.end()
    parts.append(_encoded(text, prompt[end:]))
    if end == 0:
        parts.append(np.full(max_tokens, mask, np.int64))
    return np.concatenate(parts)
