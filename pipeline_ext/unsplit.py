"""The unsplit model: a pipeline's parameters, gradients and state, under the names that they have there."""

import copy
from collections import OrderedDict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from .lifetime import Lifetime
from .partition import Slice


def repeated_names(model: nn.Module | Sequence[Any]) -> set[str]:
    """The names of tied parameters, without the first of each; of a list of stages, as in ``LocalModel``."""
    whole = model if isinstance(model, nn.Module) else _numbered(enumerate(model))
    every = {name for name, _ in whole.named_parameters(remove_duplicate=False)}
    return every - {name for name, _ in whole.named_parameters()}


class LocalModel:
    """What this process holds of the unsplit model.

    Attributes:
        module: the model itself where all of it is here; otherwise one that lacks the layers that are not.
        elsewhere: the names of those.
    """

    def __init__(
        self,
        model: nn.Module | Sequence[Any],
        stages: Sequence[Any],
        local: Mapping[int, nn.Module],
        repeated: Collection[str],
    ) -> None:
        """``stages`` are what ``partition.cut`` made of ``model``, ``local`` those of this process, by stage.

        ``repeated`` are ``repeated_names(model)``, from before it had memory here and none elsewhere.
        """
        layers = [s.names if isinstance(s, Slice) else [str(index)] for index, s in enumerate(stages)]
        self.elsewhere = [name for index, names in enumerate(layers) if index not in local for name in names]
        if not isinstance(model, nn.Module):
            self.module = _numbered(local.items())
        elif self.elsewhere:
            self.module = _part(model, {name for index in local for name in layers[index]})
        else:
            self.module = model
        self._repeated = repeated

    def counted_parameters(self) -> list[nn.Parameter]:
        """Those that no earlier layer of another process holds, each once."""
        return [p for name, p in self.module.named_parameters() if name not in self._repeated]


class UnsplitModel:
    """What a pipeline has in common with the model that it is made of.

    Of several processes each has what belongs to its own stages.
    """

    _local: LocalModel
    _lifetime: Lifetime
    _group: dist.ProcessGroup | None  # of the processes that hold the stages; None: this one holds all

    def named_parameters(self, remove_duplicate: bool = True) -> Iterator[tuple[str, nn.Parameter]]:
        """The model's parameters with the names that they have in the unsplit model.

        A tied parameter comes once, or with ``remove_duplicate=False`` once for each of its names. Those of
        a ``loss_fn`` that is a module are not among them.
        """
        return self._local.module.named_parameters(remove_duplicate=remove_duplicate)

    def parameters(self) -> Iterator[nn.Parameter]:
        """The model's parameters, each once, as an optimizer takes them."""
        return self._local.module.parameters()

    def state_dict(self) -> dict[str, Any]:
        """The model's parameters and buffers, under the names they have in the unsplit model.

        What ``nn.Module.state_dict`` of the model given to Pipeline returns; of a list of stage modules,
        that of ``nn.Sequential(*stages)``. A ``loss_fn`` that is a module is not part of it: save it
        yourself. Works on a closed or dead pipeline too. Raises PipelineError while a step is running.
        """
        with self._lifetime.one_at_a_time("state_dict was called"):
            return self._local.module.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True) -> Any:
        """Copies in what ``state_dict`` of a pipeline with any stages, or of the plain model, returned.

        As ``nn.Module.load_state_dict``: returns ``missing_keys`` and ``unexpected_keys``; raises
        RuntimeError for tensors of other shapes and, if ``strict``, for missing or unexpected names. What
        belongs to another process's stages is passed over. Raises PipelineError while a step is running.
        """
        elsewhere = tuple(f"{name}." for name in self._local.elsewhere)
        with self._lifetime.one_at_a_time("load_state_dict was called"):
            return self._local.module.load_state_dict(_without(state_dict, elsewhere), strict=strict)

    def clip_grad_norm_(
        self, max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False
    ) -> Tensor:
        """``torch.nn.utils.clip_grad_norm_`` of the unsplit model: over all stages, tied parameters once.

        Several processes call it together. Returns the norm before clipping, a tensor without dimensions,
        the same in each of them. Raises RuntimeError, in all of them, where it is not finite and
        ``error_if_nonfinite`` asks for that; PipelineError while a step is running.
        """
        with self._lifetime.one_at_a_time("clip_grad_norm_ was called"):
            counted = [p.grad for p in self._local.counted_parameters() if p.grad is not None]
            norms = counted if self._group is None else self._norms_by_process(counted, norm_type)
            total = get_total_norm(norms, norm_type, error_if_nonfinite)
            clip_grads_with_norm_(self.parameters(), max_norm, total)
        return total

    def _norms_by_process(self, grads: list[Tensor], norm_type: float) -> list[Tensor]:
        norm = get_total_norm(grads, norm_type)
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        # float64: of one type in all processes, whatever their parameters are of, and exact.
        sent = norm.to("cpu", torch.float64)
        norms = [torch.empty_like(sent) for _ in range(self._group.size())]
        dist.all_gather(norms, sent, group=self._group)
        return [received.to(torch.promote_types(norm.dtype, torch.float32)) for received in norms]


def _numbered(stages: Iterable[tuple[int, Any]]) -> nn.Sequential:
    """The stage modules, named as in ``nn.Sequential(*stages)``; what is no module is left out."""
    whole = nn.Sequential()
    for index, stage in stages:
        if isinstance(stage, nn.Module):
            whole.add_module(str(index), stage)
    return whole


def _part(module: nn.Module, layers: Collection[str], prefix: str = "") -> nn.Module:
    """A copy of the containers alone, in which the layers of other names are left out."""
    part = copy.copy(module)
    part._modules = {
        name: child if prefix + name in layers else _part(child, layers, f"{prefix}{name}.")
        for name, child in module._modules.items()
        if any(f"{layer}.".startswith(f"{prefix}{name}.") for layer in layers)
    }
    return part


def _without(state_dict: Mapping[str, Any], prefixes: tuple[str, ...]) -> Mapping[str, Any]:
    """Without the names that begin so; versions of modules are kept."""
    if not prefixes:
        return state_dict
    kept = OrderedDict((name, value) for name, value in state_dict.items() if not name.startswith(prefixes))
    kept._metadata = getattr(state_dict, "_metadata", None)  # as torch itself copies it
    return kept
