"""Tokens are kept in a scratch folder: made once, in little memory, whatever is killed meanwhile."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from edgetrain.data import text as text_module
from edgetrain.data import tokens as tokens_module
from edgetrain.data.text import open_text
from edgetrain.errors import DiskError
from edgetrain.spec import TextSpec
from tests.data import texts
from tests.data.text_files import write_lines
from tests.data.texts import LINES, TEXT, VOCAB_SIZE, Opener, read_all, write

opener = texts.opener


def test_a_second_open_does_not_tokenise_again(opener: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(opener.tmp / "book.txt", TEXT)
    first = read_all(opener(source, held_out=0.1))
    held_out = read_all(opener(source, "held_out", held_out=0.1))

    class Called(Exception):
        pass

    def tokenise(*arguments: object) -> None:
        raise Called

    monkeypatch.setattr(text_module, "Tokenizer", tokenise)
    assert read_all(opener(source, held_out=0.1)) == first
    assert read_all(opener(source, "held_out", held_out=0.1)) == held_out
    assert opener(source, held_out=0.1, length=99).length == 99  # the same tokens, cut elsewhere
    assert sorted(path.suffix for path in (opener.tmp / "scratch").iterdir()) == ["", ".lock"]

    changes: list[dict[str, Any]] = [
        {"seed": 6},
        {"held_out": 0.2},
        {"packing": False},
        {"vocab_size": VOCAB_SIZE + 1},
    ]
    for change in changes:
        with pytest.raises(Called):
            opener(source, **{"held_out": 0.1, **change})
    for path, text in (
        (source, TEXT + "."),
        (opener.model / "chat_template.jinja", "x"),
        (opener.model / "tokenizer_config.json", '{"eos_token": "<unk>"}'),
        (opener.model / "tokenizer.json", (opener.model / "tokenizer.json").read_text() + " "),
    ):
        before = path.read_bytes() if path.exists() else None
        status = source.stat()
        path.write_text(text)
        with pytest.raises(Called):
            opener(source, held_out=0.1)
        path.unlink() if before is None else path.write_bytes(before)
        os.utime(source, ns=(status.st_atime_ns, status.st_mtime_ns))
        assert read_all(opener(source, held_out=0.1)) == first
    os.utime(source, (1, 1))
    with pytest.raises(Called):
        opener(source, held_out=0.1)


def test_damaged_tokens_are_made_again(opener: Opener) -> None:
    source = write(opener.tmp / "book.txt", TEXT)
    rows = read_all(opener(source))
    (folder,) = (path for path in (opener.tmp / "scratch").iterdir() if path.is_dir())
    for name in ("train.tokens", "train.flags", "train.starts", "sizes.json"):
        os.truncate(folder / name, (folder / name).stat().st_size - 3)
        assert read_all(opener(source)) == rows
    (folder / "train.starts").unlink()
    assert read_all(opener(source)) == rows


_OPEN = """
import sys, time
from pathlib import Path
import numpy as np
from edgetrain.data.text import open_text
from edgetrain.spec import TextSpec
source, model, scratch, packing, peak = sys.argv[1:]
def peak_kib():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
spec = TextSpec(source=source, length=64, packing=packing == "True", held_out=0.0)
dataset = open_text(spec, "train", Path(model), 512, Path(scratch), 0)
dataset.read(np.arange(min(64, dataset.num_examples)))
again = open_text(spec, "train", Path(model), 512, Path(scratch), 0)
assert again.num_examples == dataset.num_examples
print(dataset.num_examples, peak_kib() if peak == "True" else "torch" in sys.modules)
"""


def command(opener: Opener, source: Path, scratch: str, packing: bool = True, peak: bool = False) -> list[str]:
    arguments = (source, opener.model, opener.tmp / scratch, packing, peak)
    return [sys.executable, "-c", _OPEN, *map(str, arguments)]


def output(command: list[str]) -> list[str]:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()


def test_torch_is_not_imported(opener: Opener) -> None:
    source = write_lines(opener.tmp / "lines.jsonl", *LINES)
    assert output(command(opener, source, "scratch", packing=False)) == [str(len(LINES)), "False"]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from /proc")
@pytest.mark.parametrize("kind", ["one document", "many lines", "one long line"])
def test_memory_does_not_grow_with_the_text(opener: Opener, kind: str) -> None:
    peaks = []
    for number, factor in enumerate((1, 10)):
        source = opener.tmp / f"{number}.{'txt' if kind == 'one document' else 'jsonl'}"
        if kind == "one document":
            write(source, TEXT * 300 * factor)
        elif kind == "many lines":
            write_lines(source, *[json.dumps({"prompt": "a", "completion": TEXT[:500]})] * (1500 * factor))
        else:
            write_lines(source, {"text": TEXT * 100 * factor})
        grown_kib = source.stat().st_size * 9 // 10 // 1024
        peaks.append(int(output(command(opener, source, "scratch", peak=True))[1]))
    assert grown_kib > 2500
    # A line has to be in memory whole, a few times over while it is parsed, but not as tokens. Otherwise there is some
    # growth in the beginning: the tokenizer remembers words, up to a number.
    assert peaks[1] - peaks[0] < (5 * grown_kib if kind == "one long line" else 0.9 * grown_kib)


def test_processes_at_the_same_time_and_kills(opener: Opener) -> None:
    source = write(opener.tmp / "book.txt", TEXT * 150)
    expected = output(command(opener, source, "alone"))
    for _ in range(4):
        killed = subprocess.Popen(command(opener, source, "scratch"))
        while not list((opener.tmp / "scratch").glob("*.part/train.tokens")):
            assert killed.poll() is None
            time.sleep(0.002)
        killed.send_signal(signal.SIGKILL)
        killed.wait()
    assert not list((opener.tmp / "scratch").glob("*/sizes.json"))
    running = [subprocess.Popen(command(opener, source, "scratch"), stdout=subprocess.PIPE, text=True) for _ in "abc"]
    assert [process.communicate()[0].split() for process in running] == [expected] * 3
    (found,) = (opener.tmp / "scratch").glob("*/")
    (alone,) = (opener.tmp / "alone").glob("*/")
    assert sorted(path.name for path in found.iterdir()) == sorted(path.name for path in alone.iterdir())
    for path in alone.iterdir():
        assert (found / path.name).read_bytes() == path.read_bytes()


def test_no_room(opener: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(opener.tmp / "a.txt", TEXT * 20)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))  # writing fails as on a full disk, in the middle
    try:
        with pytest.raises(
            DiskError, match=r"Cannot write the tokens .*: File too large; more than .* are needed, .* are"
        ):
            opener(source)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list((opener.tmp / "scratch").glob("*/"))  # what was written is gone

    class Usage:
        free = 1000

    with monkeypatch.context() as patch:
        patch.setattr(tokens_module.shutil, "disk_usage", lambda path: Usage)
        with pytest.raises(
            DiskError, match=r"no room for the tokens .*/scratch: some 3\d\.\d KiB are needed, 1000 B are"
        ):
            opener(source)
    assert opener(source).num_examples > 100
    spec = TextSpec(source=str(source), length=16)
    blocked = write(opener.tmp / "file", "")
    with pytest.raises(DiskError, match=r"Cannot write the tokens of the text into .*file: File exists"):
        open_text(spec, "train", opener.model, VOCAB_SIZE, blocked, 0)
