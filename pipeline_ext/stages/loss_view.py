"""What a loss function sees of a model whose stages run at the same time.

It sees each parameter once, also where stages run on aliases of a tied one. If it adds a penalty on weights of
other stages, it sees aliases of these: their gradients are added when the step has ended, since the other
stages' own threads add to the parameters' meanwhile.
"""

import contextlib
from collections.abc import Sequence

from torch import nn

from .aliases import alias
from .gradients import add_gradient
from .parameter_view import prepare, shown
from .shared_parameters import SharedParameters


class LossView:
    """The view of the loss function of one process that has all stages."""

    def __init__(self, shared: SharedParameters, others: Sequence[nn.Module]) -> None:
        """``others``: the modules of the other stages."""
        self._shared = shared
        self._others = others
        self._aliases: dict[nn.Parameter, nn.Parameter] = {}
        self._seen: dict[nn.Parameter, nn.Parameter] = {}
        self._of_others = False

    def show_others(self) -> bool:
        """Shows aliases of other stages' parameters from now on; False if it did so already."""
        if self._of_others:
            return False
        prepare(layer for module in self._others for layer in module.modules())
        self._of_others = True
        self._make_aliases()
        return True

    def begin(self) -> None:
        """Prepares for a step, when the stages have their aliases."""
        self._make_aliases()

    @property
    def differs(self) -> bool:
        """Whether the loss function would see anything but the parameters themselves."""
        return bool(self._seen)

    def shown(self) -> contextlib.AbstractContextManager[None]:
        """The loss function runs inside it."""
        return shown(self._seen)

    def end(self) -> None:
        """Adds the gradients of the aliases to those of the parameters."""
        for parameter, of_loss in self._aliases.items():
            if of_loss.grad is not None:
                add_gradient(parameter, of_loss.grad)
        self._aliases, self._seen = {}, {}

    def _make_aliases(self) -> None:
        others = (p for module in self._others for p in module.parameters())
        self._aliases = {p: alias(p) for p in others} if self._of_others else {}
        of_tied = {of_stage: self._aliases.get(p, p) for of_stage, p in self._shared.originals().items()}
        self._seen = {**of_tied, **self._aliases}
