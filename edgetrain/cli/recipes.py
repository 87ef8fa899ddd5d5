"""edgetrain recipes"""

from __future__ import annotations

import click

from edgetrain.cli import options


@click.command("recipes")
@click.argument("name", required=False)
@options.JSON
def command(name: str | None, as_json: bool) -> None:
    """List the built-in recipes, or print one as TOML to start your own from; of a TOML file, all that it resolves to.

    \b
    Examples:
      edgetrain recipes vit-digits > my.toml
      edgetrain recipes my.toml
    """
    import tomllib
    from pathlib import Path

    from edgetrain.recipe import builtin_recipes, load_recipe, needs_import, resolve, to_toml

    recipes = builtin_recipes()
    if name is not None:
        if name in recipes:
            toml = recipes[name]
        elif needs_import(load_recipe(name)):
            toml = Path(name).read_text()  # what it resolves to depends on the model
        else:
            toml = to_toml(resolve(load_recipe(name)))
        options.emit({"name": name, "recipe": tomllib.loads(toml)}, as_json, toml.rstrip)
        return

    def text() -> str:
        return "\n".join(f"{known:22} {toml.splitlines()[0].lstrip('# ')}" for known, toml in recipes.items())

    options.emit({"recipes": {known: load_recipe(known) for known in recipes}}, as_json, text)
