"""Predicted and true effects of edges and nodes on Cora, unlearning, and adversarial edges.

python -m experiments.graphs.run --data-root FOLDER            # all parts: minutes of one core
python -m experiments.graphs.run sgc --data-root FOLDER        # or unlearning, steps, attack, ...

Each part writes results/<part>.json, from which table.py makes the tables of the README.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from scipy.stats import pearsonr, spearmanr
from torch import Tensor

from experiments.graphs import closed_form
from experiments.graphs.cora import (
    SGC,
    Graph,
    Layers,
    accuracy,
    ids,
    load,
    loader_of,
    node_losses,
    record,
    train_again,
)
from experiments.graphs.steps import steps
from tda_lightning import AttributionModule, Trajectory
from tda_lightning.edits import AddEdges, Removal, RemoveEdges, RemoveNodes
from tda_lightning.estimators import InfluenceFunction
from tda_lightning.evaluation import compare_unlearned, detection_auc, membership
from tda_lightning.solvers import ConjugateGradients
from tda_lightning.tasks import Nodes

RESULTS = Path(__file__).parent / "results"
COMPONENTS = 256
STEPS = 200
DAMPING = 1e-3


def main() -> None:
    """The parts that are named, or all of them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--data-root", required=True, help="folder of the data sets")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name in options.parts or PARTS:
        if name not in PARTS:
            parser.error(f"expected parts among {', '.join(PARTS)}, got {name}")
        began = time.process_time()
        with tempfile.TemporaryDirectory() as folder:
            found = PARTS[name](options.data_root, Path(folder))
        found["processor_seconds"] = round(time.process_time() - began, 1)
        keep(name, found)
        print(name, json.dumps({key: v for key, v in found.items() if key != "points"}))


def keep(name: str, found: dict[str, Any]) -> None:
    """Write the results of a part."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def rows_of(name: str) -> list[dict[str, Any]]:
    """What a part has measured so far: it goes on from there."""
    path = RESULTS / f"{name}.json"
    rows: list[dict[str, Any]] = []
    if path.exists():
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    return rows


def edges_of(graph: Graph) -> list[tuple[int, int]]:
    """Each undirected edge once."""
    pairs = graph["edge_index"].T
    return [(u, v) for u, v in pairs[pairs[:, 0] < pairs[:, 1]].tolist()]


def sgc(root: str, folder: Path, edges: int = 100, decay: float = 2e-3) -> dict[str, Any]:
    """Predicted and retrained change of the validation loss: a sample of edges, and every training
    node."""
    graph = load(root, COMPONENTS, torch.float64)
    train, val = ids(graph, "train"), ids(graph, "val")
    torch.manual_seed(0)
    module = SGC(COMPONENTS, decay).double()
    path = record(module, graph, 1500, folder / "sgc")
    features = closed_form.propagated(graph)
    best = closed_form.optimum(features[train], graph["y"][train], decay, len(train))
    trained = module.linear.weight.detach().T
    own = torch.Generator().manual_seed(0)
    present = edges_of(graph)
    sample = [present[n] for n in torch.randperm(len(present), generator=own)[:edges].tolist()]
    edits = {
        "edges": [RemoveEdges([edge]) for edge in sample],
        "nodes": [RemoveNodes([node]) for node in train.tolist()],
    }
    response = closed_form.responses(graph, trained, decay, val)
    estimator = InfluenceFunction("exact", damping=0.0)
    before = closed_form.summed_gradient(graph, trained, train)
    base = loss_at(graph, features, best, val)
    found: dict[str, Any] = {
        "distance_to_optimum": float((trained - best).norm() / best.norm()),
        "test_accuracy": accuracy(module, graph, ids(graph, "test")),
    }
    for kind, some in edits.items():
        scores = AttributionModule(module, path, estimator).attribute(
            loader_of(graph), Nodes(graph, val), edits=some
        )
        ours, through = scores.values.mean(0), scores.through_weights.mean(0)
        exact, truth, moved = [], [], []
        for edit in some:
            changed = edit.applied(graph)
            left = train[~torch.isin(train, edit.removed())]
            delta = before - closed_form.summed_gradient(changed, trained, left)
            exact.append(float((response * delta).sum()) / len(train))
            rows = closed_form.propagated(changed)
            weights = closed_form.optimum(
                rows[left], graph["y"][left], decay, len(train), weights=best
            )
            truth.append(loss_at(changed, rows, weights, val) - base)
            moved.append(loss_at(graph, features, weights, val) - base)
        found[kind] = {
            "count": len(some),
            "whole": agreement(ours, torch.tensor(truth)),
            "by way of the weights": agreement(through, torch.tensor(moved)),
            "without the direct term, against the whole": agreement(through, torch.tensor(truth)),
            "closed form against ours": float(
                (torch.tensor(exact, dtype=through.dtype) - through).norm() / through.norm()
            ),
        }
    return found


def loss_at(graph: Graph, features: Tensor, weights: Tensor, nodes: Tensor) -> float:
    """Mean cross entropy of some nodes."""
    logits = features[nodes] @ weights
    return float(torch.nn.functional.cross_entropy(logits, graph["y"][nodes]))


def agreement(predicted: Tensor, truth: Tensor) -> dict[str, float]:
    """Correlations, and the slope of the truth over the prediction."""
    one, other = predicted.double().numpy(), truth.double().numpy()
    slope = float((one * other).sum() / (one * one).sum())
    return {
        "pearson": float(pearsonr(one, other).statistic),
        "spearman": float(spearmanr(one, other).statistic),
        "slope": slope,
    }


def unlearning(root: str, folder: Path, seeds: int = 3) -> dict[str, Any]:
    """5 and 10% of edges, and of training nodes, unlearned: against training again, and against
    influence functions without the graph's part."""
    graph = load(root, COMPONENTS)
    rows = rows_of("unlearning")
    done = {(row["model"], row["seed"]) for row in rows}
    for seed in range(seeds):
        for kind in ("GCN", "GAT", "GIN"):
            if (kind, seed) in done:
                continue
            own = []
            torch.manual_seed(seed)
            module = Layers(kind, COMPONENTS)
            initial = copy.deepcopy(module.state_dict())
            path = record(module, graph, STEPS, folder / f"{kind}{seed}")
            for what in ("edges", "nodes"):
                for share in (0.05, 0.1):
                    row = unlearn(module, initial, path, graph, what, share, seed)
                    own.append({"model": kind, "seed": seed, **row})
                    print(json.dumps(own[-1]), flush=True)
            rows += own
            keep("unlearning", {"rows": rows})
    return {"rows": rows}


