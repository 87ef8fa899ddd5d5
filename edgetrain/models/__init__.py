"""Model families, by the name that a recipe gives."""

from __future__ import annotations

from typing import Any

from edgetrain.models.base import Family, Network
from edgetrain.models.dit import DenoisingNetwork, DiT
from edgetrain.models.vit import ClassifierNetwork, ViT
from edgetrain.spec import LanguageModelSpec, Spec, StackSpec

_FAMILIES: dict[str, type[Family]] = {"vit": ViT, "dit": DiT}


def build_network(spec: Spec, dataset: Any) -> Network:
    """The spec's model for exact training, on a data set of its kind; None where nothing is to be drawn."""
    if isinstance(spec.model, LanguageModelSpec):
        from edgetrain.models.language import LanguageNetwork

        return LanguageNetwork(spec, dataset)
    if isinstance(spec.model, StackSpec):
        from edgetrain.models.stack import StackNetwork

        return StackNetwork(spec, dataset)
    return DenoisingNetwork(spec, dataset) if spec.model.family == "dit" else ClassifierNetwork(spec, dataset)


def build_family(spec: Spec) -> Family:
    """The family of the spec's model."""
    return _FAMILIES[spec.model.family](spec)
