"""Model families, by the name that a recipe gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from edgetrain.models.autoregressive import Autoregressive, AutoregressiveNetwork
from edgetrain.models.base import Family, Network
from edgetrain.models.dit import DenoisingNetwork, DiT
from edgetrain.models.masked import Masked, MaskedNetwork
from edgetrain.models.recurrent import Recurrent, RecurrentNetwork
from edgetrain.models.vit import ClassifierNetwork, ViT
from edgetrain.spec import LanguageModelSpec, Spec, StackSpec

_FAMILIES: dict[str, tuple[type[Family], Callable[[Spec, Any], Network]]] = {
    "vit": (ViT, ClassifierNetwork),
    "dit": (DiT, DenoisingNetwork),
    "masked": (Masked, MaskedNetwork),
    "ar": (Autoregressive, AutoregressiveNetwork),
    "recurrent": (Recurrent, RecurrentNetwork),
}


def build_network(spec: Spec, dataset: Any) -> Network:
    """The spec's model for exact training. ``dataset``: what it draws from, a text, a stack, or for the families above
    ``training_batches``; None where nothing is to be drawn."""
    if isinstance(spec.model, LanguageModelSpec):
        from edgetrain.models.language import LanguageNetwork

        return LanguageNetwork(spec, dataset)
    if isinstance(spec.model, StackSpec):
        from edgetrain.models.stack import StackNetwork

        return StackNetwork(spec, dataset)
    _, network = _FAMILIES[spec.model.family]
    return network(spec, dataset)


def build_family(spec: Spec) -> Family:
    """The family of the spec's model."""
    family, _ = _FAMILIES[spec.model.family]
    return family(spec)
