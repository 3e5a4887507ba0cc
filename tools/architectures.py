#!/usr/bin/env python3
"""Which models of transformers are cut into stages rightly.

    tools/architectures.py names [--all] [--only REGEX]
    tools/architectures.py make [--all] [--only REGEX] --out FILE.json
    tools/architectures.py sweep [--stages 2] [--only REGEX] --out FILE.json
    tools/architectures.py table --of FILE.json

`make` says which classes can be made tiny, and why not; `sweep` cuts each of them into stages and compares its
gradients with plain autograd's over the same microbatches. Each runs in a process of its own: one that hangs or
dies stops nothing. The models are those of tiny_models.py.
"""

import argparse
import contextlib
import copy
import json
import os
import re
import resource
import signal
import textwrap
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path

import torch
import transformers
from tiny_models import NAMES, ROWS, candidates, make

import pipeline_ext as pe

PAGE = Path(__file__).parents[1] / "docs" / "architectures.md"
SECONDS, BYTES = 60, 8 << 30  # of one class


def has_rows(value):
    return isinstance(value, torch.Tensor) and value.dim() and len(value) % ROWS == 0


def gradients(model, inputs, microbatches=1):
    """Loss and gradients of plain autograd over the microbatches."""
    model.zero_grad(set_to_none=True)
    losses = []
    for i in range(microbatches):
        rows = {k: v.chunk(microbatches)[i] if has_rows(v) else v for k, v in inputs.items()}
        loss = model(**rows).loss
        (loss / microbatches).backward()
        losses.append(loss.detach())
    return torch.stack(losses), {n: p.grad for n, p in model.named_parameters()}


def fault_of(model, inputs):
    """None, or why this class does not count."""
    loss = getattr(copy.deepcopy(model)(**inputs), "loss", None)
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
        return f"no loss: {type(loss).__name__} {getattr(loss, 'shape', '')}"
    (loss, grads), (again_loss, again) = (gradients(copy.deepcopy(model), inputs, 4) for _ in range(2))
    if not loss.isfinite().all():
        return "the loss is not finite"
    if not torch.equal(loss, again_loss):
        return "another loss the second time"
    if loss.dim() != 1:
        return f"a loss of shape {tuple(loss.shape[1:])}"
    reached = {n: g for n, g in grads.items() if g is not None}
    if not any(g.any() for g in reached.values()):
        return "no gradient"
    for n, g in reached.items():
        if not g.isfinite().all():
            return f"the gradient of {n} is not finite"
        if not torch.equal(g, again[n]):
            return f"another gradient of {n} the second time"
    return None


def run_make(name, _):
    fault = fault_of(*make(name))
    return {"result": "not made", "message": fault} if fault else {"result": "made"}


def run_pipeline(model, inputs, stages):
    with pe.Pipeline(model, num_stages=stages, microbatches=4, sample=inputs) as pipe:
        return pipe.step(**inputs)


def run_sweep(name, arguments):
    model, inputs = make(name)
    if fault := fault_of(model, inputs):
        return {"result": "not made", "message": fault}
    reference = copy.deepcopy(model)
    losses, expected = gradients(reference, inputs, 4)
    try:
        loss = run_pipeline(model, inputs, arguments.stages)
    except Exception as error:
        frames = traceback.extract_tb((error.__cause__ or error).__traceback__)
        place = [f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in frames[-3:]]
        # A step's error of the engine's own has no cause; with one, the model's own code went wrong in a stage.
        refused = isinstance(error, pe.PipelineError) and not error.__cause__
        cause = error.__cause__ or error
        return {
            "result": "refused" if refused else "crashed",
            "message": f"{type(cause).__name__}: {cause}"[:600],
            "at": place,
        }
    return compare(model, reference, expected, loss, losses)


def compare(model, reference, expected, loss, losses):
    worst, where, same = 0.0, "", True
    for n, p in model.named_parameters():
        if (p.grad is None and expected[n] is None) or not p.numel():
            continue
        if p.grad is None or expected[n] is None:
            # A zero gradient and none are told apart: an optimizer with weight decay does.
            off, note = (
                (9.0, "none instead of a gradient") if p.grad is None else (8.0, "a gradient instead of none")
            )
            same = False
            if off > worst:
                worst, where = off, f"{n}: {note}"
            continue
        same = same and torch.equal(p.grad, expected[n])
        off = float((p.grad - expected[n]).abs().max() / expected[n].abs().max().clamp(min=1e-30))
        if off > worst or off != off:
            worst, where = off, n
    found = {"result": "right" if same else "tied" if worst < 1e-6 else "wrong", "worst": worst, "where": where}
    if isinstance(loss, torch.Tensor) and not torch.allclose(loss.detach().mean(), losses.mean(), rtol=1e-5):
        found |= {"result": "wrong", "loss": [float(loss.detach().mean()), float(losses.mean())]}
    other = dict(reference.named_buffers())
    changed = [n for n, b in model.named_buffers() if n in other and not torch.equal(b, other[n])]
    return found | ({"buffers": changed[:3]} if changed else {})


