"""DTensors between processes: this process's shard, and how the shards make the whole.

Each process of a stage has a counterpart in the next stage, at the same coordinates in the other dimensions of
the mesh. The two send each other their shards; the global shape and the placements are sent as text.
"""

import json
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from ..errors import PipelineError

Names = tuple[str, ...] | None  # of a mesh's dimensions


class Meshes:
    """The meshes of a stage's DTensors: of its parameters, of what it sends, and submeshes of ``whole``."""

    def __init__(self, modules: Sequence[nn.Module], whole: DeviceMesh | None) -> None:
        self._modules = modules
        self._whole = whole
        self._known: dict[Names, DeviceMesh] = {}

    def learn(self, tensors: Iterable[Tensor]) -> None:
        """Adds the meshes of tensors that the stage has sent, because their gradients come back."""
        for tensor in tensors:
            if isinstance(tensor, DTensor):
                self._known[tensor.device_mesh.mesh_dim_names] = tensor.device_mesh

    def find(self, names: Names) -> DeviceMesh:
        """The mesh with these dimensions. Raises PipelineError if there is none."""
        if names not in self._known:
            self.learn(parameter for module in self._modules for parameter in module.parameters())
        if names not in self._known and self._whole is not None and names is not None:
            if set(names) <= set(self._whole.mesh_dim_names or ()):
                self._known[names] = self._whole[names]
        if names not in self._known:
            dimensions = "without names" if names is None else f"named {', '.join(names)}"
            raise PipelineError(
                f"a stage received a DTensor on a mesh with dimensions {dimensions}, and has no such mesh; "
                "give the pipeline the mesh that has them, or the stage a parameter on that mesh"
            )
        return self._known[names]


def to_local(leaves: Sequence[Any]) -> tuple[Sequence[Any], str | None]:
    """The leaves with DTensors replaced by their local shards, and a description of the DTensors, if any.

    Raises PipelineError for a placement that cannot be described.
    """
    if not any(isinstance(leaf, DTensor) for leaf in leaves):
        return leaves, None
    described = [_describe(leaf) if isinstance(leaf, DTensor) else None for leaf in leaves]
    return [_shard(leaf) if isinstance(leaf, DTensor) else leaf for leaf in leaves], json.dumps(described)


def from_local(leaves: Sequence[Any], described: str | None, meshes: Meshes) -> Sequence[Any]:
    """What ``to_local`` was given, in the receiving process."""
    if described is None:
        return leaves
    return [
        leaf if what is None else _whole(leaf, what, meshes)
        for leaf, what in zip(leaves, json.loads(described))
    ]


def _shard(whole: DTensor) -> Tensor:
    detached = whole.detach()
    assert isinstance(detached, DTensor)
    return detached.to_local().requires_grad_(whole.requires_grad)


def _describe(whole: DTensor) -> list[Any]:
    placements = [_describe_placement(placement) for placement in whole.placements]
    return [whole.device_mesh.mesh_dim_names, placements, whole.shape, whole.stride()]


def _whole(shard: Tensor, described: list[Any], meshes: Meshes) -> Tensor:
    names, placements, shape, stride = described
    whole = DTensor.from_local(
        shard.detach(),
        meshes.find(None if names is None else tuple(names)),
        [_read_placement(placement) for placement in placements],
        run_check=False,
        shape=torch.Size(shape),
        stride=tuple(stride),
    )
    return whole.requires_grad_(shard.requires_grad)


def _describe_placement(placement: Placement) -> list[Any]:
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


def _read_placement(described: list[Any]) -> Placement:
    kind, *arguments = described
    return {"shard": Shard, "replicate": Replicate, "partial": Partial}[kind](*arguments)
