from __future__ import annotations

import dataclasses
import tomllib

import pytest

from edgetrain.errors import UsageError
from edgetrain.recipe import (
    RESUMABLE_KEYS,
    RESUMABLE_TABLES,
    builtin_recipes,
    difference,
    load_recipe,
    needs_import,
    parse_changes,
    resolve,
    to_toml,
)
from edgetrain.spec import PRESETS, DiffusionBlocksSpec, ModelSpec, Spec

LLAMA = {"family": "llama", "vocab_size": 100}


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"train.step": 3}, ["train.step'", "'train.steps'"]),
        ({"train.batchsize": 3}, ["'train.batch_size'"]),
        ({"optimizer.learning": 1.0}, ["unknown key", "optimizer.lr"]),
        ({"modle.width": 3}, ["unknown table 'modle'", "'model'"]),
        ({"diffusion_block.gate": 0.0}, ["'diffusion_blocks'"]),
        ({"diffusion_blocks.preset": "papper"}, ["'papper'", "'paper'"]),
        ({"diffusion_blocks.num_block": 2}, ["'diffusion_blocks.num_blocks'"]),
    ],
)
def test_a_misspelt_name_is_answered_with_the_nearest(changes, names):
    with pytest.raises(UsageError) as caught:
        resolve({}, changes)
    assert all(name in str(caught.value) for name in names), str(caught.value)
    assert caught.value.exit_code == 2


def test_a_misspelt_name_in_the_recipe_itself():
    with pytest.raises(UsageError, match=r"'optimizer.wamup': did you mean 'optimizer.warmup'"):
        resolve({"optimizer": {"wamup": 0.1}})


def test_a_misspelt_recipe_is_answered_with_the_nearest():
    with pytest.raises(UsageError, match="'vit-digit': did you mean 'vit-digits'"):
        load_recipe("vit-digit")


@pytest.mark.parametrize(
    "changes",
    [
        {"train.steps": "10"}, {"train.steps": 10.0}, {"train.steps": True}, {"data.flip": 1}, {"data.flip": "yes"},
        {"optimizer.lr": "fast"}, {"optimizer.lr": True}, {"optimizer.lr": float("inf")},
        {"optimizer.lr": float("nan")},
        {"data.source": 3}, {"model.family": "vot"}, {"diffusion_blocks.streams": 3},
        {"diffusion_blocks.stem": "own"}, {"train.order": "random"}, {"model.image_shape": [1, 8]},
        {"model.image_shape": [1, 8.0, 8]}, {"model.image_shape": "8x8"}, {"train": 3}, {"width": 3},
        {"diffusion_blocks.codebook": "private"}, {"diffusion_blocks.preset": "none"},
    ],
)  # fmt: skip
def test_values_of_the_wrong_type_are_refused(changes):
    with pytest.raises(UsageError):
        resolve({}, changes)


@pytest.mark.parametrize("preset", [3, ["paper"], True, {"name": "paper"}])
def test_a_preset_that_is_no_word_is_refused(preset):
    with pytest.raises(UsageError):
        resolve({}, {"diffusion_blocks.preset": preset})


@pytest.mark.parametrize("streams", [True, 1.0, 2.0])
def test_streams_must_be_a_whole_number(streams):
    with pytest.raises(UsageError):
        resolve({}, {"diffusion_blocks.streams": streams})


