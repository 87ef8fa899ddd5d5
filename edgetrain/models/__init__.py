"""Model families, by the name that a recipe gives."""

from __future__ import annotations

from edgetrain.models.base import Family
from edgetrain.models.vit import ViT
from edgetrain.spec import Spec

_FAMILIES: dict[str, type[Family]] = {"vit": ViT}


def build_family(spec: Spec) -> Family:
    """The family of the spec's model."""
    return _FAMILIES[spec.model.family](spec)
