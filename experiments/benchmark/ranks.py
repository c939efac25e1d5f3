"""How many directions the queries' gradients of recorded runs have: that many recursions exact
unrolling takes with ``query_tolerance``.

python -m experiments.benchmark.ranks runs/question/mnist ... --output ranks.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap

from experiments.peers.recorded import Run, open_run

TOLERANCES = (0.3, 0.1, 0.03, 0.01, 0.001)


def directions(gradients: Tensor, tolerance: float) -> int:
    """How many leading directions leave no query's gradient, of length 1, a longer rest."""
    rows = gradients / gradients.norm(dim=1, keepdim=True)
    products = rows @ rows.T
    vectors = torch.linalg.eigh(products).eigenvectors.flip(1)
    along = (vectors.T @ products).T * vectors
    left = (products.diagonal()[:, None] - along.cumsum(1)).clamp(min=0).amax(0).sqrt()
    enough = (left <= tolerance).nonzero()
    return int(enough[0]) + 1 if len(enough) else len(rows)


def query_gradients(run: Run) -> Tensor:
    """Of the measurement at the final weights, float64 [query, parameters]."""
    module = run.module.double()
    inputs, targets = next(iter(run.batches(run.query, run.num_query)))

    def loss(parameters: dict[str, Tensor], image: Tensor, target: Tensor) -> Tensor:
        outputs = functional_call(module, parameters, (image[None],))
        return run.losses(outputs, target[None])[0]

    parameters = {name: value.detach() for name, value in module.named_parameters()}
    inputs = inputs.double() if inputs.is_floating_point() else inputs
    targets = targets.double() if targets.is_floating_point() else targets
    found = vmap(grad(loss), (None, 0, 0), chunk_size=10)(parameters, inputs, targets)
    return torch.cat([own.flatten(1) for own in found.values()], dim=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--data-root")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    found = {}
    for folder in arguments.runs:
        run = open_run(folder, arguments.data_root, "cpu")
        gradients = query_gradients(run)
        counts = {f"{tolerance:g}": directions(gradients, tolerance) for tolerance in TOLERANCES}
        found[folder.name] = {"queries": run.num_query, "directions": counts}
    text = json.dumps(found, indent=1)
    print(text)
    if arguments.output is not None:
        arguments.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
