"""Loads a model from a folder of safetensors files; each process reads its own part."""

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..base.files import folder_at
from ..base.imported import is_dtensor
from ..errors import InvalidArgument
from ..processes.gather import of_all
from .key_names import ignored, names_in_model
from .safetensors_folder import SafetensorsFolder
from .together import together
from .unsplit import UnsplitModel, at_rest, weights_of


class LoadedNames(NamedTuple):
    """What ``load_pretrained`` with ``strict=False`` did not find, or did not use."""

    missing_keys: list[str]
    unexpected_keys: list[str]


def load_pretrained(
    model: UnsplitModel | nn.Module, folder: str | os.PathLike, *, strict: bool = True, cast: bool = False
) -> LoadedNames:
    """Copies in the weights of a folder of safetensors files, as ``save_pretrained`` of transformers writes it.

    The folder holds ``model.safetensors``, or several files and ``model.safetensors.index.json``. If the
    pipeline is in many processes, all processes of torch.distributed call it together; each reads only the
    tensors of its own stages, 16 MiB at a time. A tied parameter needs one of its names in the files. Names
    that transformers has changed, and the prefix of a base model, are understood. Nothing is unpickled.

    Example::

        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        pipe = pe.Pipeline(model, num_stages=2, microbatches=4, sample=batch, mesh=dist.group.WORLD)
        pe.load_pretrained(pipe, folder)

    Args:
        model: a Pipeline, or a plain module.
        folder: on a file system that all processes see.
        strict: refuse a folder that lacks tensors of the model, or has others.
        cast: convert tensors of another type than the model's.

    Returns:
        ``missing_keys`` and ``unexpected_keys``, of the whole model, the same in all processes.

    Raises:
        InvalidArgument: there are no safetensors files, or one is damaged; or, by name, tensors that are
            missing or unexpected, or of another shape or type. Nothing has changed.
        PipelineError: safetensors is not installed, a file cannot be read, or a step is running.
    """
    path = Path(os.path.realpath(folder))
    weights = weights_of(model)
    with at_rest(model, "load_pretrained was called"):
        what = f"{str(path)!r} cannot be loaded"
        here = weights.module.state_dict(keep_vars=True)
        known = [name for names in of_all(list(here), alone=weights.alone) for name in names]
        with together(what, weights.alone):
            files = SafetensorsFolder(folder_at(path) or path)
            found = _Found(
                files.names, names_in_model(weights.module, files.names, set(known)), weights.repeated
            )
            answer = _compared(weights.module, found, known)
            if strict and any(answer):
                raise InvalidArgument(_refusal(answer))
            wanted = found.for_tensors(here)
            _check_looks(files, wanted, here, cast)
            _check_ties(files, wanted)
        with together(what, weights.alone), torch.no_grad():
            for in_file, tensor in wanted:
                _copy(files, in_file, tensor)
    return answer


class _Found:
    """Which tensors of a folder are which of the model's."""

    def __init__(
        self, in_file: Sequence[str], in_model: Mapping[str, str], repeated: Mapping[str, str]
    ) -> None:
        self._repeated = repeated
        self._in_file: dict[str, list[str]] = {}  # by the first name of a tied parameter
        self.names = in_model
        for name in in_file:
            self._in_file.setdefault(self._first(in_model[name]), []).append(name)

    def has(self, name: str) -> bool:
        """Whether there is the model's tensor of this name, or one that it is tied to."""
        return self._first(name) in self._in_file

    def for_tensors(self, tensors: Mapping[str, Tensor]) -> list[tuple[str, Tensor]]:
        """The names in the files for these tensors, each tensor once; several if it is tied."""
        wanted: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            for in_file in self._in_file.get(self._first(name), ()):
                wanted[in_file] = tensor
        return list(wanted.items())

    def _first(self, name: str) -> str:
        return self._repeated.get(name, name)


def _compared(module: nn.Module, found: _Found, known: Sequence[str]) -> LoadedNames:
    missing = [name for name in dict.fromkeys(known) if not found.has(name)]
    of_model = set(known)
    unexpected = [name for name, in_model in found.names.items() if in_model not in of_model]
    return LoadedNames(
        sorted(set(missing) - ignored(module, missing, "missing")),
        sorted(set(unexpected) - ignored(module, unexpected, "unexpected")),
    )


def _refusal(answer: LoadedNames) -> str:
    parts = [
        f"{kind} {', '.join(names[:_SHOWN])}{f' and {len(names) - _SHOWN} more' * (len(names) > _SHOWN)}"
        for kind, names in (("the model has", answer.missing_keys), ("the files have", answer.unexpected_keys))
        if names
    ]
    advice = "give strict=False to load the others"
    if answer.missing_keys and answer.unexpected_keys:
        advice += (
            "; if the files hold the same weights in another layout, as experts one by one, write them with "
        )
        advice += "save_pretrained(folder, save_original_format=False) of transformers"
    return f"{', and '.join(parts)}, where the other side has nothing; {advice}"


_SHOWN = 8


def _check_looks(
    files: SafetensorsFolder, wanted: Iterable[tuple[str, Tensor]], here: Mapping[str, Any], cast: bool
) -> None:
    looks = files.looks(name for name, _ in wanted)
    name_of = {id(tensor): name for name, tensor in here.items()}
    for in_file, tensor in wanted:
        look = looks[in_file]
        same_type = look.dtype == tensor.dtype or (cast and isinstance(look.dtype, torch.dtype))
        if look.shape != tuple(tensor.shape) or not same_type:
            advice = "give a model of this shape" if same_type else "give cast=True, or a model of this type"
            raise InvalidArgument(
                f"{in_file!r} is {look} where the model's {name_of[id(tensor)]!r} is "
                f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}; {advice}"
            )


def _check_ties(files: SafetensorsFolder, wanted: Iterable[tuple[str, Tensor]]) -> None:
    """Refuses two values for one tensor."""
    first: dict[Tensor, str] = {}
    for name, tensor in wanted:
        other = first.setdefault(tensor, name)
        if other != name and not all(
            torch.equal(a, b) for (_, a), (_, b) in zip(files.read(other), files.read(name))
        ):
            raise InvalidArgument(
                f"{other!r} and {name!r} have different values, and the model ties them; give a model that "
                "does not (tie_word_embeddings=False in the config of transformers)"
            )


def _copy(files: SafetensorsFolder, name: str, tensor: Tensor) -> None:
    if is_dtensor(tensor):
        from torch.distributed.tensor import distribute_tensor

        whole = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
        _copy(files, name, whole)
        tensor.copy_(distribute_tensor(whole, tensor.device_mesh, tensor.placements, src_data_rank=None))
        return
    for index, values in files.read(name):
        tensor[index].copy_(values)
