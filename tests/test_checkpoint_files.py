"""Which files of a folder are read and copied: through links or not, no pipes, and those of the tokenizer."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from edgetrain.checkpoint import TOKENIZER_FILES, copy_tokenizer, open_checkpoint
from edgetrain.errors import BadInput
from tests import checkpoints
from tests.checkpoints import SPECS, refused

saved, llama = checkpoints.saved, checkpoints.llama


def test_the_cache_of_the_hub_is_read_through_its_links(llama, tmp_path):
    blobs, snapshot = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / "123abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(llama.iterdir()):
        path.rename(blobs / str(number))
        (snapshot / path.name).symlink_to(Path("../../blobs") / str(number))
    assert open_checkpoint(snapshot).model == SPECS["llama"]


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_link_out_of_the_folder_is_refused_for_any_file(llama, tmp_path, name):
    (llama / name).rename(tmp_path / name)
    (llama / name).symlink_to(tmp_path / name)
    refused(llama, "outside the folder", name)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_pipe_does_not_hang(llama, name):
    (llama / name).unlink()
    os.mkfifo(llama / name)
    refused(llama, name, "no ordinary file")


def test_the_files_beside_the_weights_are_copied(llama, tmp_path):
    contents = {name: os.urandom(5 + n) for n, name in enumerate(TOKENIZER_FILES) if name != "vocab.json"}
    for name, content in contents.items():
        (llama / name).write_bytes(content)
    (llama / "notes.txt").write_text("left behind")
    to = tmp_path / "to"
    to.mkdir()
    copies = copy_tokenizer(llama, to)
    assert {path.name: path.read_bytes() for path in to.iterdir()} == contents
    assert sorted(copies) == sorted(to.iterdir())


def test_a_tokenizer_file_too_large_is_refused(llama, tmp_path):
    (llama / "tokenizer.json").touch()
    os.truncate(llama / "tokenizer.json", (256 << 20) + 1)
    with pytest.raises(BadInput, match=r"tokenizer\.json.*268435457"):
        copy_tokenizer(llama, tmp_path)
    assert not (tmp_path / "config.json").exists()


def test_a_secret_is_not_copied_through_a_link(llama, tmp_path):
    (tmp_path / "secret").write_text("secret")
    (llama / "vocab.json").symlink_to(tmp_path / "secret")
    to = tmp_path / "to"
    to.mkdir()
    with pytest.raises(BadInput, match=r"vocab\.json.*outside the folder"):
        copy_tokenizer(llama, to)
    assert list(to.iterdir()) == []
