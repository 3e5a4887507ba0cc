"""The unsplit model: a pipeline's parameters, gradients and state, under the names that they have there."""

import contextlib
import copy
from collections import OrderedDict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from ..base.imported import is_dtensor
from ..engines.lifetime import Lifetime
from ..errors import InvalidArgument
from ..model.cut import Slice

LOSS = "loss_fn."  # with which the names of a loss function's parameters and buffers begin


def repeated_names(model: nn.Module | Sequence[Any], loss_fn: Any = None) -> set[str]:
    """The names of tied parameters, without the first of each, as in ``LocalModel``."""
    whole = model if isinstance(model, nn.Module) else _numbered(enumerate(model))
    trained = _with_loss(_unwrapped(whole), loss_fn)
    every = {name for name, _ in trained.named_parameters(remove_duplicate=False)}
    return every - {name for name, _ in trained.named_parameters()}


class LocalModel:
    """What this process holds of the unsplit model.

    Attributes:
        module: the model where all of it is here; otherwise one that lacks the layers that are not. It has no
            DistributedDataParallel around its layers.
        elsewhere: the names of the layers that are not here.
    """

    def __init__(
        self,
        model: nn.Module | Sequence[Any],
        stages: Sequence[Any],
        local: Mapping[int, nn.Module],
        repeated: Collection[str],
        loss_fn: Any = None,
    ) -> None:
        """``stages`` are what ``partition.cut`` made of ``model``, ``local`` those of this process, by stage.

        ``repeated`` are ``repeated_names``, from before the model had memory here and none elsewhere.
        Raises InvalidArgument where the names of the loss function's parameters are taken.
        """
        layers = [s.names if isinstance(s, Slice) else [str(index)] for index, s in enumerate(stages)]
        self.elsewhere = [name for index, names in enumerate(layers) if index not in local for name in names]
        if not isinstance(model, nn.Module):
            module = _numbered(local.items())
        elif self.elsewhere:
            module = _part(model, {name for index in local for name in layers[index]})
        else:
            module = model
        self.module = _unwrapped(module)
        self._loss_fn = loss_fn if len(stages) - 1 in local else None
        self._repeated = repeated

    @property
    def trained(self) -> nn.Module:
        """``module``, and where the loss function is a module that too, as a child of that name."""
        return _with_loss(self.module, self._loss_fn)

    def counted_parameters(self) -> list[nn.Parameter]:
        """Those that no earlier layer of another process holds, each once."""
        return [p for name, p in self.trained.named_parameters() if name not in self._repeated]


