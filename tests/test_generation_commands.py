"""The commands that write and evaluate: within budgets, on sessions, and what they refuse."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import edgetrain.stages
from edgetrain import generation
from edgetrain.data.text import HELD_OUT, open_text
from edgetrain.generation import Text, Writer, generate
from edgetrain.inference import Context
from tests import saved_models
from tests.data.text_files import write_tokenizer
from tests.saved_models import BUILD, GREEDY, Saved, make_session, save

pytestmark = pytest.mark.usefixtures("one_thread", "small_chunks")
small_chunks, text_file = saved_models.small_chunks, saved_models.text_file

CHUNK_BYTES = edgetrain.stages._CHUNK_BYTES
ROOT = Path(__file__).parents[1]

RUN = """
import json, sys
from edgetrain.cli.main import guarded
from importlib import import_module
command = import_module("edgetrain.cli." + sys.argv[1]).command
guarded(lambda: command.main(sys.argv[2:], standalone_mode=False), as_json="--json" in sys.argv)
"""


def run(*arguments: Any, exit_code: int = 0) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    told = [*map(str, arguments), "--threads", "1"]
    done = subprocess.run(
        [sys.executable, "-c", RUN, *told], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == exit_code, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """48 MiB of layers."""
    sizes = {"vocab_size": 420, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 16}
    folder = tmp_path_factory.mktemp("large")
    saved = save(BUILD["llama"](**sizes), folder)
    write_tokenizer(folder)
    return saved


def test_the_budget_holds_and_changes_no_text(large):
    told = ["generate", large.folder, "--prompt", "The quick", "--max-tokens", 12, "--temperature", 2, "--json"]
    free = json.loads(run(*told))
    assert (free["finish"], free["tokens"], free["budget_bytes"]) == ("length", 12, None)
    budget = free["peak_bytes"] - (20 << 20)  # the runtime alone varies by some MiB of file pages
    tight = json.loads(run(*told, "--memory-budget", budget))
    assert tight["text"] == free["text"]
    assert tight["peak_bytes"] <= budget == tight["budget_bytes"]
    refused = json.loads(run(*told, "--memory-budget", "150MiB", exit_code=3))
    assert refused["error"] == "BudgetInfeasible"
    assert "--memory-budget" in refused["hint"]


def test_commands_on_a_session(tmp_path, text_file):
    saved = save(BUILD["llama tied"](vocab_size=420), tmp_path / "model")
    write_tokenizer(saved.folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(edgetrain.stages, "_CHUNK_BYTES", CHUNK_BYTES)
        session = make_session(tmp_path / "s", saved, text_file)
    value = json.loads(run("evaluate", session.path, "--memory-budget", "500MiB", "--json"))
    dataset = open_text(session.spec.text, HELD_OUT, session.model_files, 420, tmp_path, session.spec.train.seed)
    tokens, targets, weights = (torch.from_numpy(x) for x in dataset.read(np.arange(dataset.num_examples)))
    with torch.no_grad():
        losses = F.cross_entropy(saved.theirs(tokens).logits.flatten(0, 1), targets.flatten(), reduction="none")
    expected = float((losses * weights.flatten()).sum() / weights.sum())
    assert [row["metric"] for row in value["results"]] == ["loss", "perplexity"]
    assert value["results"][0]["value"] == pytest.approx(expected, abs=1e-5)
    assert value["results"][1]["value"] == pytest.approx(math.exp(expected), rel=1e-4)
    other = tmp_path / "other"
    shutil.copytree(text_file, other)
    splits = {}
    for source, more in ((other, []), (text_file, []), (other, ["--split", "train"])):
        options = ["--data", source, "--memory-budget", "500MiB", "--json", *more]
        found = json.loads(run("evaluate", session.path, *options))
        splits[source, bool(more)] = found["results"][0]["split"], found["num_tokens"]
    assert splits[text_file, False] == (HELD_OUT, value["num_tokens"]), "the session's own text was trained on"
    assert splits[other, False][0] == "all" and splits[other, True][0] == "train"
    assert splits[other, False][1] > splits[other, True][1]
    assert (value["num_examples"], value["num_tokens"]) == (dataset.num_examples, int(weights.sum()))
    assert value["peak_bytes"] <= value["budget_bytes"] == 500 << 20
    written = run("generate", session.path, "--prompt", "The", "--max-tokens", 8, "--memory-budget", "500MiB")
    text = Text(saved.folder, 420)
    prompt = generation.read_prompt(text, saved.folder, "The", False)
    ends = generation.end_tokens(saved.folder, text)
    made = list(generate(Context(saved.ours(), 16).read, prompt, 8, ends, GREEDY))
    writer = Writer(text, prompt.tolist())
    expected_text = "".join(writer.add(token) for token in made if token not in ends) + writer.end()
    assert written == expected_text + "\n"


def test_what_is_no_model_is_refused_before_torch_is_imported(tmp_path, large):
    (tmp_path / "empty").mkdir()
    assert "neither a session" in run("generate", tmp_path / "empty", "--prompt", "a", "--json", exit_code=2)
    long = json.loads(run("generate", large.folder, "--prompt", "The", "--max-tokens", 64, "--json", exit_code=2))
    assert "at most 64" in long["message"]
    code = "import sys, edgetrain.generation; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "False"
