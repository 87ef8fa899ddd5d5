"""A language model larger than the memory it is served in: random weights in the shape of Qwen2.5-0.5B, 2 GB in fp32.

Exported to ONNX by parts and as one graph, then 8 tokens by onnxruntime: one graph open at a time within 400 MiB, and
one whole session, which needs all of it.
"""

from __future__ import annotations

from common import edgetrain, mib, parser, report, settings, temporary_folder
from language import QWEN2_HALF_B, king_james, random_llama

_CASES = (("parts", [], "400MiB"), ("parts", [], "4GiB"), ("one graph", ["--single-file"], "4GiB"))


def main() -> None:
    options = parser(__doc__).parse_args()
    rows: list[list[object]] = []
    with temporary_folder() as folder:
        shape = QWEN2_HALF_B | ({"num_hidden_layers": 2} if options.quick else {})
        model = random_llama(folder / "model", **shape)
        words = ["--recipe", "lora", "--data", str(king_james()), *settings({"exact.rank": 1})]
        edgetrain(folder, "import", str(model), "session", *words).require()
        texts = {}
        for name, more, budget in _CASES:
            to = name.replace(" ", "-")
            emitted = ""
            if not (folder / to).exists():
                # Comparing a whole graph takes its weights, whatever serves it later.
                made = edgetrain(folder, "export", "session", "--to", to, "--memory-budget", "6GiB", *more).require()
                emitted = mib(made.value["emit_peak_bytes"])
            arguments = ["generate", to, "--prompt", "In the beginning", "--max-tokens", "8", "--threads", "2"]
            done = edgetrain(folder, *arguments, "--memory-budget", budget).require()
            texts[name, budget] = done.value["text"]
            rows.append([
                name, emitted, budget, mib(done.value["peak_bytes"]), f"{done.value['tokens_per_s']:.3f}",
                "equal" if len(set(texts.values())) == 1 else "DIFFERENT",
            ])  # fmt: skip
    report(
        options.out, "Serving 2 GB of weights (`serve_large.py`)",
        ["export", "emitted within MiB", "budget", "peak MiB", "tokens a second", "text"], rows,
    )  # fmt: skip


if __name__ == "__main__":
    main()
