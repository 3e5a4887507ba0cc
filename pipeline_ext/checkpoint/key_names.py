"""The names of tensors in checkpoints of transformers, which are not always those of the model."""

import re
from collections.abc import Collection, Iterable
from typing import Any

from torch import nn

from ..base.imported import imported_class


def names_in_model(model: nn.Module, in_file: Iterable[str], known: Collection[str]) -> dict[str, str]:
    """The name in the model of each tensor in a file; its own name where the model has none like it.

    ``known``: the names in the unsplit model. Checkpoints of transformers may have older names, which the
    library knows, and names with or without the prefix of the base model, as ``model.`` of a Llama.
    """
    renamings = _renamings(model)
    prefix = getattr(model, "base_model_prefix", "")
    found = {}
    for name in in_file:
        renamed = name
        if name not in known:
            for renaming in renamings:
                renamed, _ = renaming.rename_source_key(renamed)
        shorter = renamed.removeprefix(f"{prefix}.")
        candidates = [renamed, *([f"{prefix}.{renamed}", shorter] if prefix else [])]
        found[name] = next((candidate for candidate in candidates if candidate in known), name)
    return found


def ignored(model: nn.Module, names: Iterable[str], kind: str) -> set[str]:
    """The names that a model of transformers says to ignore; ``kind``: "missing" or "unexpected"."""
    patterns = getattr(model, f"_keys_to_ignore_on_load_{kind}", None) or ()
    return {name for name in names if any(re.search(pattern, name) for pattern in patterns)}


def _renamings(model: nn.Module) -> list[Any]:
    """Those that transformers applies to the names in checkpoints of a model, in order."""
    if not isinstance(model, imported_class("transformers.modeling_utils", "PreTrainedModel")):
        return []
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming
    except ImportError:  # in some versions they are elsewhere
        return []
    return [found for found in get_model_conversion_mapping(model) if isinstance(found, WeightRenaming)]