def unlearn(
    module: Layers, initial: Any, path: str, graph: Graph, what: str, share: float, seed: int
) -> dict[str, Any]:
    """One request: what the unlearned weights are worth."""
    own = torch.Generator().manual_seed(seed)
    train, test = ids(graph, "train"), ids(graph, "test")
    edits: list[Any]
    if what == "edges":
        present = edges_of(graph)
        chosen = torch.randperm(len(present), generator=own)[: round(share * len(present))]
        edits = [RemoveEdges([present[n] for n in chosen.tolist()])]
        plain, gone = [], train[:0]
    else:
        places = torch.randperm(len(train), generator=own)[: round(share * len(train))].tolist()
        edits = [RemoveNodes(train[places].tolist())]
        plain, gone = [Removal(place) for place in places], train[places]
    solver = ConjugateGradients(curvature="gauss_newton", tolerance=1e-4, iterations=100)
    estimator = InfluenceFunction(damping=DAMPING, solver=solver)
    attribution = AttributionModule(module, path, estimator)
    began = time.process_time()
    forgetful = attribution.unlearned(loader_of(graph), edits)
    seconds = time.process_time() - began
    # Without the graph's part an edge is in no example's gradient.
    without = attribution.unlearned(loader_of(graph), plain) if plain else module
    changed = edits[0].applied(graph)
    left = train[~torch.isin(train, gone)]
    began = time.process_time()
    retrained = train_again(module, initial, changed, left, len(train), STEPS)
    again = time.process_time() - began
    measures = {"test accuracy": lambda own: accuracy(own, changed, test)}
    if len(gone):
        measures["membership of the removed"] = lambda own: membership(
            node_losses(own, graph, gone), node_losses(own, graph, test)
        )
    report = compare_unlearned(module, forgetful, retrained, measures, (seconds, again))
    other = compare_unlearned(module, without, retrained, {})
    return {
        "what": what,
        "share": share,
        "recovered": report.recovered,
        "recovered without the graph's part": other.recovered,
        "measures": report.measures,
        "speedup": report.speedup,
        "seconds": [seconds, again],
    }


def attack(root: str, folder: Path, seeds: int = 3) -> dict[str, Any]:
    """Attacks on models of several seeds."""
    rows = rows_of("attack")
    done = {row["seed"] for row in rows}
    for seed in range(seeds):
        if seed not in done:
            rows.append({"seed": seed, **attacked_once(root, folder / str(seed), seed)})
            print(json.dumps(rows[-1]), flush=True)
            keep("attack", {"rows": rows})
    return {"rows": rows}


