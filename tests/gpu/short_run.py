"""Ten steps of a small perceptron, eagerly and as graphs, for compute-sanitizer to watch; no test."""

import itertools

import torch
from torch import nn

import pipeline_ext as pe


def main() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(16, 32, device="cuda:0"), torch.randn(16, 32, device="cuda:0")
    for graphs, trace in itertools.product((False, True), repeat=2):
        model = nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 32), nn.GELU())
        with pe.Pipeline(
            model,
            num_stages=2,
            microbatches=4,
            loss_fn=nn.functional.mse_loss,
            devices=["cuda:0", "cuda:0"],
            graphs=graphs,
            trace=trace,
        ) as pipe:
            for _ in range(10):
                model.zero_grad()
                loss = pipe.step(x, target=y)
            assert loss.isfinite()
            if graphs and pipe.graph.fallback:
                raise SystemExit(f"graph mode ran eagerly: {pipe.graph.fallback}")
    torch.cuda.synchronize()
    print("ok")


if __name__ == "__main__":
    main()
