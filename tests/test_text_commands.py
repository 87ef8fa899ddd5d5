"""The vocabulary of a language model that is trained from the beginning, and the commands."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edgetrain.cli.texts import until_end
from edgetrain.data.tokenizer import Tokenizer
from edgetrain.errors import BadInput
from edgetrain.generation import Text
from edgetrain.vocabulary import END_OF_TEXT, put_tokenizer, vocabulary_size
from tests.data.text_files import write_tokenizer
from tests.exporters.common import export, make_session
from tests.test_dit import run
from tests.text_families import FAMILIES, TEXT, small

pytestmark = pytest.mark.usefixtures("one_thread")


def test_bytes_are_tokens_of_their_own_number(tmp_path: Path) -> None:
    put_tokenizer("bytes", tmp_path)
    tokenizer, text = Tokenizer(tmp_path, 257), Text(tmp_path, 257)
    written = "Grüße,\n\tin der Früh – 1 2 €  \x00\x7f"
    ids = np.concatenate([tokens.ids for tokens in tokenizer.encode([written])])
    assert ids.tolist() == list(written.encode())
    assert text.decode(ids.tolist()) == written
    assert tokenizer.token_to_id(END_OF_TEXT) == 256
    assert vocabulary_size("bytes") == 257


def test_a_vocabulary_is_as_large_as_its_largest_id(tmp_path: Path) -> None:
    put_tokenizer("bytes", tmp_path)
    assert vocabulary_size(str(tmp_path)) == vocabulary_size(str(tmp_path / "tokenizer.json")) == 257
    (tmp_path / "tokenizer.json").write_text('{"model": {"vocab": [["a", -1.0], ["b", -2.0]]}, "added_tokens": []}')
    assert vocabulary_size(str(tmp_path)) == 2
    damages = ("{}", "[]", "{", '{"model": {"vocab": {"a": "b"}}}', '{"model": {"vocab": 5}, "added_tokens": null}')
    for damaged in damages:
        (tmp_path / "tokenizer.json").write_text(damaged)
        with pytest.raises(BadInput):
            vocabulary_size(str(tmp_path))
    with pytest.raises(BadInput, match="there is no tokenizer"):
        vocabulary_size(str(tmp_path / "nowhere"))


@pytest.mark.parametrize("objective", ["diffusion_blocks", "exact"])
@pytest.mark.parametrize("family", FAMILIES)
def test_from_a_text_to_a_text(family: str, objective: str, tmp_path: Path) -> None:
    session, text = tmp_path / "s", tmp_path / "text.txt"
    text.write_text(TEXT)
    sizes = {
        "model.width": 32, "model.depth": 4, "model.loops": 2, "data.length": 32, "train.batch_size": 4,
        "train.steps": 4, "train.visit_steps": 2, "train.objective": objective, "train.micro_batch": 0,
    }  # fmt: skip
    changes = [word for key, value in sizes.items() for word in ("--set", f"{key}={value}")]
    threads = ("--threads", 1)
    summary = run(
        "train", session, "--recipe", f"{family}-text", "--data", text, "--memory-budget", "450MiB", *threads, *changes
    )
    assert summary["status"] == "complete"
    assert summary["peak_bytes"] <= summary["budget_bytes"]
    assert (session / "model" / "tokenizer.json").exists()
    found = run("evaluate", session, "--draws", 2, *threads)
    # After four steps the bytes of English are not yet known: 8 bits and a little, a chain's bound apart.
    assert all((row["readout"] == "chain" and row["is_bound"]) or 5 < row["value"] < 9 for row in found["results"])
    if family == "recurrent":
        assert {row["loops"] for row in found["results"]} == {1, 2, 4}
    prompt = "In the [MASK:9] God [MASK]" if family == "masked" else "In the"
    command = ("generate", session, "--prompt", prompt, "--max-tokens", 5, "--temperature", 1, *threads)
    made = run(*command)
    assert made["text"] == run(*command)["text"]
    assert made["tokens"] == (10 if family == "masked" else 5) or made["finish"] == "stop"
    assert made["peak_bytes"] <= made["budget_bytes"]
    assert family != "masked" or made["text"].startswith("In the")
    assert made["text"] != run(*command, "--seed", 1)["text"]
    # Likeliest tokens: among drawn ones, logits that are nearly equal after four steps change places by their rounding.
    other = tmp_path / "other.txt"
    other.write_text(TEXT[7:1000])
    given = ("--data", other, *(("--euler-steps", 2) if family == "recurrent" and objective == "exact" else ()))
    costs = {row["readout"]: row["value"] for row in run("evaluate", session, *given, *threads)["results"]}
    likeliest = ("--prompt", prompt, "--max-tokens", 5, *threads)
    made = run("generate", session, *likeliest)
    # Each kind of graph is compared by tests/exporters/test_text.py: here the commands, by half of the cases.
    single_file = (family == "masked") != (objective == "exact")
    exported = tmp_path / "x"
    rows = run("export", session, "--to", exported, *(["--single-file"] if single_file else []))["parity"]
    assert all(row["passed"] and row["batch_sizes"] == [1, 3] * (len(row["batch_sizes"]) // 2) for row in rows)
    written = run("generate", exported, *likeliest, "--memory-budget", "450MiB")
    assert written["peak_bytes"] < 120 << 20, "torch was imported"
    assert written["text"] == made["text"]
    (bits, _) = run("evaluate", exported, "--data", other, *threads)["results"]
    assert bits["value"] == pytest.approx(costs[bits["readout"]], rel=1e-5)
    assert bits["readout"] == ("elbo" if family == "masked" else "whole" if objective == "exact" else "sigma_max")
    assert "no text of its own" in run("evaluate", exported, exit_code=2)["message"]
    run("evaluate", exported, "--data", other, "--split", "test", exit_code=2)
    run("predict", exported, "--data", text, exit_code=7)


@pytest.mark.parametrize("family", ["ar", "masked"])
def test_tokens_of_a_tokenizer(family: str, tmp_path: Path) -> None:
    tokenizer, text = write_tokenizer(tmp_path / "words", more=TEXT), tmp_path / "text.txt"
    text.write_text(TEXT)
    sizes = {
        "model.tokenizer": tmp_path / "words", "model.width": 32, "model.depth": 2, "diffusion_blocks.num_blocks": 2,
        "data.length": 16, "train.batch_size": 4, "train.steps": 150, "train.visit_steps": 150, "optimizer.lr": 1e-2,
    }  # fmt: skip
    session = tmp_path / "s"
    changes = [word for key, value in sizes.items() for word in ("--set", f"{key}={value}")]
    recipe = ("--recipe", f"{family}-text", "--data", text, "--memory-budget", "450MiB", "--threads", 1)
    run("train", session, *recipe, *changes)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert (session / "model" / file).read_bytes() == (tmp_path / "words" / file).read_bytes()
    # The text is one sentence again and again, cut elsewhere where it is held out: what is asked is what was learnt.
    found = run("evaluate", session, "--split", "train", "--threads", 1)["results"]
    costs = {row["readout"]: row["value"] for row in found}
    assert costs["elbo" if family == "masked" else "sigma_max"] < 0.5 * np.log2(tokenizer.get_vocab_size())
    prompt = "In the beginning" if family == "ar" else "In the beginning[MASK:4]"
    made = run("generate", session, "--prompt", prompt, "--max-tokens", 4, "--threads", 1)
    assert made["text"].strip().startswith("God created the" if family == "ar" else "In the beginning God")


def test_one_graph_of_block_0_takes_no_steps(tmp_path: Path) -> None:
    """It begins at z = 0, where nothing is drawn."""
    folder = export(make_session(tmp_path / "s", small("ar", model__vocab_size=257)), tmp_path / "x", single_file=True)
    said = run("generate", folder, "--prompt", "In the", "--steps", 2, exit_code=2)
    assert "takes no steps" in said["message"]
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    assert run("evaluate", folder, "--data", text, "--limit", 2)["results"][0]["readout"] == "sigma_max-mode"


def test_a_text_that_is_filled_in_at_once_ends_where_it_says_so() -> None:
    ends = frozenset({9})
    assert until_end([9, 1, 2, 9, 4, 9], 1, ends) == ([9, 1, 2, 9], "stop")
    assert until_end([9, 1, 2], 1, ends) == ([9, 1, 2], "length")
    assert until_end([9, 1, 9], 2, ends) == ([9, 1, 9], "stop")


def test_a_masked_model_goes_on_after_a_prompt_without_a_mask(tmp_path: Path) -> None:
    text, session = tmp_path / "text.txt", tmp_path / "s"
    text.write_text(TEXT)
    sizes = ["model.width=32", "model.depth=3", "data.length=16", "train.batch_size=4", "train.visit_steps=1"]
    changes = [word for change in sizes for word in ("--set", change)]
    given = ("--recipe", "masked-text", "--data", text, "--memory-budget", "450MiB", "--steps", 1)
    run("train", session, *given, "--threads", 1, *changes)
    made = run("generate", session, "--prompt", "In the", "--max-tokens", 9, "--temperature", 1, "--threads", 1)
    assert made["finish"] in ("length", "stop")
    assert made["tokens"] == 9
    made = run("generate", session, "--prompt", "In the", "--temperature", 1, "--threads", 1)
    assert made["tokens"] == 10, "as many as texts in training have room for"


def test_what_a_command_refuses(tmp_path: Path) -> None:
    budget = ("--memory-budget", "450MiB")
    said = run("train", tmp_path / "s", "--recipe", "ar-text", *budget, exit_code=2)
    assert "no text to train on" in said["message"]
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    said = run(
        "train", tmp_path / "s", "--recipe", "ar-text", "--data", text, *budget, "--set", "model.tokenizer=nowhere",
        exit_code=7,
    )  # fmt: skip
    assert "no tokenizer.json" in said["message"]
    run("train", tmp_path / "s", "--recipe", "ar-text", "--data", tmp_path / "nowhere.txt", *budget, exit_code=7)
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_plan_needs_no_text_and_a_budget_that_is_too_small_is_named(family: str) -> None:
    said = run("plan", "--recipe", f"{family}-text", "--memory-budget", "100MiB", "--threads", 1, exit_code=3)
    assert "the least this training can do with" in said["message"]
    assert "--memory-budget" in said["hint"]