class UnsplitModel:
    """What a pipeline has in common with the model that it is made of.

    Of several processes each has what belongs to its own stages.
    """

    _local: LocalModel
    _lifetime: Lifetime
    _group: dist.ProcessGroup | None  # of the processes that hold the stages; None: this one holds all

    def named_parameters(self, remove_duplicate: bool = True) -> Iterator[tuple[str, nn.Parameter]]:
        """All that is trained: the model's parameters, with the names that they have in the unsplit model.

        A tied parameter comes once, or with ``remove_duplicate=False`` once for each of its names. Those of
        a ``loss_fn`` that is a module come last, under names that begin with "loss_fn.".
        """
        return self._local.trained.named_parameters(remove_duplicate=remove_duplicate)

    def parameters(self) -> Iterator[nn.Parameter]:
        """Those of ``named_parameters``, each once, as an optimizer takes them."""
        return self._local.trained.parameters()

    def state_dict(self) -> dict[str, Any]:
        """The model's parameters and buffers, under the names they have in the unsplit model.

        What ``nn.Module.state_dict`` of the model given to Pipeline returns; of a list of stage modules,
        that of ``nn.Sequential(*stages)``. DistributedDataParallel around a layer adds nothing to its names. A
        ``loss_fn`` that is a module is not part of it, but is of what ``save_checkpoint`` writes. Works on a
        closed or dead pipeline too. Raises PipelineError while a step is running.
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

    @contextlib.contextmanager
    def at_rest(self, what: str) -> Iterator[nn.Module]:
        """All that is trained, as one module; PipelineError, naming ``what``, while a step is running."""
        with self._lifetime.one_at_a_time(what):
            yield self._local.trained

    def clip_grad_norm_(
        self, max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False
    ) -> Tensor:
        """``torch.nn.utils.clip_grad_norm_`` of the unsplit model: over all stages, tied parameters once.

        Parameters of a ``loss_fn`` that is a module are clipped along. Several processes call it together, also
        those that share a parameter out (fully_shard, tensor parallelism). Returns the norm before clipping, a
        tensor without dimensions, the same in each of them. Raises RuntimeError, in all of them, where it is
        not finite and ``error_if_nonfinite`` asks for that; PipelineError while a step is running.
        """
        with self._lifetime.one_at_a_time("clip_grad_norm_ was called"):
            norms = _norms(self._local.counted_parameters(), norm_type)
            if self._group is not None:
                norms = self._norms_by_process(norms, norm_type)
            total = get_total_norm(norms, norm_type, error_if_nonfinite)
            for parameters in _by_mesh(self.parameters()).values():
                clip_grads_with_norm_(parameters, max_norm, total)
        return total

    def _norms_by_process(self, norms: list[Tensor], norm_type: float) -> list[Tensor]:
        norm = get_total_norm(norms, norm_type)
        # float64: of one type in all processes, whatever their parameters are of, and exact.
        over_cpus = "gloo" in dist.get_backend_config(self._group)
        device = "cpu" if over_cpus else next((p.device for p in self.parameters()), None)
        sent = norm.to(device, torch.float64)
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


def _unwrapped(module: nn.Module) -> nn.Module:
    """The module without DistributedDataParallel; a copy of containers alone, where there is any in them."""
    if isinstance(module, DistributedDataParallel):
        return _unwrapped(module.module)
    layers = {name: None if child is None else _unwrapped(child) for name, child in module._modules.items()}
    if all(layer is module._modules[name] for name, layer in layers.items()):
        return module
    part = copy.copy(module)
    part._modules = layers
    return part


def _with_loss(module: nn.Module, loss_fn: Any) -> nn.Module:
    """The module, or a copy of it alone that has the loss function as a child where that is trained."""
    if not isinstance(loss_fn, nn.Module) or not any(True for _ in loss_fn.parameters()):
        return module
    name = LOSS.rstrip(".")
    if module._modules.get(name, loss_fn) is not loss_fn:
        raise InvalidArgument(
            f"the model has a layer {name!r}, and loss_fn is another module with parameters, which are to be "
            "saved under that name; rename the layer"
        )
    both = copy.copy(module)
    both._modules = module._modules | {name: loss_fn}
    return both


def _by_mesh(parameters: Iterable[nn.Parameter]) -> dict[DeviceMesh | None, list[nn.Parameter]]:
    """Those that have a gradient, by the mesh whose processes share it out; torch does not mix them."""
    found: dict[DeviceMesh | None, list[nn.Parameter]] = {}
    for p in parameters:
        if p.grad is not None:
            found.setdefault(p.grad.device_mesh if is_dtensor(p.grad) else None, []).append(p)
    return found


def _norms(parameters: Iterable[nn.Parameter], norm_type: float) -> list[Tensor]:
    """Plain tensors that have the norm of all gradients: those of one process themselves, others' norms."""
    by_mesh = {mesh: [p.grad for p in found] for mesh, found in _by_mesh(parameters).items()}
    plain = by_mesh.pop(None, [])
    return [*plain, *(get_total_norm(grads, norm_type).full_tensor() for grads in by_mesh.values())]


def _without(state_dict: Mapping[str, Any], prefixes: tuple[str, ...]) -> Mapping[str, Any]:
    """Without the names that begin so; versions of modules are kept."""
    if not prefixes:
        return state_dict
    kept = OrderedDict((name, value) for name, value in state_dict.items() if not name.startswith(prefixes))
    kept._metadata = getattr(state_dict, "_metadata", None)  # as torch itself copies it
    return kept
