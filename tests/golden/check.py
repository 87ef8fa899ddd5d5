"""Runs the golden files beside it with whatever onnxruntime is installed: needs onnx and onnxruntime, nothing else.

``python check.py`` prints each name and its largest difference, and ends with 1 if one is too large.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import numpy_helper

RTOL, ATOL = 1e-4, 1e-5


def main() -> int:
    print("onnxruntime", onnxruntime.__version__)
    num_failed = 0
    folders = sorted(path.parent for path in Path(__file__).parent.glob("*/model.onnx"))
    for folder in folders:
        session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
        inputs, outputs = (_arrays(folder, kind) for kind in ("input", "output"))
        found = session.run(list(outputs), inputs)
        off, passed = 0.0, True
        for array, expected in zip(found, outputs.values(), strict=True):
            difference = np.abs(array.astype(np.float64) - expected)
            allowed = ATOL * max(1.0, float(np.abs(expected).max())) + RTOL * np.abs(expected)
            passed &= array.shape == expected.shape and bool((difference <= allowed).all())
            off = max(off, float(difference.max()))
        num_failed += not passed
        print(f"{folder.name:20} {off:.1e} {'' if passed else 'FAILED'}")
    print(f"{len(folders)} models, {num_failed} failed")
    return int(num_failed > 0 or not folders)


def _arrays(folder: Path, kind: str) -> dict[str, np.ndarray]:
    data = folder / "test_data_set_0"
    tensors = [onnx.load_tensor(data / f"{kind}_{i}.pb") for i in range(len(list(data.glob(f"{kind}_*.pb"))))]
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in tensors}


if __name__ == "__main__":
    sys.exit(main())
