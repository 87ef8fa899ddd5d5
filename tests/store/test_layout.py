from __future__ import annotations

import pytest

from edgetrain.store import StageLayout, TensorSpec
from tests.store.common import trained


def test_offsets_and_sections_are_padded() -> None:
    layout = trained("stage")
    assert [layout.offset("weight", name) for name in ("bias", "half", "weight")] == [0, 64, 128]
    # 21 elements: 42 bytes as F16 weights, 84 as F32 moments.
    assert [layout.offset("m", name) for name in ("bias", "half", "weight")] == [0, 64, 192]
    assert layout.section_bytes("weight") == 12288  # 128 + 8580, padded to pages
    assert layout.section_bytes("v") == layout.section_bytes("m") == 12288


def test_frozen_stage_has_one_role_and_one_file() -> None:
    layout = StageLayout("codebook", (TensorSpec("rows", (10, 6), "BF16"),), trained=False)
    assert [role.name for role in layout.roles] == ["frozen"]
    assert layout.slots == ("frozen",)
    assert layout.section_bytes("frozen") == 4096


@pytest.mark.parametrize("names", [(), ("b", "a"), ("a", "a")])
def test_tensors_must_be_in_name_order_and_distinct(names: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="name order"):
        StageLayout("stage", tuple(TensorSpec(name, (1,)) for name in names), trained=True)


@pytest.mark.parametrize("name", ["", "a/b", "..", ".hidden", "a b"])
def test_a_stage_name_is_a_file_name(name: str) -> None:
    with pytest.raises(ValueError, match="name"):
        StageLayout(name, (TensorSpec("a", (1,)),), trained=True)


def test_unknown_types_and_empty_tensors_are_refused() -> None:
    with pytest.raises(ValueError, match="F31"):
        TensorSpec("a", (1,), "F31")
    with pytest.raises(ValueError, match="no tensor"):
        TensorSpec("a", (3, 0))
