from __future__ import annotations

import hashlib
import json
import re
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from edgetrain.errors import SessionCorrupt
from edgetrain.store.slot import StageFiles, read_header
from tests.store.common import GROUPS, new_store, reopened, section, trained

LAYOUT = GROUPS["00"][0]
SLOT = f"stages/{LAYOUT.name}.a.safetensors"


def test_any_tool_opens_a_slot_and_finds_the_values(tmp_path: Path) -> None:
    new_store(tmp_path)
    with safe_open(tmp_path / SLOT, framework="numpy") as file:
        assert file.metadata() == {"format": "edgetrain.slot", "version": "1", "stage": LAYOUT.name}
        for role in ("weight", "m", "v"):
            data = section(LAYOUT, role, 0)
            for tensor in LAYOUT.tensors_of(role):
                dtype = {"F32": np.float32, "F16": np.float16}[tensor.dtype]
                count = tensor.nbytes // np.dtype(dtype).itemsize
                expected = np.frombuffer(data, dtype, count, LAYOUT.offset(role, tensor.name)).reshape(tensor.shape)
                found = file.get_tensor(f"{role}.{tensor.name}")
                assert found.dtype == dtype
                assert found.shape == tensor.shape
                assert found.tobytes() == expected.tobytes()
        others = [name for name in file.keys() if not name.startswith(("weight.", "m.", "v."))]  # noqa: SIM118
        assert all(re.fullmatch(r"pad\.\d+", name) for name in others)


def test_sections_begin_at_pages(tmp_path: Path) -> None:
    files = StageFiles(tmp_path, trained("stage"))
    positions = [files.position(role, 0, 0) for role in ("weight", "m", "v")]
    assert all(position % 4096 == 0 for position in positions)
    assert files.file_bytes % 4096 == 0
    assert positions[1] - positions[0] == files.layout.section_bytes("weight")


def test_the_hash_is_what_the_format_says(tmp_path: Path) -> None:
    store = new_store(tmp_path)
    digest = hashlib.sha256()
    data = section(LAYOUT, "m", 0)
    for name, shape, begin, num_bytes in (
        ("bias", [5], 0, 20),
        ("half", [3, 7], 64, 84),
        ("weight", [33, 65], 192, 8580),
    ):
        digest.update(json.dumps([name, "F32", shape], separators=(",", ":")).encode() + b"\n")
        digest.update(data[begin : begin + num_bytes])
    assert store.manifest("00").stages[LAYOUT.name].hashes["m"] == digest.hexdigest()


def test_header_of_another_writer_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": np.zeros((2, 3), np.float32), "e": np.zeros((0, 3), np.float16), "b": np.ones(4, np.uint8)}, path)
    header = read_header(path)
    assert {name: entry.shape for name, entry in header.tensors.items()} == {"a": (2, 3), "e": (0, 3), "b": (4,)}
    assert header.metadata == {}


@pytest.mark.parametrize("length", [2**60, 2**63, 17 << 20, 10**5])
def test_a_length_beyond_the_file_is_refused_without_allocating(tmp_path: Path, length: int) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + b"{}")
    tracemalloc.start()
    with pytest.raises(SessionCorrupt, match=f"x.safetensors.*{length}"):
        read_header(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64 << 10


def entry(begin: int, end: int, dtype: str = "U8", shape: object = None) -> dict[str, object]:
    return {"dtype": dtype, "shape": [end - begin] if shape is None else shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    "content",
    [
        {"a": entry(0, 4), "b": entry(8, 16)},  # a gap
        {"a": entry(0, 8), "b": entry(4, 16)},  # an overlap
        {"a": entry(4, 16)},  # not from 0
        {"a": entry(0, 8)},  # bytes after the last
        {"a": entry(0, 24)},  # beyond the end
        {"a": entry(0, 16, "F32", [5])},
        {"a": entry(0, 16, "F31", [4])},
        {"a": entry(0, 16, "F32", [-2, -2])},
        {"a": entry(0, 16, "F32", ["4"])},
        {"a": entry(0, 16, "F32", 4)},
        {"a": {"dtype": "U8", "shape": [16]}},
        {"a": 16},
        [],
        "nothing",
    ],
)
def test_damaged_headers_are_named(tmp_path: Path, content: object) -> None:
    text = json.dumps(content).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(16))
    with pytest.raises(SessionCorrupt, match=r"x\.safetensors.*damaged"):
        read_header(path)


@pytest.mark.parametrize(
    "content", [b"", b"\0\0\0", (2).to_bytes(8, "little") + b"{[", (9).to_bytes(8, "little") + b"\xff" * 9]
)
def test_no_header_at_all(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(SessionCorrupt, match=r"x\.safetensors"):
        read_header(path)


def test_a_truncated_slot_is_named(tmp_path: Path) -> None:
    store = new_store(tmp_path)
    with (tmp_path / SLOT).open("r+b") as file:
        file.truncate(20000)
    with pytest.raises(SessionCorrupt, match=rf"{re.escape(SLOT)}.*20000"):
        reopened(tmp_path)
    row = next(row for row in store.verify().rows if row.stage == LAYOUT.name)
    assert any("20000" in problem for problem in row.problems)
    with pytest.raises(SessionCorrupt, match="too early"):
        store.read(LAYOUT.name, "v", memoryview(bytearray(4096)))


def test_a_missing_slot_is_named(tmp_path: Path) -> None:
    new_store(tmp_path)
    (tmp_path / SLOT).unlink()
    with pytest.raises(SessionCorrupt, match=f"{re.escape(SLOT)} is missing"):
        reopened(tmp_path)


def test_a_slot_of_another_stage_is_refused(tmp_path: Path) -> None:
    new_store(tmp_path)
    (tmp_path / SLOT).write_bytes((tmp_path / "stages/block00.stem.a.safetensors").read_bytes())
    with pytest.raises(SessionCorrupt, match=r"block00\.stem"):
        reopened(tmp_path)
