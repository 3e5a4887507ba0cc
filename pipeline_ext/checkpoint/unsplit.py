"""The unsplit model: a pipeline's parameters, gradients and state under the names of the original model."""

import copy
from collections import OrderedDict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from .. import _C
from ..base.imported import is_dtensor
from ..calls.program import refuse_a_part
from ..calls.stage import CallStage
from ..calls.values import is_elsewhere
from ..engines.lifetime import Lifetime
from ..engines.protocol import Engine
from ..errors import InvalidArgument, PeerError
from ..model.slice import Slice
from ..processes.circle import Circle
from ..processes.values import decode, encode

LOSS = "loss_fn."  # prefix of the names of a loss function's parameters and buffers


def repeated_names(model: nn.Module | Sequence[Any], loss_fn: Any = None) -> dict[str, str]:
    """The names of tied parameters, except the first name of each, and that one; for ``LocalModel``."""
    whole = model if isinstance(model, nn.Module) else _numbered(enumerate(model))
    trained = _with_loss(_unwrapped(whole), loss_fn)
    first = {parameter: name for name, parameter in trained.named_parameters()}
    every = trained.named_parameters(remove_duplicate=False)
    return {name: first[parameter] for name, parameter in every if name != first[parameter]}


class LocalModel:
    """The part of the unsplit model that this process holds.

    Attributes:
        module: the model, or a copy without the layers of other processes. DistributedDataParallel around
            layers is removed.
        elsewhere: the names of the layers, or tensors, of other processes.
        repeated: the names of tied parameters, except the first name of each, with that one.
    """

    def __init__(
        self,
        model: nn.Module | Sequence[Any],
        stages: Sequence[Any],
        local: Mapping[int, nn.Module],
        repeated: Mapping[str, str],
        loss_fn: Any = None,
    ) -> None:
        """``stages``: what ``cut`` made of ``model``; ``local``: the modules of this process, by stage.

        ``repeated``: ``repeated_names`` of the model, taken before stages of other processes lose their memory.
        Raises InvalidArgument if the model has a layer with the loss function's name.
        """
        layers = [s.names if isinstance(s, Slice) else [str(index)] for index, s in enumerate(stages)]
        self.elsewhere = [name for index, names in enumerate(layers) if index not in local for name in names]
        module: nn.Module
        if not isinstance(model, nn.Module):
            module = _numbered(local.items())
        elif isinstance(stages[0], CallStage):
            self.elsewhere = [name for name, tensor in _tensors(model) if is_elsewhere(tensor)]
            module = _here(model)
        elif self.elsewhere:
            module = _part(model, {name for index in local for name in layers[index]})
        else:
            module = model
        self.module = _unwrapped(module)
        self._loss_fn = loss_fn if len(stages) - 1 in local else None
        self.repeated = repeated
        self._counted_elsewhere = _first_held_elsewhere(stages, local)

    @property
    def trained(self) -> nn.Module:
        """``module``, with the loss function as a child if that is a module with parameters."""
        return _with_loss(self.module, self._loss_fn)

    def counted_parameters(self) -> list[nn.Parameter]:
        """The parameters, without those that an earlier layer of another process holds too; each once."""
        return [
            p
            for name, p in self.trained.named_parameters()
            if name not in self.repeated and p not in self._counted_elsewhere
        ]


