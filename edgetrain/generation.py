"""Text that a language model writes: from a prompt to tokens, token by token, and back to text. No torch here.

Which token comes is a pure function of the logits, the seed and the token's position. ``edgetrain.inference`` has the
logits.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from edgetrain.checkpoint import read_object
from edgetrain.data.chat import MODEL_CONFIGS, ChatTemplate, special_tokens
from edgetrain.data.tokenizer import Tokenizer
from edgetrain.errors import BadInput, UsageError
from edgetrain.randomness import Purpose, Stream, uniform

_CONTEXT_TOKENS = 8
"""So many tokens before it decide how one is written: whether a space stands before it, say."""
_REPLACEMENT = "\ufffd"


class Text(Tokenizer):
    """A tokenizer that also writes tokens as text.

    Raises:
        BadInput: as a ``Tokenizer``.
    """

    def decode(self, ids: Sequence[int]) -> str:
        """Their text; special tokens have none."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        return text


class Writer:
    """The text of tokens as they come, after those of ``prompt``: each piece ends with a whole character."""

    def __init__(self, text: Text, prompt: Sequence[int]) -> None:
        self._text = text
        self._ids = list(prompt[-_CONTEXT_TOKENS:])
        self._start, self._written = 0, len(self._ids)

    def add(self, token: int) -> str:
        """What can be written now that ``token`` is there; empty while a character lacks some of its bytes."""
        self._ids.append(token)
        piece = self._unwritten()
        if piece.endswith(_REPLACEMENT):
            return ""
        self._start, self._written = max(0, self._written - _CONTEXT_TOKENS), len(self._ids)
        return piece

    def end(self) -> str:
        """What is left, a character that never became whole included."""
        piece = self._unwritten()
        self._written = len(self._ids)
        return piece

    def _unwritten(self) -> str:
        before = self._text.decode(self._ids[self._start : self._written])
        return self._text.decode(self._ids[self._start :])[len(before) :]


def read_prompt(text: Text, folder: Path, prompt: str, is_chat: bool) -> NDArray[np.int64]:
    """The tokens of a prompt, (n,). ``is_chat``: it is what a user says, written by the chat template of ``folder``.

    Without a chat nothing is put before it, as nothing is before a document in training.

    Raises:
        UsageError: it has no tokens.
        BadInput: there is no chat template, or it refuses the message.
    """
    if is_chat:
        template = ChatTemplate(folder, datetime.now())
        try:
            prompt = template.render([{"role": "user", "content": prompt}], add_generation_prompt=True)
        except MemoryError:
            raise
        except Exception as error:  # a template is a program: it may raise nearly anything
            raise BadInput(f"the chat template of {folder} refuses the prompt: {error}") from error
    ids = [tokens.ids for tokens in text.encode([prompt])]
    if not sum(map(len, ids)):
        raise UsageError("the prompt has no tokens", "Give a word to begin with: --prompt Once")
    return np.concatenate(ids)


class Bounded(Protocol):
    """What takes so many tokens at most."""

    @property
    def max_length(self) -> int: ...


def check_length(model: Bounded, prompt_tokens: int, max_tokens: int) -> None:
    """Raises UsageError if the model has no room for the prompt and ``max_tokens`` more."""
    if prompt_tokens + max_tokens > model.max_length:
        left = model.max_length - prompt_tokens
        raise UsageError(
            f"a prompt of {prompt_tokens} tokens and {max_tokens} more are {prompt_tokens + max_tokens}, and the model "
            f"takes at most {model.max_length}",
            f"Set --max-tokens {left}, or shorten the prompt." if left > 0 else "Shorten the prompt.",
        )


def end_tokens(folder: Path, text: Text) -> frozenset[int]:
    """The tokens that end a text: those of generation_config.json, otherwise config.json, and the tokenizer's
    eos_token, by which documents end in training.

    Raises:
        BadInput: a file of the folder is damaged, or names no tokens.
    """
    found: set[int] = set()
    for name in MODEL_CONFIGS:
        value = read_object(folder, name).get("eos_token_id") if (folder / name).exists() else None
        if value is not None:
            several = value if isinstance(value, list) else [value]
            if not all(type(number) is int for number in several):
                raise BadInput(f"{folder / name}: eos_token_id is {value!r}, which is no token", "Copy the file again.")
            found.update(several)
            break
    token = special_tokens(folder).get("eos_token")
    if token is not None and (number := text.token_to_id(token)) is not None:
        found.add(number)
    return frozenset(found)


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen: the likeliest at ``temperature`` 0; otherwise at random by softmax(logits / temperature),
    among the fewest tokens that have ``top_p`` of the probability together."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


def choose(logits: NDArray[np.float32], sampling: Sampling, position: int) -> int:
    """The token at ``position`` of a text, by its logits (vocab_size,): a pure function.

    Raises:
        BadInput: the logits are not numbers.
    """
    best = int(logits.argmax())
    if not np.isfinite(logits[best]):
        raise BadInput(
            f"the model's logits at position {position} are not finite", "Its weights are damaged, or it diverged."
        )
    if sampling.temperature == 0:
        return best
    with np.errstate(over="ignore"):
        p = np.exp((logits.astype(np.float64) - logits[best]) / sampling.temperature)
    p /= p.sum()
    likeliest_first = np.argsort(-p, kind="stable")
    mass = np.cumsum(p[likeliest_first])
    count = min(int(np.searchsorted(mass, sampling.top_p)) + 1, len(mass))
    draw = uniform(Stream(sampling.seed, Purpose.SAMPLING), position, 1)[0, 0] * mass[count - 1]
    # Rounding may bring the draw up to the last sum.
    return int(likeliest_first[min(int(np.searchsorted(mass[:count], draw, side="right")), count - 1)])


def generate(
    read: Callable[[NDArray[np.int64]], NDArray[np.float32]],
    prompt: NDArray[np.int64],
    max_tokens: int,
    ends: frozenset[int],
    sampling: Sampling,
) -> Iterator[int]:
    """Tokens after ``prompt`` (n,), at most ``max_tokens``; one of ``ends`` is the last.

    Args:
        read: reads on by tokens (n,), and returns the logits (vocab_size,) of the next.
    """
    tokens = prompt
    for position in range(len(prompt), len(prompt) + max_tokens):
        token = choose(read(tokens), sampling, position)
        yield token
        if token in ends:
            return
        tokens = np.array([token], np.int64)


def unmask(
    logits: Callable[[NDArray[np.int64], float], NDArray[np.float32]],
    tokens: NDArray[np.int64],
    mask: int,
    num_steps: int,
    sampling: Sampling,
) -> NDArray[np.int64]:
    """Fills those of ``tokens`` (length,) that are ``mask`` (MD4, arXiv 2406.04329, section 4): at each step from
    t = cos(pi/2 k / num_steps) to the next a part of what is still masked is drawn and stays.

    Args:
        logits: (1, length, vocab_size) of tokens (1, length) at t.
    """
    tokens = tokens.copy()
    times = [math.cos(math.pi / 2 * k / num_steps) for k in range(num_steps)] + [0.0]
    for step, (t, following) in enumerate(itertools.pairwise(times)):
        (places,) = np.nonzero(tokens == mask)
        draws = uniform(Stream(sampling.seed, Purpose.NOISE, 0, step), 0, len(tokens))[:, 0]
        shown = [place for place in places.tolist() if draws[place] < (t - following) / t]
        if not shown:
            continue
        found = logits(tokens[None], t)[0]
        for place in shown:
            tokens[place] = choose(found[place], sampling, place)
    return tokens
