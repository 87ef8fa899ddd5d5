"""edgetrain import"""

from __future__ import annotations

from pathlib import Path

import click

from edgetrain.cli import options


@click.command("import")
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
@options.SESSION
@click.option("--recipe", default="finetune", show_default=True, help="A built-in recipe or a TOML file.")
@options.DATA
@options.SET
@click.option("--copy", is_flag=True, help="Copy what does not train too: FOLDER may go.")
@options.JSON
def command(
    folder: Path, session: Path, recipe: str, data: str | None, assignments: tuple[str, ...], copy: bool, as_json: bool
) -> None:
    """Make SESSION of the pretrained model in FOLDER: config.json, safetensors and tokenizer.json of Hugging Face.

    \b
    Examples:
      edgetrain import ./SmolLM2-135M my-session --data bible.txt
      edgetrain import ./SmolLM2-135M my-session --recipe lora --data chats.jsonl --set exact.rank=16
      edgetrain train my-session --memory-budget 320MiB
    """
    from edgetrain.checkpoint import open_checkpoint
    from edgetrain.importing import import_checkpoint, spec_of
    from edgetrain.recipe import load_recipe, parse_changes
    from edgetrain.units import format_bytes

    checkpoint = open_checkpoint(folder)
    changes = parse_changes(assignments)
    if data is not None:
        changes["data.source"] = data
    spec = options.located(spec_of(checkpoint, load_recipe(recipe), changes))
    made = import_checkpoint(checkpoint, session, spec, copy)
    trained = sum(layout.num_elements for layout in made.store.trained_layouts)
    frozen = sum(layout.num_elements for layout in made.store.frozen_layouts)
    value = {
        "session": str(session), "architecture": spec.language.architecture, "trained_parameters": trained,
        "frozen_parameters": frozen, "session_bytes": made.store.num_bytes, "digest": made.store.digest(),
    }  # fmt: skip
    options.emit(
        value,
        as_json,
        lambda: (
            f"{session}: {spec.language.architecture}, {trained / 1e6:.1f} M parameters train, "
            f"{frozen / 1e6:.1f} M are frozen, {format_bytes(made.store.num_bytes)} on disk\ndigest  {value['digest']}"
        ),
    )