class UnsplitModel:
    """The part of a pipeline that looks like the model it was made of.

    In many processes, each process has the parameters and the state of its own stages.
    """

    _local: LocalModel
    _lifetime: Lifetime
    _engine: Engine[Any]
    _circle: Circle | None  # of these processes; None if they have GPUs alone
    _group: dist.ProcessGroup | None  # the processes that hold the stages; None: this process holds all

    def named_parameters(self, remove_duplicate: bool = True) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters under the names of the unsplit model.

        A tied parameter comes once, or with ``remove_duplicate=False`` under each of its names. If ``loss_fn``
        is a module, its parameters come last, under names that begin with "loss_fn.".
        """
        return self._local.trained.named_parameters(remove_duplicate=remove_duplicate)

    def parameters(self) -> Iterator[nn.Parameter]:
        """The parameters of ``named_parameters``, each once, for an optimizer."""
        return self._local.trained.parameters()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """``nn.Module.zero_grad`` of the unsplit model."""
        self._local.trained.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """The parameters and buffers under the names of the unsplit model.

        Returns what ``nn.Module.state_dict`` of the model given to Pipeline returns; for a list of stage
        modules, that of ``nn.Sequential(*stages)``. DistributedDataParallel around a layer does not change its
        names. If ``loss_fn`` is a module, only ``save_checkpoint`` includes its state. Also works
        on a closed or dead pipeline. Raises PipelineError while a step is running.
        """
        with self._lifetime.turn("state_dict was called"):
            return self._local.module.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True) -> Any:
        """Copies in the ``state_dict`` of the plain model, or of a pipeline with any number of stages.

        Like ``nn.Module.load_state_dict``: returns ``missing_keys`` and ``unexpected_keys``; raises
        RuntimeError for tensors of other shapes and, if ``strict``, for missing or unexpected names. Skips the
        state of other processes' stages. Raises PipelineError while a step is running.
        """
        elsewhere = tuple(f"{name}." for name in self._local.elsewhere)
        with self._lifetime.turn("load_state_dict was called"):
            return self._local.module.load_state_dict(_without(state_dict, elsewhere), strict=strict)

    def clip_grad_norm_(
        self, max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False
    ) -> Tensor:
        """``torch.nn.utils.clip_grad_norm_`` of the unsplit model: over all stages, tied parameters once.

        Includes the parameters of ``loss_fn``, if that is a module. In many processes, all call it together; it
        works with sharded parameters (fully_shard, tensor parallelism). Returns the norm before clipping, a
        tensor without dimensions, the same in all processes. Raises RuntimeError, in all processes, if the norm
        is not finite and ``error_if_nonfinite`` is set; PipelineError while a step is running; PeerError if
        another process is gone, or does not come within the pipeline's ``timeout``; DeadPipeline.
        """
        with self._lifetime.turn("clip_grad_norm_ was called"):
            norms = _norms(self._local.counted_parameters(), norm_type)
            if self._group is not None:
                self._lifetime.check()
                try:
                    norms = self._norms_by_process(norms, norm_type, self._group)
                except PeerError as error:
                    self._engine.failed(str(error))
                    raise
            total = get_total_norm(norms, norm_type, error_if_nonfinite)
            for parameters in _by_mesh(self.parameters()).values():
                clip_grads_with_norm_(parameters, max_norm, total)
        return total

    def _norms_by_process(
        self, norms: list[Tensor], norm_type: float, group: dist.ProcessGroup
    ) -> list[Tensor]:
        norm = get_total_norm(norms, norm_type)
        # float64 is exact, and the same type in all processes whatever the types of their parameters.
        if self._circle is not None:
            found = self._circle.of_all(encode(float(norm.double()).hex()))
            norms = [torch.tensor(float.fromhex(decode(each)), dtype=torch.float64) for each in found]
        else:
            sent = norm.to(next((p.device for p in self.parameters()), None), torch.float64)
            norms = [torch.empty_like(sent) for _ in range(group.size())]
            dist.all_gather(norms, sent, group=group)
        return [received.to(torch.promote_types(norm.dtype, torch.float32)) for received in norms]


class Weights(NamedTuple):
    """What this process holds of a model's weights."""

    module: nn.Module
    repeated: Mapping[str, str]  # the names of tied parameters, except the first name of each, with that one
    alone: bool  # it holds all of them


def at_rest(model: UnsplitModel | nn.Module, what: str) -> _C.Taking:
    """A context in which no step of the model runs. Entering it raises PipelineError, which names ``what``.

    Ctrl-C at any moment leaves it, if it is used in a ``with`` statement itself.
    """
    return model._lifetime.turn(what) if isinstance(model, UnsplitModel) else _C.Turn().take(what)


def trained(model: UnsplitModel | nn.Module) -> nn.Module:
    """What of the model is here, as one module, with the loss function if that is trained."""
    return model._local.trained if isinstance(model, UnsplitModel) else model


def weights_of(model: UnsplitModel | nn.Module) -> Weights:
    """The weights of a pipeline or a plain model."""
    if isinstance(model, UnsplitModel):
        return Weights(model._local.module, model._local.repeated, model._group is None)
    if isinstance(model, nn.Module):
        return Weights(model, repeated_names(model), alone=True)
    raise InvalidArgument(f"a {type(model).__name__} is given; give a Pipeline or an nn.Module")


def _first_held_elsewhere(stages: Sequence[Any], local: Mapping[int, nn.Module]) -> set[nn.Parameter]:
    """Parameters that an earlier stage of another process holds too, of a model that each process has whole."""
    first: dict[nn.Parameter, int] = {}
    for index, stage in enumerate(stages):
        for parameter in stage.parameters() if isinstance(stage, CallStage) else ():
            first.setdefault(parameter, index)
    return {parameter for parameter, index in first.items() if index not in local}


