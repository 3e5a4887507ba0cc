"""Parameters that several stages hold.

Two threads' backwards must not add to one ``.grad``, and the sum must not depend on which came first. So each
stage that holds such a parameter works on an alias of it, which has the same memory and a ``.grad`` of its
own; when the step has ended these are added up in the order of the stages.
"""

from collections.abc import Sequence

from torch import Tensor, nn


class SharedParameters:
    """The parameters that several of ``modules`` hold. Hooks on them are not called in a step."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        holders: dict[nn.Parameter, list[int]] = {}
        for stage, module in enumerate(modules):
            for parameter in module.parameters():
                holders.setdefault(parameter, []).append(stage)
        self._holders = {p: stages for p, stages in holders.items() if len(stages) > 1}
        self._names = [
            {
                name: parameter
                for name, parameter in module.named_parameters()
                if parameter in self._holders
            }
            for module in modules
        ]
        self._aliases: dict[nn.Parameter, dict[int, nn.Parameter]] = {}

    def begin(self) -> list[dict[str, Tensor]]:
        """For each stage, the alias of each shared parameter by its name in the stage's module."""
        self._aliases = {
            parameter: {
                stage: nn.Parameter(parameter.detach(), requires_grad=parameter.requires_grad)
                for stage in stages
            }
            for parameter, stages in self._holders.items()
        }
        return [
            {name: self._aliases[parameter][stage] for name, parameter in names.items()}
            for stage, names in enumerate(self._names)
        ]

    def end(self) -> None:
        """Adds each stage's gradients to those of the parameters."""
        for parameter, aliases in self._aliases.items():
            for alias in aliases.values():
                if alias.grad is None:
                    continue
                if parameter.grad is None:
                    parameter.grad = alias.grad
                else:
                    parameter.grad.add_(alias.grad)
        self._aliases = {}