def attacked_once(
    root: str, folder: Path, seed: int, candidates: int = 400, added: int = 60, others: int = 500
) -> dict[str, Any]:
    """Edges that raise the validation loss most by their scores are added; then these and a sample
    of the other edges are scored on the attacked graph, and those that hurt most are removed and
    unlearned."""
    graph = load(root, COMPONENTS)
    val, test, train = (ids(graph, name) for name in ("val", "test", "train"))
    estimator = InfluenceFunction("ekfac")
    torch.manual_seed(seed)
    module = Layers("GCN", COMPONENTS)
    initial = copy.deepcopy(module.state_dict())
    path = record(module, graph, STEPS, folder / "clean")
    clean = accuracy(module, graph, test)
    own = torch.Generator().manual_seed(seed)
    present, absent = set(edges_of(graph)), []
    while len(absent) < candidates:
        u, v = sorted(torch.randint(0, len(graph["y"]), (2,), generator=own).tolist())
        if u != v and (u, v) not in present and graph["y"][u] != graph["y"][v]:
            absent.append((u, v))
            present.add((u, v))
    scores = AttributionModule(module, path, estimator).attribute(
        loader_of(graph), Nodes(graph, val), edits=[AddEdges([edge]) for edge in absent]
    )
    chosen = scores.values.mean(0).argsort(descending=True)[:added].tolist()
    bad = [absent[n] for n in chosen]
    attacked = AddEdges(bad).applied(graph)
    victim = train_again(module, initial, attacked, train, len(train), 0)
    path = record(victim, attacked, STEPS, folder / "attacked")
    good = [edge for edge in edges_of(attacked) if edge not in set(bad)]
    order = torch.randperm(len(good), generator=own)[:others].tolist()
    every = [*bad, *(good[number] for number in order)]
    began = time.process_time()
    found = AttributionModule(victim, path, estimator).attribute(
        loader_of(attacked), Nodes(attacked, val), edits=[RemoveEdges([edge]) for edge in every]
    )
    seconds = time.process_time() - began
    is_bad = torch.tensor([edge in set(bad) for edge in every])
    rows: dict[str, Any] = {}
    for name, values in {
        "both": found.values,
        "direct": found.direct,
        "by way of the weights": found.through_weights,
    }.items():
        hurt = -values.mean(0)  # removing it lowers the validation loss
        top = hurt.argsort(descending=True)[:added]
        rows[name] = {
            "auc": detection_auc(hurt, is_bad),
            "precision": float(is_bad[top].float().mean()),
        }
    top = (-found.values.mean(0)).argsort(descending=True)[:added].tolist()
    removal = RemoveEdges([every[n] for n in top])
    solver = ConjugateGradients(curvature="gauss_newton", tolerance=1e-4, iterations=100)
    attribution = AttributionModule(victim, path, InfluenceFunction(damping=DAMPING, solver=solver))
    mended = removal.applied(attacked)
    unlearned = attribution.unlearned(loader_of(attacked), [removal])
    retrained = train_again(module, initial, mended, train, len(train), STEPS)
    return {
        "added": added,
        "edges": len(every),
        "found": rows,
        "scoring_seconds": seconds,
        "test accuracy": {
            "clean": clean,
            "attacked": accuracy(victim, attacked, test),
            "edges removed, weights as they were": accuracy(victim, mended, test),
            "edges removed and unlearned": accuracy(unlearned, mended, test),
            "trained again without them": accuracy(retrained, mended, test),
        },
    }


def speed(root: str, folder: Path, edges: int = 2000) -> dict[str, Any]:
    """2000 edges of the full features, for a GCN and all validation nodes."""
    graph = load(root, None)
    torch.manual_seed(0)
    module = Layers("GCN", graph["x"].shape[1])
    path = record(module, graph, 50, folder / "speed")
    own = torch.Generator().manual_seed(0)
    present = edges_of(graph)
    some = [present[n] for n in torch.randperm(len(present), generator=own)[:edges].tolist()]
    scores = AttributionModule(module, path, InfluenceFunction("ekfac")).attribute(
        loader_of(graph), Nodes(graph, ids(graph, "val")), edits=[RemoveEdges([e]) for e in some]
    )
    assert Trajectory.load(path).last_step == 50
    return {"edges": edges, "processor": scores.provenance["processor_seconds"]}


PARTS = {"sgc": sgc, "unlearning": unlearning, "steps": steps, "attack": attack, "speed": speed}

if __name__ == "__main__":
    main()
