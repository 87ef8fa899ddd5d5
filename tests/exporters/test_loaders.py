"""The loaders of others find their way in a single-file export: optimum, and transformers.js under node."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgetrain.generation import Sampling, generate
from exporters.language_runtime import LanguageContext, LanguageRunner
from exporters.text_runtime import TextContext, TextRunner
from tests.exporters.common import export, make_session
from tests.test_importing import imported, save_model
from tests.text_families import small

pytestmark = pytest.mark.slow

_PROMPT, _TOKENS = [73, 110, 32, 116, 104, 101], 12
# optimum 2.1 takes width / heads for the size of a head, which is not that of every Qwen3.
OF_OPTIMUM = ("ar", "llama tied", "gpt2", "qwen2")
OF_TRANSFORMERS_JS = ("ar", "llama tied", "gpt2", "qwen3")

_OPTIMUM = """
import json, sys
import torch
from optimum.onnxruntime import ORTModelForCausalLM
model = ORTModelForCausalLM.from_pretrained(sys.argv[1], file_name="model.onnx", use_io_binding=False)
ids = torch.tensor([json.loads(sys.argv[2])])
out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=int(sys.argv[3]),
                     do_sample=False, pad_token_id=0, eos_token_id=-1)
print(json.dumps(out[0, ids.shape[1]:].tolist()))
"""

_TRANSFORMERS_JS = """
import { env, AutoTokenizer, AutoModelForCausalLM, Tensor } from "@huggingface/transformers";
env.allowRemoteModels = false;
env.localModelPath = process.argv[2];
const options = { dtype: "fp32", use_external_data_format: true };
const model = await AutoModelForCausalLM.from_pretrained("model", options);
const ids = JSON.parse(process.argv[3]);
const row = (values) => new Tensor("int64", BigInt64Array.from(values, BigInt), [1, ids.length]);
const inputs = { input_ids: row(ids), attention_mask: row(ids.map(() => 1)) };
if (process.argv[5] === "with its tokenizer") {
  const tokenizer = await AutoTokenizer.from_pretrained("model");
  const { input_ids } = tokenizer("In the", { add_special_tokens: false });
  if (String(input_ids.data) !== String(ids)) throw new Error(`tokens are ${input_ids.data}`);
}
const out = await model.generate({ ...inputs, max_new_tokens: Number(process.argv[4]), do_sample: false });
console.log(JSON.stringify(Array.from(out.data, Number).slice(ids.length)));
"""


@pytest.fixture
def exported(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Path, list[int]]:
    """Which model, its folder, and the tokens that follow the prompt."""
    folder = tmp_path / "model"
    context: Any
    if request.param == "ar":
        export(make_session(tmp_path / "s", small("ar", model__vocab_size=257)), folder, single_file=True)
        context = TextContext(TextRunner(folder), 1, 0)
    else:
        export(imported(save_model(tmp_path / "base", request.param, "F32"), tmp_path / "s"), folder, single_file=True)
        context = LanguageContext(LanguageRunner(folder))
    following = list(generate(context.read, np.array(_PROMPT), _TOKENS, frozenset(), Sampling()))
    return request.param, folder, following


@pytest.fixture(scope="module")
def with_optimum(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter that has it."""
    python = tmp_path_factory.mktemp("environment") / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", python.parents[1]], check=True)
    wanted = ["optimum-onnx", "onnxruntime", "torch==2.13.0"]
    subprocess.run([python, "-m", "pip", "install", "--quiet", *wanted], check=True)
    return python


@pytest.mark.parametrize("exported", OF_OPTIMUM, indirect=True)
def test_optimum(exported: tuple[str, Path, list[int]], with_optimum: Path) -> None:
    _, folder, following = exported
    command = [with_optimum, "-c", _OPTIMUM, folder, json.dumps(_PROMPT), str(_TOKENS)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == following


@pytest.fixture(scope="module")
def with_transformers_js(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that has it."""
    if shutil.which("npm") is None:
        pytest.skip("there is no node")
    folder = tmp_path_factory.mktemp("node")
    install = ["npm", "install", "--silent", "--ignore-scripts", "@huggingface/transformers"]
    subprocess.run(install, cwd=folder, check=True)
    (folder / "run.mjs").write_text(_TRANSFORMERS_JS)
    return folder


@pytest.mark.parametrize("exported", OF_TRANSFORMERS_JS, indirect=True)
def test_transformers_js(exported: tuple[str, Path, list[int]], with_transformers_js: Path) -> None:
    """It looks for graphs in a folder onnx beside the tokenizer."""
    name, folder, following = exported
    (folder / "onnx").mkdir()
    for path in folder.glob("model.onnx*"):
        path.rename(folder / "onnx" / path.name)
    more = "with its tokenizer" if name == "ar" else "without one"
    command = ["node", "run.mjs", f"{folder.parent}/", json.dumps(_PROMPT), str(_TOKENS), more]
    done = subprocess.run(command, cwd=with_transformers_js, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found == following[: len(found)] and len(found) >= 1