def _numbered(stages: Iterable[tuple[int, Any]]) -> nn.Sequential:
    """The stage modules, named as in ``nn.Sequential(*stages)``; functions that make modules are left out."""
    whole = nn.Sequential()
    for index, stage in stages:
        if isinstance(stage, nn.Module):
            whole.add_module(str(index), stage)
    return whole


def _part(module: nn.Module, layers: Collection[str], prefix: str = "") -> nn.Module:
    """A shallow copy of the containers, with the named layers only."""
    part = copy.copy(module)
    part._modules = {
        name: child if prefix + name in layers else _part(child, layers, f"{prefix}{name}.")
        for name, child in module._modules.items()
        if child is not None and any(f"{layer}.".startswith(f"{prefix}{name}.") for layer in layers)
    }
    return part


def _here(module: nn.Module) -> nn.Module:
    """The module; a shallow copy without what is on the meta device, if anything is."""
    if not any(is_elsewhere(tensor) for _, tensor in _tensors(module)):
        return module
    part = copy.copy(module)
    hooks = module._state_dict_pre_hooks.items()
    part._state_dict_pre_hooks = OrderedDict((n, hook) for n, hook in hooks if hook is not refuse_a_part)
    for table in ("_parameters", "_buffers"):
        held = getattr(module, table)
        part.__dict__[table] = {n: t for n, t in held.items() if t is None or not is_elsewhere(t)}
    part._modules = {n: None if child is None else _here(child) for n, child in module._modules.items()}
    return part


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The parameters and buffers under all their names."""
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def _unwrapped(module: nn.Module) -> nn.Module:
    """The module without DistributedDataParallel; containers of layers that have it are copied shallowly."""
    if isinstance(module, DistributedDataParallel):
        return _unwrapped(module.module)
    layers = {name: None if child is None else _unwrapped(child) for name, child in module._modules.items()}
    if all(layer is module._modules[name] for name, layer in layers.items()):
        return module
    part = copy.copy(module)
    part._modules = layers
    return part


def _with_loss(module: nn.Module, loss_fn: Any) -> nn.Module:
    """The module; if the loss function has parameters, a shallow copy with that as a child."""
    if not isinstance(loss_fn, nn.Module) or not any(True for _ in loss_fn.parameters()):
        return module
    name = LOSS.rstrip(".")
    if module._modules.get(name, loss_fn) is not loss_fn:
        raise InvalidArgument(
            f"the model has a layer {name!r}, but the parameters of loss_fn are saved under that name; rename "
            "the layer"
        )
    both = copy.copy(module)
    both._modules = module._modules | {name: loss_fn}
    return both


def _by_mesh(parameters: Iterable[nn.Parameter]) -> dict[DeviceMesh | None, list[nn.Parameter]]:
    """Parameters with a gradient, by the mesh that shards it; torch cannot mix meshes in one norm."""
    found: dict[DeviceMesh | None, list[nn.Parameter]] = {}
    for p in parameters:
        if p.grad is not None:
            mesh = p.grad.device_mesh if is_dtensor(p.grad) else None
            found.setdefault(mesh, []).append(p)
    return found


def _norms(parameters: Iterable[nn.Parameter], norm_type: float) -> list[Tensor]:
    """Plain tensors whose total norm is that of all gradients: the gradients, and the norm of each mesh's."""
    by_mesh = {
        mesh: [p.grad for p in found if p.grad is not None] for mesh, found in _by_mesh(parameters).items()
    }
    norms = by_mesh.pop(None, [])
    for grads in by_mesh.values():
        norm = get_total_norm(grads, norm_type)
        assert is_dtensor(norm)
        norms.append(norm.full_tensor())
    return norms


def _without(state_dict: Mapping[str, Any], prefixes: tuple[str, ...]) -> Mapping[str, Any]:
    """The state without the names that begin with a prefix; the versions of modules stay."""
    if not prefixes:
        return state_dict
    kept = OrderedDict(
        (name, value) for name, value in state_dict.items() if not f"{name}.".startswith(prefixes)
    )
    # torch keeps the versions of modules in this attribute of a plain OrderedDict.
    kept._metadata = getattr(state_dict, "_metadata", None)  # type: ignore[attr-defined]
    return kept
