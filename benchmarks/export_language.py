"""SmolLM2-135M as ONNX within a budget, and what onnxruntime then makes of it beside transformers.

Exports by a graph for each part and as one graph, and with smaller weights, each compared with the trained model on
the way; then 50 greedy tokens by onnxruntime from the exports, within a small budget and a large one, and by
transformers from the folder; and what a text costs them, beside what it costs the session.
"""

from __future__ import annotations

import json
import subprocess
import sys

from common import edgetrain, environment, mib, parser, report, temporary_folder
from language import king_james, smollm2

_PROMPT = "In the beginning God"
_TOKENS = 50
_EXAMPLES = 16
_TRANSFORMERS = """
import json, sys, torch, transformers
folder, prompt, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=folder + "/tokenizer.json")
ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).input_ids
with torch.no_grad():
    out = model.generate(ids, max_new_tokens=count, do_sample=False, pad_token_id=0)
print(json.dumps(tokenizer.decode(out[0, ids.shape[1]:], skip_special_tokens=True)))
"""


def main() -> None:
    options = parser(__doc__).parse_args()
    folder_of_model = smollm2()
    rows: list[list[object]] = []
    with temporary_folder() as folder:
        edgetrain(folder, "import", str(folder_of_model), "session", "--data", str(king_james())).require()
        command = [sys.executable, "-c", _TRANSFORMERS, str(folder_of_model), _PROMPT, str(_TOKENS)]
        printed = subprocess.run(command, check=True, capture_output=True, text=True, env=environment(folder)).stdout
        expected = json.loads(printed.splitlines()[-1])
        part = folder / "part.txt"
        part.write_text(king_james().read_text()[1_000_000:1_100_000])
        of_part = ["--data", str(part), "--limit", str(_EXAMPLES), "--threads", "1"]
        measured = edgetrain(folder, "evaluate", "session", *of_part, "--memory-budget", "1500MiB").require()
        trained = next(row["value"] for row in measured.value["results"] if row["metric"] == "loss")
        ways = [("parts", [], "330MiB"), ("one graph", ["--single-file"], "1500MiB"), ("parts", ["--int8"], "330MiB"),
                ("parts", ["--fp16"], "500MiB")]  # fmt: skip
        for name, more, budget in ways:
            to = "-".join([name, *more]).replace(" ", "-")
            made = edgetrain(folder, "export", "session", "--to", to, "--memory-budget", budget, *more).require()
            worst = max(row["max_abs"] for row in made.value["parity"] if row["output"].startswith("logits"))
            size = sum(path.stat().st_size for path in (folder / to).iterdir())
            cost = edgetrain(folder, "evaluate", to, *of_part).require().value["results"][0]["nats"]
            kind = f"{name} {' '.join(one for one in more if one != '--single-file')}"
            for memory in ("200MiB", "1500MiB"):
                arguments = ["generate", to, "--prompt", _PROMPT, "--max-tokens", str(_TOKENS), "--threads", "1"]
                written = edgetrain(folder, *arguments, "--memory-budget", memory)
                row = [kind, mib(size), budget, mib(made.peak_bytes), mib(made.value["emit_peak_bytes"]),
                       f"{worst:.1e}", f"{cost - trained:+.5f}", memory]  # fmt: skip
                if written.exit_code != 0:
                    rows.append([*row, "-", "-", f"exit code {written.exit_code}"])
                    continue
                equal = "equal" if written.value["text"] == expected else "DIFFERENT"
                rows.append([*row, mib(written.value["peak_bytes"]), f"{written.value['tokens_per_s']:.1f}", equal])
    report(
        options.out, "SmolLM2-135M as ONNX (513 MiB of weights)",
        ["export", "MiB", "budget", "peak MiB", "emitted within MiB", "largest difference of a logit",
         "nats a token, against the session", "budget of generate", "peak of generate MiB", "tokens a second",
         f"{_TOKENS} greedy tokens, transformers'"], rows,
        f"the session costs {trained:.5f} nats a token of {_EXAMPLES} examples of the King James Bible; logits are "
        "compared on random tokens",
    )  # fmt: skip


if __name__ == "__main__":
    main()
