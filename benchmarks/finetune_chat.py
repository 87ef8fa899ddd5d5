"""Chats: adapters for SmolLM2-135M-Instruct on verses of the King James text, asked for and answered, within a budget.

Each chat has a user who says how a verse begins, and an assistant who finishes it; the loss counts the assistant's
words alone. Held-out loss before and after, and answers to beginnings that no chat of the training has.
"""

from __future__ import annotations

import json
from pathlib import Path

from common import edgetrain, mib, parser, progress, report, settings, temporary_folder
from language import king_james, smollm2

_ASKS = "Finish this verse: {}"
_BEGINNINGS = ("And the servant of the king went up", "Blessed is the man who")


def write_chats(path: Path, count: int) -> None:
    """Verses of some length, cut in the middle."""
    verses = [line for line in king_james().read_text().splitlines() if 80 <= len(line) <= 200]
    chosen = verses[:: len(verses) // count][:count]
    with path.open("w") as file:
        for verse in chosen:
            words = verse.split()
            first, rest = " ".join(words[: len(words) // 2]), " ".join(words[len(words) // 2 :])
            messages = [
                {"role": "user", "content": _ASKS.format(first)},
                {"role": "assistant", "content": rest},
            ]
            file.write(json.dumps({"messages": messages}) + "\n")


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--steps", type=int, default=100)
    arguments.add_argument("--chats", type=int, default=1000)
    arguments.add_argument("--budget", default="320MiB")
    arguments.add_argument("--threads", default="1")
    told = arguments.parse_args()
    steps, num_chats = (4, 40) if told.quick else (told.steps, told.chats)
    changes = {
        "data.length": 128, "data.packing": "false", "data.held_out": 0.1, "train.batch_size": 4, "train.steps": steps,
        "optimizer.lr": 5e-4,
    }  # fmt: skip
    within = ["--memory-budget", told.budget, "--threads", told.threads]
    with temporary_folder() as home:
        chats, session = home / "chats.jsonl", home / "session"
        write_chats(chats, num_chats)
        words = ["--recipe", "lora", "--data", str(chats), *settings(changes)]
        edgetrain(home, "import", str(smollm2()), str(session), *words).require()

        def held_out_loss() -> float:
            results = edgetrain(home, "evaluate", str(session), *within).require().value["results"]
            return float(next(row["value"] for row in results if row["metric"] == "loss"))

        def answers() -> list[str]:
            asked = (
                ["generate", str(session), "--chat", "--prompt", _ASKS.format(one), "--max-tokens", "40"]
                for one in _BEGINNINGS
            )
            return [str(edgetrain(home, *one, *within).require().value["text"]).replace("\n", " / ") for one in asked]

        before, written = held_out_loss(), answers()
        progress(f"before: {before:.4f}; {written}")
        trained = edgetrain(home, "train", str(session), *within).require().value
        after, rewritten = held_out_loss(), answers()
        progress(f"after: {after:.4f}; {rewritten}")
    rows = [
        ["before", f"{before:.4f}", "-", "-"],
        ["after", f"{after:.4f}", mib(trained["peak_bytes"]), mib(trained["plan_peak_bytes"])],
    ]
    pairs = [
        f"*{beginning}* before: {a}; after: {b}"
        for beginning, a, b in zip(_BEGINNINGS, written, rewritten, strict=True)
    ]
    title = (
        f"Chats for SmolLM2-135M-Instruct: adapters, {steps} steps of 4 of {num_chats} chats, within {told.budget} "
        "(`finetune_chat.py`)"
    )
    report(told.out, title, ["", "held-out loss of the answers", "peak MiB", "plan MiB"], rows, *pairs)


if __name__ == "__main__":
    main()