def in_a_process(task, name, arguments):
    """What the task returns, run in a fork with limits on time and memory."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        with contextlib.suppress(BaseException):
            os.close(read)
            resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            os.dup2(null, 2)
            try:
                found = task(name, arguments)
            except BaseException as error:
                frames = [
                    f"{Path(f.filename).name}:{f.lineno} {f.name}"
                    for f in traceback.extract_tb(error.__traceback__)
                ]
                found = {
                    "result": "not made",
                    "message": f"{type(error).__name__}: {error}"[:600],
                    "at": frames[-3:],
                }
            os.write(write, json.dumps(found).encode())
        os._exit(0)
    os.close(write)
    return child, read


def run_all(task, names, arguments):
    """The results by name, written after each one; at most so many processes at a time."""
    out, found, running, todo = Path(arguments.out), {}, {}, list(names)
    make("LlamaForCausalLM")  # imports here what each fork would import anew, in seconds
    pe.Pipeline  # noqa: B018  (its own imports are late ones)
    if arguments.resume and out.exists():
        found = json.loads(out.read_text())
        todo = [name for name in todo if name not in found]
    while todo or running:
        while todo and len(running) < arguments.jobs:
            name = todo.pop(0)
            running[name] = (*in_a_process(task, name, arguments), time.monotonic())
        time.sleep(0.02)
        for name, (child, read, began) in list(running.items()):
            late = time.monotonic() - began > SECONDS
            if late:
                os.kill(child, signal.SIGKILL)
            if late or os.waitpid(child, os.WNOHANG)[0]:
                if late:
                    os.waitpid(child, 0)
                with os.fdopen(read, "rb") as pipe:
                    text = pipe.read()
                ended = {
                    "result": "crashed",
                    "message": f"no end in {SECONDS} s" if late else "the process died",
                }
                found[name] = (json.loads(text) if text else ended) | {
                    "seconds": round(time.monotonic() - began, 1)
                }
                del running[name]
                out.write_text(json.dumps(found, indent=1))
                line = {k: v for k, v in found[name].items() if k not in ("result", "seconds")}
                print(f"{found[name]['result']:9} {name} {str(line)[:300] if line else ''}", flush=True)
    print(dict(Counter(one["result"] for one in found.values())))
    return found


INTRODUCTION = (
    "Made by `tools/architectures.py sweep` and `table`: tiny models of transformers {} with random weights "
    "and every class's own defaults, without dropout, in two stages and four microbatches, beside plain "
    "autograd over the same microbatches. A name with `+router` returns the router's logits, whose loss enters "
    "the model's."
)


def page(found):
    """The page of the documentation."""
    tried = {name: one for name, one in found.items() if one["result"] != "not made"}
    by_result = {
        result: sorted(name for name, one in tried.items() if one["result"] == result)
        for result in ("right", "tied", "refused", "crashed", "wrong")
    }
    counts = {result: len(names) for result, names in by_result.items()}
    others = [*by_result["refused"], *by_result["crashed"], *by_result["wrong"]]
    rows = [
        f"| {name} | {tried[name]['result']} | {tried[name].get('message', '').partition(chr(10))[0][:160]} |"
        for name in others
    ]
    return "\n".join(
        [
            "# Architectures",
            "",
            *textwrap.wrap(INTRODUCTION.format(transformers.__version__), 110),
            "",
            "| outcome | models |",
            "|---|---|",
            f"| the bits of plain autograd | {counts['right']} |",
            f"| within 1e-6, as a tied weight's sum | {counts['tied']} |",
            f"| refused, or stopped with an error | {counts['refused'] + counts['crashed']} |",
            f"| wrong | {counts['wrong']} |",
            "",
            *(["| not right | outcome | why |", "|---|---|---|", *rows, ""] if others else []),
            "## The bits of plain autograd",
            "",
            *textwrap.wrap(", ".join(by_result["right"]), 110),
            "",
            "## Within 1e-6",
            "",
            *textwrap.wrap(", ".join(by_result["tied"]), 110),
            "",
        ]
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["names", "make", "sweep", "table"])
    parser.add_argument("--only", default="", metavar="REGEX")
    parser.add_argument("--all", action="store_true", help="every candidate, not only those once made")
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--resume", action="store_true", help="keep what the file has")
    parser.add_argument("--out", metavar="FILE.json")
    parser.add_argument("--of", metavar="FILE.json", help="the results of a sweep")
    arguments = parser.parse_args()
    if arguments.what == "table":
        if not arguments.of:
            parser.error("--of names the results of a sweep")
        PAGE.write_text(page(json.loads(Path(arguments.of).read_text())))
        return
    names = [n for n in (candidates() if arguments.all else NAMES) if re.search(arguments.only, n)]
    if arguments.what == "names":
        print("\n".join(names))
        return
    if not arguments.out:
        parser.error("--out says where the results go")
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    run_all(run_make if arguments.what == "make" else run_sweep, names, arguments)


if __name__ == "__main__":
    main()