@pytest.mark.parametrize(
    "changes",
    [
        {"train.steps": 0}, {"train.steps": -3}, {"train.batch_size": 0}, {"train.visit_steps": 0},
        {"train.micro_batch": 65, "train.batch_size": 64}, {"train.micro_batch": -1}, {"train.seed": -1},
        {"train.seed": 2**63}, {"model.width": 0}, {"model.depth": 0}, {"model.heads": 5}, {"model.patch": 0},
        {"model.image_shape": [1, 9, 8]}, {"model.neighbours": -1},
        {"model.neighbours": 2, "model.image_shape": [1, 8, 8], "model.patch": 4}, {"optimizer.lr": 0.0},
        {"optimizer.lr": -1.0}, {"optimizer.clip": 0},
        {"optimizer.beta1": 1.5}, {"optimizer.weight_decay": -0.1}, {"optimizer.warmup": 2.0}, {"data.source": ""},
        {"data.shift": -1}, {"diffusion_blocks.num_blocks": 0}, {"diffusion_blocks.num_blocks": 7},
        {"diffusion_blocks.sigma_min": 30.0}, {"diffusion_blocks.p_std": 0.0}, {"diffusion_blocks.overlap": -1.0},
        {"diffusion_blocks.auxiliary": -1.0}, {"diffusion_blocks.auxiliary": 1.0, "diffusion_blocks.streams": 1},
        {"diffusion_blocks.sigma_data": -0.5}, {"diffusion_blocks.preconditioning": "none"},
        {"model.family": "dit", "diffusion_blocks.preconditioning": "discrete"}, {"diffusion_blocks.joined": True},
        {"diffusion_blocks.uncertainty": True},
    ],
)  # fmt: skip
def test_values_out_of_range_are_refused(changes):
    with pytest.raises(UsageError):
        resolve({}, changes)


@pytest.mark.parametrize("beta", ["beta1", "beta2"])
def test_a_beta_of_one_is_refused(beta):
    """The bias correction would divide by 1 - beta^t = 0."""
    with pytest.raises(UsageError):
        resolve({}, {f"optimizer.{beta}": 1.0})


def test_zero_steps_says_what_is_wrong():
    with pytest.raises(UsageError, match=r"train.steps must be at least 1, it is 0"):
        resolve({}, {"train.steps": 0})


def test_a_whole_number_is_a_float():
    assert resolve({}, {"optimizer.weight_decay": 0}).optimizer.weight_decay == 0.0
    assert type(resolve({}, {"diffusion_blocks.sigma_max": 40}).diffusion_blocks.sigma_max) is float


def test_the_presets_are_those_of_the_method():
    paper = resolve({"diffusion_blocks": {"preset": "paper"}}).diffusion_blocks
    assert (paper.sigma_min, paper.sigma_max, paper.p_mean, paper.p_std, paper.overlap) == (0.002, 80, -1.2, 1.2, 0.05)
    assert (paper.sigma_data, paper.streams, paper.skip, paper.gate) == (0.5, 1, True, 0.0)
    assert (paper.stem, paper.head, paper.codebook) == ("shared", "shared", "shared")
    assert paper.has_shared
    spec = resolve({})
    ours = spec.diffusion_blocks
    assert ours.preset == "calibrated"
    assert (ours.sigma_min, ours.sigma_max, ours.p_mean, ours.p_std, ours.overlap) == (0.05, 20, 0, 1.2, 0.05)
    assert (ours.streams, ours.skip, ours.gate, ours.preconditioning) == (2, False, 0.5, "discrete")
    assert (ours.stem, ours.head, ours.codebook) == ("private", "private", "frozen")
    assert not ours.has_shared
    assert spec.sigma_data == pytest.approx(spec.model.width**-0.5)
    assert resolve({"diffusion_blocks": {"preset": "paper"}}).sigma_data == 0.5


def test_a_spec_of_an_older_edgetrain_stays_what_it_was():
    """A key that it has not is one that there was not: the preset of today may say otherwise."""
    written = tomllib.loads(to_toml(resolve({"model": {"family": "ar"}})))
    assert resolve(written, is_complete=True) == resolve(written)
    for key in ("preconditioning", "joined"):
        del written["diffusion_blocks"][key]
    old = resolve(written, is_complete=True).diffusion_blocks
    assert (old.preset, old.preconditioning, old.joined) == ("calibrated", "edm", False)
    assert resolve(written).diffusion_blocks.preconditioning == "discrete"


def test_single_keys_override_a_preset():
    spec = resolve({"diffusion_blocks": {"preset": "paper", "stem": "private"}}, {"diffusion_blocks.sigma_max": 40.0})
    method = spec.diffusion_blocks
    assert (method.stem, method.sigma_max, method.head) == ("private", 40.0, "shared")
    assert resolve({}, {"diffusion_blocks.preset": "paper"}).diffusion_blocks.skip


def test_every_preset_names_known_keys():
    names = {field.name for field in dataclasses.fields(DiffusionBlocksSpec)}
    assert all(set(preset) <= names for presets in PRESETS.values() for preset in presets.values())


