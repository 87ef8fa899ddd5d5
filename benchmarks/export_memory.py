"""Export needs little memory: models of 500 MB and 3 GB emitted as ONNX, measured in processes of their own.

Weights are random, or of the large model, a language model in the shape of Qwen2, a hole in a file: emission does not
depend on them. Comparing the export with the session (``parity``) is no part of it. To show: ``emit_peak_bytes`` at
most 60 MiB and 3 seconds of 500 MB, at most 80 MiB of 3 GB and of int8. ``published`` is the time until the files are
durable and in place, which is the disk's.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import edgetrain, mib, parser, progress, report, settings, temporary_folder
from language import QWEN2_HALF_B, king_james, random_llama

if TYPE_CHECKING:
    from edgetrain.stages import Stage
    from edgetrain.store.layout import TensorSpec

_CHILD = """
import json, sys, time
from pathlib import Path
from edgetrain.session import Session
from exporters import onnx
session, to, single_file, storage = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] == "1", sys.argv[4]
began = time.perf_counter()
onnx.warm_up()
with onnx.stage(Session.open(session), to, single_file, storage) as staged:
    emitted = time.perf_counter() - began
    export = staged.publish()
    published = time.perf_counter() - began
print(json.dumps({
    "emitted": emitted, "published": published, "emit_peak_bytes": export.emit_peak_bytes,
    "bytes": sum(path.stat().st_size for path in export.files), "torch": "torch" in sys.modules,
}))
"""


def make_session(path: Path, width: int, depth: int) -> int:
    """A session with random weights; their number."""
    import math

    import numpy as np
    import torch

    from edgetrain.blockwise import build_modules
    from edgetrain.models import build_family
    from edgetrain.recipe import resolve
    from edgetrain.session import Session

    model = {"width": width, "depth": depth, "heads": 8, "patch": 4, "image_shape": [1, 32, 32], "num_classes": 10}
    blocks = depth // 2
    spec = resolve({"model": model, "diffusion_blocks": {"num_blocks": blocks}, "train": {"micro_batch": 8}})
    with torch.device("meta"):
        block = build_modules(spec, build_family(spec), 0)
    kinds = {"codebook": block.codebook, "stem": block.stem, "layer": block.layers[0], "head": block.head}
    shapes = {kind: {n: list(p.shape) for n, p in m.named_parameters()} for kind, m in kinds.items()}
    generator = np.random.default_rng(0)

    def initial(stage: Stage, tensor: TensorSpec) -> Any:
        return generator.standard_normal(tensor.shape, np.float32) * np.float32(tensor.shape[-1] ** -0.5)

    Session.create(path, spec, shapes, initial)
    sizes = {kind: sum(math.prod(shape) for shape in tensors.values()) for kind, tensors in shapes.items()}
    return sizes["codebook"] + depth * sizes["layer"] + blocks * (sizes["stem"] + sizes["head"])


def main() -> None:
    made = parser(__doc__)
    options = made.parse_args()
    width, depth = (128, 8) if options.quick else (512, 24)
    rows: list[list[object]] = []
    with temporary_folder() as folder:
        parameters = make_session(folder / "session", width, depth)
        progress(f"width {width}, {depth} layers: {4 * parameters / 1e6:.0f} MB of weights")
        for name, single in (("a graph for each block", "0"), ("a single file", "1")):
            rows += [_emitted(folder, "session", name, run, single, "fp32") for run in ("cold", "warm")]
        shape = QWEN2_HALF_B | {"num_hidden_layers": 2 if options.quick else 41}
        model = random_llama(folder / "model", None, **shape)
        words = ["--recipe", "lora", "--data", str(king_james()), *settings({"exact.rank": 1})]
        edgetrain(folder, "import", str(model), "large", *words).require()
        for name, single, storage in (
            ("a graph for each part", "0", "fp32"), ("one graph", "1", "fp32"),
            ("a graph for each part", "0", "int8"), ("one graph", "1", "int8"),
        ):  # fmt: skip
            rows.append(_emitted(folder, "large", f"{name}, {storage}", "cold", single, storage))
    report(
        options.out, "Emission of large models (`export_memory.py`)",
        ["layout", "run", "MB written", "emit_peak MiB", "emitted s", "published s", "torch imported"], rows,
    )  # fmt: skip


def _emitted(  # noqa: PLR0917
    folder: Path, session: str, name: str, run: str, single: str, storage: str
) -> list[object]:
    """A row; what was emitted is deleted."""
    to = folder / "emitted"
    environ = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", _CHILD, str(folder / session), str(to), single, storage]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(done.stderr)
    shutil.rmtree(to)
    value = json.loads(done.stdout)
    row = [
        name, run, f"{value['bytes'] / 1e6:.0f}", mib(value["emit_peak_bytes"]), f"{value['emitted']:.2f}",
        f"{value['published']:.2f}", "yes" if value["torch"] else "no",
    ]  # fmt: skip
    progress(" ".join(map(str, row)))
    return row


if __name__ == "__main__":
    main()
