"""What to call instead, where an object is used like the module that it was made of."""

import sys
from typing import Any, NoReturn

from ..errors import PipelineError

_MOVES = "give devices= to Pipeline, which moves the stages"
_CASTS = "cast the model before it is given to Pipeline, or call step inside torch.autocast"
_INSTEAD = {
    "train": "call train() or eval() of the model, whose modes the stages follow",
    "forward": "call pipe.step(...) to train, or pipe.eval(...) for the output",
    **dict.fromkeys(("to", "cuda", "cpu", "xpu"), _MOVES),
    **dict.fromkeys(("half", "float", "double", "bfloat16"), _CASTS),
    "generate": "call generate() of the model, which needs all stages in this process",
    "save_pretrained": "call save_pretrained() of the model, or pipeline_ext.save_pretrained(pipe, folder), "
    "which gathers it from all processes",
    "requires_grad_": "call requires_grad_() of the model before it is given to Pipeline",
}


class NotAModule(PipelineError, AttributeError):
    """A pipeline does not have this method of modules. An AttributeError, so that ``hasattr`` is False."""


def instead(name: str) -> AttributeError:
    """The error for an attribute that a pipeline does not have."""
    if name in _INSTEAD:
        return NotAModule(f"a Pipeline has no {name}(); {_INSTEAD[name]}")
    return AttributeError(f"'Pipeline' object has no attribute {name!r}")


class NoModule:
    """Refuses to be called, copied, or prepared by Accelerate, as if it were a module."""

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise PipelineError(
            "a Pipeline is not called: pipe.step(...) runs a batch forward and backward and returns the loss, "
            "pipe.eval(...) returns the output without gradients"
        )

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise PipelineError(
            "a Pipeline has threads, streams and connections, and cannot be copied or pickled; copy the model, "
            "as AveragedModel(model) or copy.deepcopy(model) do, and save it with save_checkpoint, or its "
            "state_dict()"
        )

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """``Accelerator.prepare`` returns what it does not know as it is; it asks here for the class of all."""
        caller = sys._getframe(1)
        if caller.f_code.co_name == "prepare" and caller.f_globals.get("__name__") == "accelerate.accelerator":
            raise PipelineError(
                "Accelerator.prepare knows no Pipeline; prepare the optimizer, the data loader and the "
                "scheduler beside it. For mixed precision prepare the model with prepare_model(model, "
                "evaluation_mode=True) before it is given to Pipeline, or call step inside torch.autocast"
            )
        return type(self)
