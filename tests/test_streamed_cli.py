"""Exact training as a user runs it: a small model imported, planned and trained by the commands within a budget."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from edgetrain.errors import UsageError
from edgetrain.recipe import resolve
from edgetrain.session import Session
from edgetrain.units import MIB
from tests.data.text_files import SENTENCES, write_tokenizer

transformers = pytest.importorskip("transformers")

ROOT = Path(__file__).parents[1]
_START = "import sys; sys.argv[0] = 'edgetrain'; from edgetrain.cli.main import run; run()"
_RECIPE = """
[data]
length = {length}
[optimizer]
lr = 1e-3
[train]
objective = "exact"
steps = {steps}
batch_size = {batch}
visit_steps = 2
"""


class Place:
    """A folder with a model, text, a recipe and a cache of its own."""

    def __init__(self, folder: Path, length: int = 32, steps: int = 6, batch: int = 4, **sizes: int) -> None:
        self.folder = folder
        config = transformers.LlamaConfig(
            **{"vocab_size": 400, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4,
               "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256} | sizes,
            tie_word_embeddings=True,
        )  # fmt: skip
        transformers.LlamaForCausalLM(config).save_pretrained(folder / "model")
        write_tokenizer(folder / "model")
        (folder / "text.txt").write_text("\n".join(SENTENCES * 200), "utf-8")
        (folder / "recipe.toml").write_text(_RECIPE.format(length=length, steps=steps, batch=batch))
        self.environment = os.environ | {"XDG_CACHE_HOME": str(folder / "cache"), "PYTHONPATH": str(ROOT)}

    @staticmethod
    def command(*arguments: object) -> list[str]:
        return [sys.executable, "-c", _START, *map(str, arguments)]

    def run(self, *arguments: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*arguments), capture_output=True, text=True, check=False,
            env=self.environment, cwd=self.folder, timeout=600,
        )  # fmt: skip

    def json(self, *arguments: object, exit_code: int = 0) -> dict[str, Any]:
        done = self.run(*arguments, "--json")
        assert done.returncode == exit_code, done.stderr + done.stdout
        assert "Traceback" not in done.stderr
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    def imported(self, name: str, *arguments: object) -> Path:
        options = ["--recipe", "recipe.toml", "--data", "text.txt", *arguments]
        self.json("import", "model", name, *options)
        return self.folder / name


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("exact"))


@pytest.fixture(scope="module")
def trained(place: Place) -> dict[str, dict[str, Any]]:
    """One session trained at the smallest budget, then on with more, then with plenty; and what was planned before."""
    session = place.imported("s")
    refusal = place.json("plan", session, "--memory-budget", "1MiB", "--threads", 1, exit_code=3)
    found = re.search(r"--memory-budget (\d+)MiB", refusal["hint"])
    assert found is not None
    smallest = int(found[1])
    budgets = {"smallest": f"{smallest}MiB", "middle": f"{smallest + 12}MiB", "everything": f"{smallest + 400}MiB"}
    results = {"refusal": refusal}
    for name, budget in budgets.items():
        options = [session, "--memory-budget", budget, "--threads", 1]
        if name != "middle":
            results[f"plan {name}"] = place.json("plan", *options)
        results[name] = place.json("train", *options, "--visits", 1)
    return results


BUDGETS = ("smallest", "middle", "everything")


def test_it_keeps_to_every_budget(trained: dict[str, dict[str, Any]]) -> None:
    for name in BUDGETS:
        summary = trained[name]
        assert summary["peak_bytes"] <= summary["budget_bytes"], name
        assert summary["plan_peak_bytes"] <= summary["budget_bytes"], name
        assert summary["peak_bytes"] == pytest.approx(summary["plan_peak_bytes"], rel=0.05), name
        assert summary["retries"] == 0, name


def test_it_goes_on_with_another_budget(place: Place, trained: dict[str, dict[str, Any]]) -> None:
    assert [trained[name]["step"] for name in BUDGETS] == [2, 4, 6]
    assert [trained[name]["status"] for name in BUDGETS] == ["partial", "partial", "complete"]
    assert trained["everything"]["loss"] < trained["smallest"]["loss"]
    choice = trained["plan everything"]["choice"]
    assert (choice["resident"], choice["kept_layers"]) == (True, 4)
    assert sum(trained["plan everything"]["owners"].values()) == trained["plan everything"]["peak_bytes"]
    assert place.json("verify", place.folder / "s")["digest"] == trained["everything"]["digest"]


def test_the_first_plan_fixes_the_micro_batch(place: Place, trained: dict[str, dict[str, Any]]) -> None:
    first = trained["plan smallest"]["choice"]["micro_batch"]
    assert [trained[name]["micro_batch"] for name in BUDGETS] == [first] * 3
    assert trained["plan everything"]["choice"]["micro_batch"] == first
    assert Session.open(place.folder / "s").progress(0).micro_batches == ((0, first),)


def test_the_budget_changes_no_bit(place: Place, trained: dict[str, dict[str, Any]]) -> None:
    first = trained["smallest"]["micro_batch"]
    session = place.imported("again", "--set", f"train.micro_batch={first}")
    budget = trained["everything"]["budget_bytes"] // MIB
    done = place.json("train", session, "--memory-budget", f"{budget}MiB", "--threads", 1)
    assert (done["status"], done["step"]) == ("complete", 6)
    assert done["digest"] == trained["everything"]["digest"]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another allocator")
def test_it_trains_without_the_allocators_cache(place: Place, trained: dict[str, dict[str, Any]]) -> None:
    """... which stands in the environment that the process began with, its last time."""
    session = place.imported("uncached")
    budget = trained["everything"]["budget_bytes"] // MIB
    command = place.command("train", session, "--memory-budget", f"{budget}MiB", "--threads", 1)
    environment = {name: value for name, value in place.environment.items() if name != "GLIBC_TUNABLES"}
    seen = b""
    with subprocess.Popen(command, env=environment, cwd=place.folder, stdout=subprocess.DEVNULL) as training:
        while training.poll() is None:
            with contextlib.suppress(OSError):
                seen = Path(f"/proc/{training.pid}/environ").read_bytes() or seen
            time.sleep(0.01)
    assert training.returncode == 0
    assert b"GLIBC_TUNABLES=glibc.malloc.tcache_count=0" in seen.split(b"\0")


def test_the_refusal_is_clear(trained: dict[str, dict[str, Any]]) -> None:
    message = trained["refusal"]["message"]
    assert re.match(r"1\.0 MiB are too little: the least this training can do with is .* \(\d+ bytes\)", message)
    smallest = int(re.findall(r"\((\d+) bytes\)", message)[0])
    peak = trained["smallest"]["peak_bytes"]
    assert peak <= smallest <= 1.1 * peak


def test_status_of_an_exact_session(place: Place, trained: dict[str, dict[str, Any]]) -> None:
    value = place.json("status", place.folder / "s")
    assert (value["status"], value["step"], value["steps"]) == ("complete", 6, 6)
    assert value["digest"] == trained["everything"]["digest"]
    (row,) = value["blocks"]
    assert "sigma" not in row
    assert row["loss"] == trained["everything"]["loss"]
    assert value["trained_parameters"] > 100_000
    assert value["frozen_parameters"] == 0
    text = place.run("status", place.folder / "s").stdout
    assert "step 6/6" in text
    assert f"loss {row['loss']:.4f}" in text
    assert "M trained" in text
    assert "sigma" not in text
    assert "block" not in text
    lora = place.imported("adapters", "--set", "exact.train=lora", "--set", "exact.rank=2")
    fresh = place.json("status", lora)
    assert 0 < fresh["trained_parameters"] < fresh["frozen_parameters"]
    assert "loss -" in place.run("status", lora).stdout


def test_without_data_there_is_no_training(place: Place) -> None:
    place.json("import", "model", "none", "--recipe", "recipe.toml")
    done = place.run("train", "none", "--memory-budget", "600MiB")
    assert done.returncode == 2
    assert "this session has no data yet" in done.stderr
    assert "--data" in done.stderr


def test_an_example_longer_than_the_model_takes(place: Place) -> None:
    done = place.run("import", "model", "long", "--recipe", "recipe.toml", "--set", "data.length=257")
    assert done.returncode == 2
    assert "data.length is 257 tokens, and the model takes at most 256" in done.stderr
    assert not (place.folder / "long").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ('exact.targets=["q_proj","nope"]', "no linear map 'nope'"),
        ("exact.rank=0", "exact.rank must be at least 1"),
        ("exact.dropout=1.0", "exact.dropout must be at least 0 and below 1"),
        ("exact.train=some", "exact.train is 'some'"),
        ("exact.weights=fp8", "exact.weights is 'fp8'"),
        ("train.objective=diffusion_blocks", "trained by the exact objective"),
        ("train.micro_batch=5", "not between 1 and the batch size 4"),
    ],
)
def test_what_is_refused_at_the_import(change: str, said: str, place: Place) -> None:
    done = place.run(
        "import", "model", "refused", "--recipe", "recipe.toml", "--set", "exact.train=lora", "--set", change
    )
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert not (place.folder / "refused").exists()


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ({"exact": {"train": "lora"}}, "LoRA is there for language models, not for 'vit'"),
        ({"exact": {"train": "last", "last_layers": 9}}, "exact.last_layers is 9, and the model has 6 layers"),
        ({"optimizer": {"clip_over": "all"}}, "optimizer.clip_over is 'all'"),
    ],
)
def test_what_is_refused_of_a_vit(recipe: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=re.escape(said)):
        resolve({"train": {"objective": "exact"}, **recipe})


def test_a_vit_is_trained_exactly_by_a_recipe(place: Place) -> None:
    """Created by train, not imported; only its last layer trains."""
    (place.folder / "vit.toml").write_text(
        '[model]\nwidth = 32\ndepth = 3\nheads = 2\npatch = 2\n[exact]\ntrain = "last"\n'
        '[train]\nobjective = "exact"\nsteps = 4\nbatch_size = 8\n'
    )
    done = place.json("train", "v", "--recipe", "vit.toml", "--memory-budget", "600MiB", "--threads", 1)
    assert (done["status"], done["step"]) == ("complete", 4)
    assert done["peak_bytes"] == pytest.approx(done["plan_peak_bytes"], rel=0.05)
    assert done["peak_bytes"] <= done["budget_bytes"]
    (result,) = place.json("evaluate", "v", "--threads", 1)["results"]
    assert (result["readout"], result["num_examples"]) == ("top-1", 360)
    assert 0 <= result["value"] <= 100
    (row,) = place.json("export", "v", "--to", "out")["parity"]
    assert (row["output"], row["passed"]) == ("logits", True)
    (exported,) = place.json("predict", "out", "--data", "digits", "--threads", 1)["results"]
    assert (exported["readout"], exported["value"]) == ("top-1", pytest.approx(result["value"], abs=0.3))


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [[], ["exact.train=last", "exact.last_layers=2"], ["exact.train=lora"], ["optimizer.clip_over=global"],
     ["exact.weights=bf16"]],
)  # fmt: skip
def test_larger_models_keep_to_their_budgets(changes: list[str], tmp_path: Path) -> None:
    """Where the model weighs more than the runtime's noise."""
    place = Place(
        tmp_path, 128, 2, 8, hidden_size=384, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=6,
        vocab_size=20000,
    )  # fmt: skip
    session = place.imported("s", *(part for change in changes for part in ("--set", change)))
    refusal = place.json("plan", session, "--memory-budget", "1MiB", "--threads", 1, exit_code=3)
    smallest = int(re.findall(r"--memory-budget (\d+)MiB", refusal["hint"])[0])
    for more in (0, 100, 1500):
        copy = tmp_path / f"s{more}"
        shutil.copytree(session, copy)
        done = place.json("train", copy, "--memory-budget", f"{smallest + more}MiB", "--threads", 1)
        assert done["status"] == "complete"
        assert done["peak_bytes"] <= done["budget_bytes"]
        assert done["peak_bytes"] == pytest.approx(done["plan_peak_bytes"], rel=0.05)
        assert done["retries"] == 0
