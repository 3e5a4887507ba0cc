"""The command, whose process 1 kills itself in the middle of a step: a number, given before the arguments."""

import os
import signal
import sys

from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_post_hook

from pipeline_ext.cli import main
from pipeline_ext.lm.gpt import Head

steps = microbatches = 0


def count_step(*_):
    global steps
    steps += 1


def count_microbatch(module, _):
    global microbatches
    if isinstance(module, Head) and module.training and steps == int(sys.argv[1]) - 1:
        microbatches += 1
        if microbatches == 2:
            os.kill(os.getpid(), signal.SIGKILL)


if (os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]) == ("1", "0"):
    register_optimizer_step_post_hook(count_step)
    register_module_forward_pre_hook(count_microbatch)
sys.exit(main(sys.argv[2:]))
