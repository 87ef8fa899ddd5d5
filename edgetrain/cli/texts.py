"""What ``edgetrain generate`` does for a language model that was trained from the beginning."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from edgetrain.cli import options
from edgetrain.errors import UsageError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from edgetrain.generation import Sampling, Text
    from edgetrain.session import Session
    from edgetrain.text_sampling import TextModel

_MASK = re.compile(r"\[MASK(?::(\d+))?\]")
_MOST_MASKED = 1 << 16


def write(
    session: Session,
    prompt: str,
    sampling: tuple[float, float, int],
    max_tokens: int,
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
    vocab_size = spec.text_model.vocab_size
    text = generation.Text(session.model_files, vocab_size)
    is_masked = spec.model.family == "masked"
    tokens = _masked(text, prompt, max_tokens, vocab_size) if is_masked else _encoded(text, prompt)
    if not len(tokens):
        raise UsageError("the prompt has no tokens", "Give a word to begin with: --prompt Once")
    ends = generation.end_tokens(session.model_files, text)
    total, trained_length = len(tokens) + (0 if is_masked else max_tokens), spec.text.length
    if total > trained_length:
        click.echo(f"{total} tokens are more than the {trained_length} that the model was trained on", err=True)
    return_freed_memory()
    options.start_torch(threads)
    import devices
    from devices import meter
    from edgetrain.text_sampling import TextModel

    model = TextModel(session, devices.open_device(device), 1, steps if spec.is_exact else None)
    model.warm_up()
    how = generation.Sampling(*sampling)
    with model.within(budget, "generating text"):
        began = time.perf_counter()
        if is_masked:
            num_masked = int((tokens == vocab_size).sum())
            made = model.unmask(tokens, steps or num_masked, how).tolist()
            finish, num_tokens = "filled", num_masked
            if not _MASK.search(prompt):
                made, finish = until_end(made, len(tokens) - max_tokens, ends)
        else:
            made = list(_after(model, tokens, max_tokens, ends, how, steps))
            finish, num_tokens = "stop" if made[-1] in ends else "length", len(made)
        written = text.decode(made)
        seconds = time.perf_counter() - began
    value: dict[str, Any] = {
        "text": written, "tokens": num_tokens, "finish": finish, "tokens_per_s": num_tokens / seconds,
        "peak_bytes": meter.usage().peak_bytes, "budget_bytes": budget,
    }  # fmt: skip
    options.emit(value, as_json, lambda: written)


def until_end(tokens: list[int], first: int, ends: frozenset[int]) -> tuple[list[int], str]:
    """A text that goes on from token ``first``, up to the first of ``ends`` from there on, and why it finished."""
    for i in range(first, len(tokens)):
        if tokens[i] in ends:
            return tokens[: i + 1], "stop"
    return tokens, "length"


def _after(
    model: TextModel,
    tokens: NDArray[np.int64],
    max_tokens: int,
    ends: frozenset[int],
    sampling: Sampling,
    steps: int | None,
) -> Iterator[int]:
    from edgetrain.generation import generate

    # One step gives the distribution of the next token; a longer chain draws from it by its own noise.
    context = model.context(steps or 1, sampling.seed)
    return generate(context.read, tokens, max_tokens, ends, sampling)


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
