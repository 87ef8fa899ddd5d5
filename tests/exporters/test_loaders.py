"""The loaders of others find their way in a single-file export: optimum, and transformers.js under node."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from edgetrain.generation import Sampling, Text, generate
from exporters.text_runtime import TextContext, TextRunner
from tests.exporters.common import export, make_session
from tests.text_families import small

pytestmark = pytest.mark.slow

_PROMPT, _TOKENS = "In the beginning", 20

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
import { env, AutoTokenizer, AutoModelForCausalLM } from "@huggingface/transformers";
env.allowRemoteModels = false;
env.localModelPath = process.argv[2];
const tokenizer = await AutoTokenizer.from_pretrained("model");
const options = { dtype: "fp32", use_external_data_format: true };
const model = await AutoModelForCausalLM.from_pretrained("model", options);
const inputs = tokenizer(process.argv[3], { add_special_tokens: false });
const out = await model.generate({ ...inputs, max_new_tokens: Number(process.argv[4]), do_sample: false });
console.log(JSON.stringify(Array.from(out.data, Number).slice(inputs.input_ids.dims[1])));
"""


@pytest.fixture
def exported(tmp_path: Path) -> tuple[Path, list[int], list[int]]:
    """A folder, the tokens of the prompt, and those that follow them."""
    session = make_session(tmp_path / "s", small("ar", model__vocab_size=257))
    folder = export(session, tmp_path / "model", single_file=True)
    prompt = np.concatenate([tokens.ids for tokens in Text(folder, 257).encode([_PROMPT])])
    context = TextContext(TextRunner(folder), 1, 0)
    following = list(generate(context.read, prompt, _TOKENS, frozenset(), Sampling()))
    return folder, prompt.tolist(), following


def test_optimum(exported: tuple[Path, list[int], list[int]], tmp_path: Path) -> None:
    folder, prompt, following = exported
    python = tmp_path / "environment" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", python.parents[1]], check=True)
    wanted = ["optimum-onnx", "onnxruntime", "torch==2.13.0"]
    subprocess.run([python, "-m", "pip", "install", "--quiet", *wanted], check=True)
    command = [python, "-c", _OPTIMUM, folder, json.dumps(prompt), str(_TOKENS)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == following


@pytest.mark.skipif(shutil.which("npm") is None, reason="there is no node")
def test_transformers_js(exported: tuple[Path, list[int], list[int]], tmp_path: Path) -> None:
    """It looks for graphs in a folder onnx beside the tokenizer."""
    folder, _, following = exported
    (folder / "onnx").mkdir()
    for path in folder.glob("model.onnx*"):
        path.rename(folder / "onnx" / path.name)
    (tmp_path / "run.mjs").write_text(_TRANSFORMERS_JS)
    install = ["npm", "install", "--silent", "--ignore-scripts", "@huggingface/transformers"]
    subprocess.run(install, cwd=tmp_path, check=True)
    command = ["node", "run.mjs", f"{tmp_path}/", _PROMPT, str(_TOKENS)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found == following[: len(found)] and len(found) >= 1
