"""Runs the hooks of a module whose forward does not run here."""

from typing import Any

from torch import nn


def run_hooks(module: nn.Module, args: tuple, kwargs: dict[str, Any], result: Any) -> None:
    """Calls the module's forward hooks as torch does, for what they collect; what they return is not used."""
    for key, hook in list(module._forward_pre_hooks.items()):
        if key in module._forward_pre_hooks_with_kwargs:
            hook(module, args, kwargs)
        else:
            hook(module, args)
    for key, hook in list(module._forward_hooks.items()):
        if key in module._forward_hooks_with_kwargs:
            hook(module, args, kwargs, result)
        else:
            hook(module, args, result)
