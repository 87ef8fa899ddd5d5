"""SmolLM2-135M as ONNX within a budget, and what onnxruntime then makes of it beside transformers.

Exports by a graph for each part and as one graph, each compared with the trained model on the way; then 50 greedy
tokens by onnxruntime from the exports, within a small budget and a large one, and by transformers from the folder.
"""

from __future__ import annotations

import json
import subprocess
import sys

from common import edgetrain, environment, mib, parser, report, temporary_folder
from language import king_james, smollm2

_PROMPT = "In the beginning God"
_TOKENS = 50
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
        for name, more, budget in (("parts", [], "330MiB"), ("one graph", ["--single-file"], "1500MiB")):
            to = name.replace(" ", "-")
            made = edgetrain(folder, "export", "session", "--to", to, "--memory-budget", budget, *more).require()
            worst = max(row["max_abs"] for row in made.value["parity"])
            for memory in ("200MiB", "1500MiB"):
                arguments = ["generate", to, "--prompt", _PROMPT, "--max-tokens", str(_TOKENS), "--threads", "1"]
                written = edgetrain(folder, *arguments, "--memory-budget", memory)
                if written.exit_code != 0:
                    rows.append([name, budget, mib(made.peak_bytes), mib(made.value["emit_peak_bytes"]), f"{worst:.1e}",
                                 memory, "-", "-", "exit code 8"])  # fmt: skip
                    continue
                equal = "equal" if written.value["text"] == expected else "DIFFERENT"
                rows.append([
                    name, budget, mib(made.peak_bytes), mib(made.value["emit_peak_bytes"]), f"{worst:.1e}", memory,
                    mib(written.value["peak_bytes"]), f"{written.value['tokens_per_s']:.1f}", equal,
                ])  # fmt: skip
    report(
        options.out, "SmolLM2-135M as ONNX (513 MiB of weights)",
        ["export", "budget", "peak MiB", "emitted within MiB", "largest difference of a logit", "budget of generate",
         "peak of generate MiB", "tokens a second", f"{_TOKENS} greedy tokens, transformers'"], rows,
    )  # fmt: skip


if __name__ == "__main__":
    main()