@pytest.mark.parametrize("name", sorted(builtin_recipes()))
def test_recipes_resolve(name):
    recipe = load_recipe(name)
    if needs_import(recipe):
        spec = resolve(recipe | {"model": LLAMA})
        assert spec.is_exact
        assert spec.num_blocks == 1
        return
    spec = resolve(recipe)
    assert spec.num_blocks == {"ar": 4, "recurrent": 1}.get(spec.model.family, 3)
    assert spec.train.steps >= 1000


def test_the_recipes_that_are_promised_exist():
    assert {"vit-digits", "vit-fashion-mnist", "vit-cifar100-paper"} <= set(builtin_recipes())
    paper = resolve(load_recipe("vit-cifar100-paper"))
    assert (paper.diffusion_blocks.preset, paper.model.depth, paper.num_blocks) == ("paper", 12, 3)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"diffusion_blocks.preset": "paper", "diffusion_blocks.stem": "frozen"},
        {"model.image_shape": [3, 32, 32], "model.num_classes": 100, "optimizer.eps": 1e-8, "optimizer.lr": 3e-17},
        {"data.source": 'a "quoted" \\ path\twith\nlines \x7f and ümlaut', "data.flip": True, "train.seed": 2**63 - 1},
    ],
)
def test_the_resolved_spec_survives_toml(changes):
    spec = resolve({}, changes)
    assert resolve(tomllib.loads(to_toml(spec))) == spec


@pytest.mark.parametrize("name", sorted(builtin_recipes()))
def test_recipes_survive_toml(name):
    recipe = load_recipe(name)
    spec = resolve(recipe | {"model": LLAMA} if needs_import(recipe) else recipe)
    assert resolve(tomllib.loads(to_toml(spec))) == spec


def test_assignments_are_read_as_toml():
    changes = parse_changes(
        ("train.steps=5", "data.flip=true", "optimizer.lr = 1e-3", "data.source=a/b c", "x.y=[1,2]")
    )
    assert changes == {
        "train.steps": 5, "data.flip": True, "optimizer.lr": 1e-3, "data.source": "a/b c", "x.y": [1, 2],
    }  # fmt: skip
    with pytest.raises(UsageError, match="sets nothing"):
        parse_changes(("train.steps",))


def test_a_recipe_from_a_file(tmp_path):
    path = tmp_path / "my.toml"
    path.write_text("[train]\nsteps = 7\n")
    assert resolve(load_recipe(str(path))).train.steps == 7
    path.write_text("[train\n")
    with pytest.raises(UsageError, match="cannot be read"):
        load_recipe(str(path))
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="cannot be read"):
        load_recipe(str(path))
    with pytest.raises(UsageError, match="cannot be read"):
        load_recipe(str(tmp_path / "none.toml"))


@pytest.mark.parametrize(("depth", "num_blocks"), [(6, 3), (7, 3), (8, 3), (1, 1), (12, 12), (5, 4)])
def test_blocks_are_consecutive_layers(depth, num_blocks):
    spec = Spec(model=ModelSpec(depth=depth), diffusion_blocks=DiffusionBlocksSpec(num_blocks=num_blocks))
    layers = [spec.layers_of(block) for block in range(num_blocks)]
    assert [layer for block in layers for layer in block] == list(range(depth))
    sizes = [len(block) for block in layers]
    assert sizes == sorted(sizes, reverse=True)
    assert max(sizes) - min(sizes) <= 1


def test_difference_names_every_key_that_differs():
    old = resolve({})
    new = resolve({}, {"optimizer.lr": 0.5, "train.steps": 7})
    assert difference(old, new) == {"optimizer.lr": (1e-3, 0.5), "train.steps": (1000, 7)}
    assert difference(old, old) == {}
    language = resolve({"model": LLAMA, "train": {"objective": "exact"}})
    known = {
        f"{table.name}.{key}"
        for table in dataclasses.fields(Spec)
        for spec in (old, language)
        for key in dataclasses.asdict(spec)[table.name]
    }
    assert set(RESUMABLE_KEYS) <= known
    assert set(RESUMABLE_TABLES) <= {table.name for table in dataclasses.fields(Spec)}
