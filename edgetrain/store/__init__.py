"""Durable storage of a session's tensors: slots, commit groups, digest. Imports no torch.

``StageLayout`` says what a stage stores, ``Store`` keeps it, a ``Transaction`` changes it.
"""

from edgetrain.store.group import PendingCommit
from edgetrain.store.layout import StageLayout, TensorSpec
from edgetrain.store.manifest import Manifest, StageRecord
from edgetrain.store.slot import Place
from edgetrain.store.store import External, Store
from edgetrain.store.transaction import Transaction
from edgetrain.store.verify import StageCheck, Verification

__all__ = [
    "External",
    "Manifest",
    "PendingCommit",
    "Place",
    "StageCheck",
    "StageLayout",
    "StageRecord",
    "Store",
    "TensorSpec",
    "Transaction",
    "Verification",
]
