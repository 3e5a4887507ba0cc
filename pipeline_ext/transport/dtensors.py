"""DTensors on their way between processes: the part that is here, and how the parts make the whole.

Each process of a stage has a counterpart in the next one's, with the same place in the other dimensions of the
mesh. They send one another their parts; what is global travels as text.
"""

import json
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from ..base.imported import is_dtensor
from ..errors import PipelineError

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor, Placement

Names = tuple[str, ...] | None  # of a mesh's dimensions


class Meshes:
    """The meshes of a stage's DTensors: those of its parameters, of what it sends, and parts of ``whole``."""

    def __init__(self, modules: Sequence[nn.Module], whole: DeviceMesh | None) -> None:
        self._modules = modules
        self._whole = whole
        self._known: dict[Names, DeviceMesh] = {}

    def learn(self, tensors: Iterable[Tensor]) -> None:
        """Those that the stage has sent: their gradients come back."""
        for tensor in tensors:
            if is_dtensor(tensor):
                self._known[tensor.device_mesh.mesh_dim_names] = tensor.device_mesh

    def find(self, names: Names) -> DeviceMesh:
        """The one with these dimensions. Raises PipelineError where there is none."""
        if names not in self._known:
            self.learn(parameter for module in self._modules for parameter in module.parameters())
        if names not in self._known and self._whole is not None and names is not None:
            if set(names) <= set(self._whole.mesh_dim_names or ()):
                self._known[names] = self._whole[names]
        if names not in self._known:
            dimensions = "without names" if names is None else f"named {', '.join(names)}"
            raise PipelineError(
                f"a stage was sent a DTensor on a mesh with dimensions {dimensions}, and knows none such; give "
                "the pipeline the mesh that has them, or the stage a parameter that lies on it"
            )
        return self._known[names]


def parted(leaves: Sequence[Any]) -> tuple[Sequence[Any], str | None]:
    """The leaves with this process's parts in place of DTensors; what those were, None where there are none.

    Raises PipelineError for a placement that cannot be told.
    """
    if not any(is_dtensor(leaf) for leaf in leaves):
        return leaves, None
    told = [_tell(leaf) if is_dtensor(leaf) else None for leaf in leaves]
    return [_part(leaf) if is_dtensor(leaf) else leaf for leaf in leaves], json.dumps(told)


def joined(leaves: Sequence[Any], told: str | None, meshes: Meshes) -> Sequence[Any]:
    """What ``parted`` was given, at the other end."""
    if told is None:
        return leaves
    return [leaf if what is None else _join(leaf, what, meshes) for leaf, what in zip(leaves, json.loads(told))]


def _part(whole: "DTensor") -> Tensor:
    return whole.detach().to_local().requires_grad_(whole.requires_grad)


def _tell(whole: "DTensor") -> list[Any]:
    placements = [_tell_placement(placement) for placement in whole.placements]
    return [whole.device_mesh.mesh_dim_names, placements, whole.shape, whole.stride()]


def _join(part: Tensor, what: list[Any], meshes: Meshes) -> "DTensor":
    from torch.distributed.tensor import DTensor

    names, placements, shape, stride = what
    whole = DTensor.from_local(
        part.detach(),
        meshes.find(None if names is None else tuple(names)),
        [_read_placement(placement) for placement in placements],
        run_check=False,
        shape=torch.Size(shape),
        stride=tuple(stride),
    )
    return whole.requires_grad_(part.requires_grad)


def _tell_placement(placement: "Placement") -> list[Any]:
    from torch.distributed.tensor import Partial, Replicate, Shard

    if type(placement) is Shard:
        return ["shard", placement.dim]
    if type(placement) is Replicate:
        return ["replicate"]
    if type(placement) is Partial:
        return ["partial", placement.reduce_op]
    raise PipelineError(
        f"a DTensor with the placement {placement} does not go from process to process; Shard, Replicate and "
        "Partial do: redistribute it before it is handed on"
    )


def _read_placement(told: list[Any]) -> "Placement":
    from torch.distributed.tensor import Partial, Replicate, Shard

    kind, *arguments = told
    return {"shard": Shard, "replicate": Replicate, "partial": Partial}[kind](*arguments)
