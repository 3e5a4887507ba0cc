"""Flat buffers that hold the gradients of parameters and are reduced as a whole."""

import time
from collections.abc import Collection, Iterable, Sequence

import torch
from torch import Tensor, nn

from ..errors import InvalidArgument, PipelineError
from ..packing import Layout, Packer, aligned, packer
from .member import Member, Work


class Bucket:
    """Parameters of one type, whose gradients are reduced together."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = parameters

    @property
    def buffer(self) -> Tensor:
        """A tensor of the type and size of what is reduced."""
        return torch.empty(
            sum(p.numel() for p in self.parameters), dtype=self.parameters[0].dtype, device="meta"
        )

    def check(self) -> None:
        """Raises InvalidArgument for a gradient that cannot be packed."""
        for parameter in self.parameters:
            if parameter.grad is not None and parameter.grad.layout is not torch.strided:
                raise InvalidArgument(
                    f"the gradient of a parameter of shape {list(parameter.shape)} is sparse, and replicas "
                    "reduce dense ones only; set it to None, or to its to_dense()"
                )

    def clear(self) -> None:
        """Sets every gradient to None."""
        for parameter in self.parameters:
            parameter.grad = None


class FlatBucket(Bucket):
    """Parameters of one type, and the flat buffer of their gradients.

    When a step begins, a parameter without ``.grad`` is given a zeroed view of the buffer and keeps it from
    then on, so that nothing is packed. Any other ``.grad``, set by the user, is packed into the buffer before
    the reduction and unpacked after it. With a wire type all gradients are packed into a second buffer, which
    is reduced instead.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], wire: torch.dtype | None) -> None:
        super().__init__(parameters)
        dtype, device = parameters[0].dtype, parameters[0].device
        # After the gradients a flag for each: 1 if this replica has a gradient, 0 if not.
        tensors = [*parameters, torch.empty(len(parameters), dtype=dtype, device=device)]
        self._layout = Layout.of(tensors)
        self._buffer = torch.zeros(self._layout.nbytes, dtype=torch.uint8, device=device)
        # Views share one version counter. The tensor from .data has its own, which shows whether it was
        # changed.
        views = map(_strided_like, self._layout.views(self._buffer), tensors)
        self._views = [view.data for view in views]
        self._addresses = [view.data_ptr() for view in self._views]
        self._cast: Packer | None = None
        if wire not in (None, dtype):
            self._layout = Layout.of(tensors, wire)
            self._buffer = torch.zeros(self._layout.nbytes, dtype=torch.uint8, device=device)
            self._cast = packer(self._layout, self._views)
        self._packer: Packer | None = None  # of the step
        self._zeroed: dict[int, int] = {}  # version of the view, by parameter without gradient
        self._absent: list[int] = []  # parameters without gradient at the reduction
        self._sent: list[tuple[int, int] | None] = []  # the gradients that are reduced
        self._work: Work | None = None
        self._began = 0

    @property
    def times(self) -> tuple[int, int]:
        """When the last reduction began and ended, in nanoseconds of time.monotonic_ns."""
        assert self._work is not None
        return self._began, self._work.ended

    @property
    def buffer(self) -> Tensor:
        """The tensor that is reduced."""
        return self._buffer.view(self._layout.slots[0].wire)

    @property
    def nbytes(self) -> int:
        """Bytes that are reduced."""
        return self._layout.nbytes

    @property
    def memory(self) -> int:
        """Address of the buffer that the gradients are views of."""
        return self._views[-1].untyped_storage().data_ptr()

    def clone_misplaced(self, buffers: Collection[int]) -> None:
        """Clones gradients that lie in ``buffers`` where another parameter's gradient belongs."""
        for i, parameter in enumerate(self.parameters):
            grad = parameter.grad
            if grad is not None and self._is_foreign(i, grad) and grad.untyped_storage().data_ptr() in buffers:
                parameter.grad = grad.clone()

    def bind(self) -> None:
        """Gives each parameter without gradient a zeroed view of the buffer to accumulate into."""
        empty = [i for i, parameter in enumerate(self.parameters) if parameter.grad is None]
        if empty:
            torch._foreach_zero_([self._views[i] for i in empty])
        for i in empty:
            self.parameters[i].grad = self._views[i]
        self._zeroed = {i: self._views[i]._version for i in empty}

    def launch(self, member: Member) -> None:
        """Begins to reduce the gradients as they are now."""
        foreign: dict[int, Tensor] = {}
        self._absent = []
        for i, parameter in enumerate(self.parameters):
            if parameter.grad is None:
                self._views[i].zero_()
                self._absent.append(i)
            elif self._is_untouched(i):
                self._absent.append(i)
            elif self._is_foreign(i, parameter.grad):
                foreign[i] = parameter.grad
        self._views[-1].fill_(1)
        for i in self._absent:
            self._views[-1][i] = 0
        self._packer = self._packer_for(foreign)
        if self._packer is not None:
            self._packer.pack(self._buffer)
        self._sent = self._stamps()
        self._began = time.monotonic_ns()
        self._work = member.all_reduce(self.buffer)

    def finish(self, timeout: float) -> None:
        """Waits for the reduction; then each ``.grad`` is the mean, or None if no replica has one."""
        assert self._work is not None
        self._work.wait(timeout)
        if self._stamps() != self._sent:
            raise PipelineError(
                "a gradient changed after the last backward of its parameter's stage, too late for the other "
                "replicas; use a parameter inside its stage alone, neither in another stage nor for the inputs"
            )
        if self._packer is not None:
            self._packer.unpack(self._buffer)
        *_, present = self._views
        for i in self._absent:
            self.parameters[i].grad = self._views[i] if present[i] else None

    def finish_unreduced(self) -> None:
        """Ends a step that reduces nothing: parameters that no backward reached have no gradient again."""
        for i in self._zeroed:
            if self._is_untouched(i):
                self.parameters[i].grad = None

    def _is_untouched(self, i: int) -> bool:
        """Whether the gradient of parameter ``i`` is the zeroed view that the step began with."""
        grad, view = self.parameters[i].grad, self._views[i]
        # A write through .data does not change the version.
        return grad is view and grad._version == self._zeroed.get(i) and not view.any()

    def _is_foreign(self, i: int, grad: Tensor) -> bool:
        """Whether the gradient of parameter ``i`` is not in its place in the buffer."""
        return grad.data_ptr() != self._addresses[i] or grad.stride() != self._views[i].stride()

    def _packer_for(self, foreign: dict[int, Tensor]) -> Packer | None:
        """Packs the gradients of the step; None if they all lie in the buffer that is reduced."""
        if not foreign:
            return self._cast
        tensors = foreign if self._cast is None else dict(enumerate(self._views)) | foreign
        slots = tuple(self._layout.slots[i] for i in tensors)
        return packer(Layout(slots, self._layout.nbytes), list(tensors.values()))

    def _stamps(self) -> list[tuple[int, int] | None]:
        """Identity and version of each gradient, to notice that one was replaced or changed."""
        grads = (parameter.grad for parameter in self.parameters)
        return [None if grad is None else (id(grad), grad._version) for grad in grads]


def _strided_like(view: Tensor, parameter: Tensor) -> Tensor:
    """The same memory with the strides of ``parameter`` if it is dense, as autograd expects of its gradient."""
    dense = torch.empty_like(parameter, device="meta").stride() == parameter.stride()
    return view.as_strided(parameter.shape, parameter.stride()) if dense else view


def group_for_buckets(parameters: Iterable[nn.Parameter], bucket_bytes: int) -> list[list[nn.Parameter]]:
    """Groups of one type each and at most ``bucket_bytes``; a larger parameter gets a group of its own."""
    groups: list[list[nn.Parameter]] = []
    filling: dict[torch.dtype, tuple[list[nn.Parameter], int]] = {}
    for parameter in parameters:
        room = aligned(parameter.nbytes) + parameter.itemsize
        group, nbytes = filling.get(parameter.dtype, ([], bucket_bytes))
        if nbytes + room > bucket_bytes:
            group, nbytes = [], 0
            groups.append(group)
        group.append(parameter)
        filling[parameter.dtype] = (group, nbytes + room)
    return groups
