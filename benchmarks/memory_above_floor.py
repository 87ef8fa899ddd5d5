"""Memory that training takes above the runtime itself: blocks trained alone against the same transformer as a whole.

A ViT of width 512 with 12 layers, batch 64 in one piece, activations kept and moments resident on both sides: what
each takes with nothing recomputed, offloaded or streamed. The floor is the peak of the same command on a model that is
next to nothing.
"""

from __future__ import annotations

from pathlib import Path

from common import edgetrain, mib, parser, progress, report, settings, temporary_folder, write_idx

_BLOCKS = (3, 6, 12)
_WANTED = {3: 2.3, 6: 3.9, 12: 6.0}


def peak(folder: Path, name: str, changes: dict[str, object], budget: str) -> tuple[int, int]:
    """The measured and the planned peak of two steps on every block."""
    command = ["train", name, "--recipe", "vit-fashion-mnist", "--data", "data", "--memory-budget", budget]
    command += ["--steps", "2", "--activations", "keep", "--threads", "1", *settings(changes)]
    value = edgetrain(folder, *command, timeout_s=7200).require().value
    progress(f"{name}: peak {mib(value['peak_bytes'])} MiB, planned {mib(value['plan_peak_bytes'])} MiB")
    return value["peak_bytes"], value["plan_peak_bytes"]


def main() -> None:
    options = parser(__doc__).parse_args()
    width = 128 if options.quick else 512
    size = {
        "model.width": width, "model.depth": 12, "model.heads": 8, "train.batch_size": 64, "train.micro_batch": 64,
        "train.visit_steps": 2,
    }  # fmt: skip
    tiny = {
        "model.width": 8,
        "model.depth": 1,
        "model.heads": 1,
        "train.batch_size": 1,
        "diffusion_blocks.num_blocks": 1,
    }
    rows: list[list[object]] = []
    with temporary_folder() as folder:
        write_idx(folder / "data", 28)
        floor, _ = peak(folder, "floor", tiny, "1GiB")
        exact = {**size, "train.objective": "exact", "diffusion_blocks.num_blocks": 1}
        whole, planned = peak(folder, "whole", exact, "12GiB")
        rows.append(["end to end", mib(whole), mib(planned), mib(whole - floor), "1.00", ""])
        for blocks in _BLOCKS:
            changes = {**size, "diffusion_blocks.num_blocks": blocks}
            own, planned = peak(folder, f"blocks-{blocks}", changes, "12GiB")
            ratio = (whole - floor) / (own - floor)
            rows.append([f"B={blocks}", mib(own), mib(planned), mib(own - floor), f"{ratio:.2f}", _WANTED[blocks]])
    report(
        options.out, f"Memory above the floor of {mib(floor)} MiB: width {width}, 12 layers, batch 64",
        ["trained", "peak MiB", "planned MiB", "above the floor MiB", "times less", "wanted"], rows,
        "nothing recomputed, offloaded or streamed; freed memory is used again on both sides",
    )  # fmt: skip


if __name__ == "__main__":
    main()
