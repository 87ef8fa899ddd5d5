"""Language models that were trained from the beginning as ONNX: onnxruntime computes what the trainer does."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import devices
from edgetrain.generation import Sampling, generate, unmask
from edgetrain.session import Session
from edgetrain.text_sampling import TextModel
from exporters import parity, text_runtime
from exporters.text_runtime import TextContext, TextRunner
from tests.exporters.common import export, make_session
from tests.test_dit import run
from tests.text_families import ONE_STREAM, VOCABULARY, small

PAPER = {"diffusion_blocks__preset": "paper"}
EXACT = {"train__objective": "exact"}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "masked": ("masked", {}),
    "masked, neighbours": ("masked", {"model__neighbours": 2}),
    "masked, whole": ("masked", {**EXACT, "model__neighbours": 1}),
    "ar": ("ar", {}),
    "ar, paper": ("ar", {**PAPER, "model__previous": False}),
    "ar, two streams by c_in": ("ar", {**PAPER, "diffusion_blocks__streams": 2}),
    "ar, one stream": ("ar", ONE_STREAM),
    "ar, whole": ("ar", EXACT),
    "recurrent": ("recurrent", {}),
    "recurrent, paper": ("recurrent", PAPER),
    "recurrent, whole": ("recurrent", {**EXACT, "model__loops": 3}),
}


def model_of(session: Session) -> TextModel:
    return TextModel(session, devices.open_device("cpu"), 4)


@pytest.fixture(params=VARIANTS)
def session(request: pytest.FixtureRequest, tmp_path: Path) -> Session:
    family, changes = VARIANTS[request.param]
    return make_session(tmp_path / "s", small(family, **changes))


@pytest.mark.parametrize("single_file", [False, True])
def test_onnxruntime_computes_what_the_trainer_does(session: Session, tmp_path: Path, single_file: bool) -> None:
    """Both batch sizes and lengths of the comparison; with keys and values also in two parts."""
    runner = TextRunner(export(session, tmp_path / "x", single_file))
    model = model_of(session)
    for block, number, inputs in parity.text_cases(session.spec, single_file):
        expected = model.outputs(block, inputs)
        given = dict(inputs)
        if single_file and "t" in given:
            given["t"] = given["t"][:1]
        if "state" in given:
            given["loops"] = np.array(session.spec.text_model.loops)
        tokens = given.pop("input_ids")
        if runner.manifest.layers[number]:
            found, _ = runner.read(number, tokens, runner.empty(number, len(tokens)), given)
            assert set(parity.text_outputs(session.spec, block, single_file)) == set(found) >= {"present.0.key"}
        else:
            found = runner.run(number, {"input_ids": tokens, **given})
        for name in parity.text_outputs(session.spec, block, single_file):
            atol = 1e-5 * max(1.0, np.abs(expected[name]).max())
            np.testing.assert_allclose(found[name], expected[name], rtol=1e-4, atol=atol)
            assert expected[name].std() > 0.01


def test_texts_are_those_of_the_session(session: Session, tmp_path: Path) -> None:
    """By as many steps as there are blocks and by more; a temperature too."""
    runner = TextRunner(export(session, tmp_path / "x"))
    model, sampling = model_of(session), Sampling(0.7, 0.9, seed=5)
    prompt = np.array([3, 1, 4, 1, 5])
    for steps in (1, 2, 3):
        if session.spec.model.family == "masked":
            tokens = np.array([*prompt, *[VOCABULARY] * 6])
            written = unmask(runner.unmasking_logits, tokens, VOCABULARY, 2 * steps, sampling)
            expected = model.unmask(tokens, 2 * steps, sampling)
            assert written.tolist() == expected.tolist() and VOCABULARY not in written
        else:
            contexts = (TextContext(runner, steps, 5), model.context(steps, 5))
            written, expected = (list(generate(one.read, prompt, 6, frozenset(), sampling)) for one in contexts)
            assert written == expected
        if session.spec.is_exact:
            break


def test_a_core_runs_as_often_as_is_asked(tmp_path: Path) -> None:
    spec = small("recurrent", **EXACT, model__loops=2)
    runner = TextRunner(export(make_session(tmp_path / "s", spec), tmp_path / "x"))
    tokens, state = np.array([[1, 2, 3]]), np.ones((1, 3, 32), np.float32)
    by_loops = [
        runner.run(0, {"input_ids": tokens, "state": state, "loops": np.array(n)})["logits"] for n in (0, 1, 2, 20)
    ]
    for number, (a, b) in enumerate(itertools.pairwise(by_loops)):
        assert np.abs(a - b).max() > 1e-3, number
    expected = model_of(Session.open(tmp_path / "s")).outputs(0, {"input_ids": tokens, "state": state})["logits"]
    np.testing.assert_allclose(by_loops[2], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("storage", ["fp16", "int8"])
@pytest.mark.parametrize("name", ["masked", "ar", "recurrent, whole"])
def test_coarser_weights_are_near(name: str, storage: Any, tmp_path: Path) -> None:
    family, changes = VARIANTS[name]
    session = make_session(tmp_path / "s", small(family, **changes))
    folder = export(session, tmp_path / "x", storage=storage)
    runner, plain = TextRunner(folder), TextRunner(export(session, tmp_path / "plain"))
    assert runner.manifest.storage == storage
    assert runner.weights_bytes < 0.9 * plain.weights_bytes
    for _, number, inputs in parity.text_cases(session.spec, False):
        more = {"loops": np.array(session.spec.text_model.loops)} if "state" in inputs else {}
        tokens = inputs.pop("input_ids")
        past = runner.empty(number, len(tokens))
        logits = []
        for one in (runner, plain):
            if past:
                outputs, _ = one.read(number, tokens, past, inputs)
            else:
                outputs = one.run(number, {"input_ids": tokens, **inputs, **more})
            logits.append(outputs["logits"])
        rtol, atol = parity.tolerance(storage, logits[1], True)
        np.testing.assert_allclose(*logits, rtol=rtol, atol=atol)
        assert np.abs(logits[0] - logits[1]).max() > 0


@pytest.mark.parametrize("name", ["ar", "ar, paper", "ar, whole", "recurrent"])
def test_a_long_prompt_is_read_some_tokens_at_a_time(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family, changes = VARIANTS[name]
    folder = export(make_session(tmp_path / "s", small(family, **changes)), tmp_path / "x")
    tokens = np.arange(30) % VOCABULARY
    whole = TextContext(TextRunner(folder), 2, 1).read(tokens)
    monkeypatch.setattr(text_runtime, "TOKENS_AT_ONCE", 7)
    parts = TextContext(TextRunner(folder), 2, 1).read(tokens)
    np.testing.assert_allclose(parts, whole, rtol=1e-4, atol=1e-4)


def test_a_budget_is_kept_by_refusing(tmp_path: Path) -> None:
    """A prompt that would take half a gibibyte."""
    folder = export(make_session(tmp_path / "s", small("recurrent", model__vocab_size=257)), tmp_path / "x")
    arguments = ("generate", folder, "--prompt", "long " * 600, "--max-tokens", 2, "--threads", 1)
    said = run(*arguments, "--memory-budget", "120MiB", exit_code=8)
    assert "generating text takes more than" in said["message"]
    assert run(*arguments, "--memory-budget", "2GiB")["peak_bytes"] > 240 << 20
