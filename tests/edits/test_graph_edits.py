"""Edits of a graph as columns, against gradients and measurements of the whole graph."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tda_lightning import AttributionModule, Scores, Trajectory
from tda_lightning.edits import (
    AddEdges,
    Removal,
    RemoveEdges,
    RemoveFeatures,
    RemoveNodes,
)
from tda_lightning.estimators import (
    TRAK,
    FastInfluence,
    InfluenceFunction,
    Source,
    TracIn,
    Unrolled,
)
from tda_lightning.records.errors import NonFiniteError, UnsupportedTrainingError
from tda_lightning.runtime.graph_parts import around, bordered_part, inner_part, side_by_side
from tda_lightning.runtime.graphs import edge_index
from tda_lightning.tasks import Nodes, NodeTask
from tests.attributing import relative
from tests.cases.graphs import GCN, SGC, loader_of, propagate, random_graph, train_on
from tests.oracles.estimators import interpolated

GRAPH = random_graph()
TRAIN = GRAPH["train_mask"].nonzero().squeeze(1)
QUERY = GRAPH["val_mask"].nonzero().squeeze(1)
PRESENT = [tuple(e) for e in GRAPH["edge_index"].T.tolist() if e[0] < e[1]]
ABSENT = [(u, v) for u in range(36) for v in range(u + 1, 36) if (u, v) not in PRESENT]
EDITS = [
    RemoveEdges(PRESENT[:1]),
    RemoveEdges([PRESENT[7], PRESENT[20]]),
    RemoveEdges(PRESENT[3:4], directed=True),
    AddEdges(ABSENT[40:41]),
    AddEdges([ABSENT[3], ABSENT[200]]),
    RemoveNodes([int(TRAIN[2])]),
    RemoveNodes([int(QUERY[0]), int(TRAIN[5]), 0]),
    RemoveFeatures([int(TRAIN[1])]),
    RemoveFeatures([4, 9], columns=[0, 3]),
]


@pytest.fixture(scope="module")
def run() -> tuple[dict[str, Any], GCN, Trajectory]:
    torch.manual_seed(0)
    module = GCN()
    return GRAPH, module, train_on(GRAPH, module)


def attribute(
    run: Any, estimator: Any, edits: Any = EDITS, task: Any = None, **options: Any
) -> Scores:
    graph, module, trajectory = run
    query = options.pop("query", Nodes(graph, graph["val_mask"]))
    attribution = AttributionModule(module, trajectory, estimator, task)
    return attribution.attribute(loader_of(graph), query, edits=edits, **options)


def losses(module: nn.Module, graph: Any, nodes: Tensor) -> Tensor:
    return F.cross_entropy(module(graph)[nodes], graph["y"][nodes], reduction="none")


def gradient(module: nn.Module, total: Tensor) -> Tensor:
    found = torch.autograd.grad(total, list(module.parameters()), retain_graph=True)
    return torch.cat([g.flatten() for g in found])


def differences(module: nn.Module, graph: Any = GRAPH) -> Tensor:
    """The gradient before each edit minus that after it, in the whole graph, [edit, parameters]."""
    before = gradient(module, losses(module, graph, TRAIN).sum())
    rows = []
    for edit in EDITS:
        left = TRAIN[~torch.isin(TRAIN, edit.removed())]
        rows.append(before - gradient(module, losses(module, edit.applied(graph), left).sum()))
    return torch.stack(rows)


def query_gradients(module: nn.Module) -> Tensor:
    return torch.stack([gradient(module, loss) for loss in losses(module, GRAPH, QUERY)])


def direct(module: nn.Module) -> Tensor:
    with torch.no_grad():
        before = losses(module, GRAPH, QUERY)
        after = [losses(module, edit.applied(GRAPH), QUERY) for edit in EDITS]
    return torch.stack([one - before for one in after], 1)


def at(run: Any, step: int) -> GCN:
    run[1].load_state_dict({**run[2].checkpoints[step].parameters})
    return run[1].eval()


def test_tracin_takes_gradients_before_minus_after(run: Any) -> None:
    scores = attribute(run, TracIn())
    expected = torch.zeros(10, len(EDITS), dtype=torch.float64)
    for step in (4, 8):
        module = at(run, step)
        expected += 2.0 * query_gradients(module) @ differences(module).T / 14
    assert relative(scores.through_weights, expected) < 1e-10
    assert relative(scores.direct, direct(at(run, 8))) < 1e-10
    assert relative(scores.values, expected + direct(at(run, 8))) < 1e-10
    kinds = [record["kind"] for record in scores.provenance["edits"]]
    assert kinds == [type(edit).__name__ for edit in EDITS]


def test_the_inverse_is_applied_and_not_only_computed(run: Any) -> None:
    """A published mistake: an H^-1 that is computed and not applied. With the identity and damping
    c the score is the plain product over 1 + c plus weight decay."""
    module = at(run, 8)
    plain = query_gradients(module) @ differences(module).T / 14
    for damping in (0.5, 4.0):
        scores = attribute(run, InfluenceFunction("identity", damping=damping))
        assert relative(scores.through_weights, plain / (1 + damping + 0.01)) < 1e-9


def test_source_and_its_recorded_order(run: Any) -> None:
    """With the identity for a curvature both have closed forms."""
    queries, rate, sigma = query_gradients(at(run, 8)), 0.5, 1.01  # weight decay is in sigma
    changes = {step: differences(at(run, step)) / 14 for step in (0, 4, 8)}
    forgotten, taken_in = math.exp(-2 * sigma), (1 - math.exp(-2 * sigma)) / sigma
    expected = queries @ (forgotten * changes[4] + changes[8]).T * taken_in
    averaged = attribute(run, Source(2, curvature="identity"))
    assert relative(averaged.through_weights, expected) < 1e-9
    assert relative(averaged.by_segment.sum(0), averaged.through_weights) < 1e-9
    expected = torch.zeros(10, len(EDITS), dtype=torch.float64)
    for row in range(8):
        left = rate * (1 - rate * sigma) ** (7 - row)
        for step, weight in interpolated([0, 4, 8])(row).items():
            expected += left * weight * queries @ changes[step].T
    recorded = Source(2, order="recorded", curvature="identity")
    assert relative(attribute(run, recorded).through_weights, expected) < 1e-9


def test_unrolling_is_the_derivative_along_the_edit(run: Any) -> None:
    """The derivative of the whole run by the share epsilon of the edited graph in its loss."""
    graph, module, trajectory = run
    shares = torch.zeros(len(EDITS), dtype=torch.float64, requires_grad=True)
    values = {
        n: v.clone().requires_grad_() for n, v in trajectory.checkpoints[0].parameters.items()
    }

    def total(own: Any, changed: Any, nodes: Tensor) -> Tensor:
        outputs = torch.func.functional_call(module, own, (changed,))
        return F.cross_entropy(outputs[nodes], changed["y"][nodes], reduction="sum") / 14

    for _ in range(8):
        loss = before = total(values, graph, TRAIN)
        for share, edit in zip(shares, EDITS, strict=True):
            left = TRAIN[~torch.isin(TRAIN, edit.removed())]
            loss = loss + share * (total(values, edit.applied(graph), left) - before)
        found = torch.autograd.grad(loss, list(values.values()), create_graph=True)
        values = {
            n: v - 0.5 * (g + 0.01 * v) for (n, v), g in zip(values.items(), found, strict=True)
        }
    outputs = torch.func.functional_call(module, values, (graph,))
    measured = F.cross_entropy(outputs[QUERY], graph["y"][QUERY], reduction="none")
    expected = torch.stack([torch.autograd.grad(m, shares, retain_graph=True)[0] for m in measured])
    scores = attribute(run, Unrolled())
    assert relative(scores.through_weights, expected) < 1e-9
    assert relative(scores.direct, direct(at(run, 8))) < 1e-10


def test_removing_a_node_without_edges_is_its_removal() -> None:
    graph = random_graph()
    alone = int(TRAIN[3])
    graph["edge_index"] = graph["edge_index"][:, (graph["edge_index"] != alone).all(0)]
    torch.manual_seed(0)
    module = GCN()
    run = graph, module, train_on(graph, module)
    for estimator in (InfluenceFunction("exact", damping=0.1), Unrolled()):
        edited = attribute(run, estimator, [RemoveNodes([alone])])
        removed = attribute(run, estimator, [Removal(3)])
        assert relative(edited.values, removed.values) < 1e-9


@pytest.mark.parametrize("form", ["dense", "sparse"])
def test_forms_of_the_graph_agree(form: str, run: Any) -> None:
    graph = random_graph(form)
    torch.manual_seed(0)
    module = GCN()
    # A matrix has an edge's ends the other way round, as rows take from columns.
    edits = [edit for edit in EDITS if not getattr(edit, "directed", False)]
    scores = attribute((graph, module, train_on(graph, module)), TracIn(), edits)
    expected = attribute(run, TracIn(), edits)
    assert relative(scores.through_weights, expected.through_weights) < 1e-8
    assert relative(scores.direct, expected.direct) < 1e-8


def test_parts_of_the_graph_are_those_that_matter() -> None:
    """On a long path an edge matters two hops away, and nothing else is computed."""
    count = 60
    ends = torch.stack([torch.arange(count - 1), torch.arange(1, count)])
    graph = {
        **random_graph(nodes=count),
        "edge_index": torch.cat([ends, ends.flip(0)], 1),
        "train_mask": torch.ones(count, dtype=torch.bool),
    }
    graph["val_mask"] = torch.zeros(count, dtype=torch.bool)
    graph["val_mask"][[30, 50]] = True
    torch.manual_seed(0)
    module = GCN()
    sizes: list[int] = []
    run = graph, module, train_on(graph, module, steps=2)
    hook = module.register_forward_hook(lambda _, given, __: sizes.append(len(given[0]["x"])))
    scores = attribute(run, TracIn(), [RemoveEdges([(n, n + 1)]) for n in range(20, 40)])
    hook.remove()
    # Six nodes are reached, two more at either end matter, and one node stands for the neighbours
    # of both: 11 nodes. Six edits go together, before and after.
    assert sizes.count(6 * 2 * 11) >= 6
    assert max(sizes) == 6 * 2 * 11
    assert bool((scores.direct[0, 7:13] != 0).all())
    assert not scores.direct[0, :7].any()
    assert not scores.direct[0, 14:].any()
    assert not scores.direct[1].any()


@pytest.mark.parametrize("batch_size", [1, 3, 256])
def test_queries_may_come_in_any_order(batch_size: int, run: Any) -> None:
    order = torch.tensor([4, 0, 3, 1, 2, 0])
    nodes = Nodes(GRAPH, QUERY[order])
    scores = attribute(run, TracIn(), task=NodeTask(), query=nodes, batch_size=batch_size)
    expected = attribute(run, TracIn(), task=NodeTask())
    assert relative(scores.direct, expected.direct[order]) < 1e-10
    assert relative(scores.through_weights, expected.through_weights[order]) < 1e-10


def test_a_model_that_sees_the_whole_graph_is_run_on_it() -> None:
    class Normed(GCN):
        def forward(self, graph: Any) -> Tensor:
            hidden = propagate(graph, self.first(graph["x"]))
            hidden = (hidden - hidden.mean(0)) / hidden.std(0)
            return propagate(graph, self.second(torch.tanh(hidden)))

    torch.manual_seed(0)
    module = Normed()
    run = GRAPH, module, train_on(GRAPH, module)
    scores = attribute(run, InfluenceFunction("identity", damping=1.0))
    own = at(run, 8)
    expected = query_gradients(own) @ differences(own).T / 14 / 2.01
    assert relative(scores.through_weights, expected) < 1e-8
    assert relative(scores.direct, direct(own)) < 1e-8
    assert any("whole graph" in note for note in scores.provenance["notes"])


def test_queries_of_another_graph_have_no_direct_term(run: Any) -> None:
    other = random_graph(edges=30)
    scores = attribute(run, TracIn(), query=Nodes(other, other["val_mask"]))
    assert not scores.direct.any()
    assert any("another graph" in note for note in scores.provenance["notes"])


def test_an_edit_that_touches_a_query_only_says_so(run: Any) -> None:
    reached = around([GRAPH["edge_index"]], TRAIN, 2, 36)
    far = [node for node in QUERY.tolist() if not reached[node]]
    scores = attribute(run, TracIn(), [RemoveFeatures(far[:1])])
    assert not scores.through_weights.any()
    assert scores.direct.any()
    assert any("direct term is all there is" in note for note in scores.provenance["notes"])


def test_scores_with_a_direct_term_are_kept(run: Any, tmp_path: Any) -> None:
    scores = attribute(run, Source(2), scores_path=str(tmp_path / "scores.h5"))
    memory = attribute(run, Source(2))
    loaded = Scores.load(tmp_path / "scores.h5")
    for one in (scores, loaded):
        assert torch.equal(one.direct, memory.direct)
        assert torch.equal(one.values, memory.values)
        assert relative(one.through_weights, one.by_segment.sum(0)) < 1e-12


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (RemoveEdges([ABSENT[0]]), r"edge \(\d+, \d+\), which the graph has not got"),
        (AddEdges([PRESENT[0]]), r"edge \(\d+, \d+\), which the graph has\."),
        (RemoveNodes([36]), "names node 36; the graph has nodes 0 to 35"),
        (RemoveNodes([]), "must be a list of node ids"),
        (RemoveFeatures([0], columns=[5]), r"columns \[5\]; expected 0 to 4"),
        (RemoveFeatures([0], features="z"), "features under 'z'"),
    ],
)
def test_edits_that_do_not_fit_are_refused(edit: Any, message: str, run: Any) -> None:
    with pytest.raises(ValueError, match=f"Edit 1: .*{message}"):
        attribute(run, TracIn(), [EDITS[0], edit])


def test_what_cannot_be_asked_is_refused(run: Any) -> None:
    with pytest.raises(ValueError, match="of the graph or of single examples, got both"):
        attribute(run, TracIn(), [EDITS[0], Removal(0)])
    with pytest.raises(ValueError, match="expected no edits"):
        attribute(run, FastInfluence())
    with pytest.raises(UnsupportedTrainingError, match="edits of a graph"):
        attribute(run, TRAK())
    with pytest.raises(UnsupportedTrainingError, match="keep"):
        attribute(run, TracIn(), keep=0.5)
    weighted = {**GRAPH, "edge_weight": torch.ones(GRAPH["edge_index"].shape[1])}
    with pytest.raises(ValueError, match="'edge_weight' of its edges, which a new edge has not"):
        AddEdges([ABSENT[0]]).applied(weighted)
    adjacency = random_graph("dense")
    adjacency["adj"] = adjacency["adj"] / 2
    with pytest.raises(ValueError, match="normalise it in the module"):
        edge_index(adjacency)


def test_an_isolated_node_that_a_layer_cannot_have_is_named() -> None:
    class Mean(SGC):
        def forward(self, graph: Any) -> Tensor:
            source, target = graph["edge_index"]
            ones = torch.ones(len(source), dtype=torch.float64)
            degrees = torch.zeros(36, dtype=torch.float64).index_add(0, target, ones)
            total = torch.zeros_like(graph["x"]).index_add(0, target, graph["x"][source])
            return self.linear(total / degrees[:, None])

    ends = torch.stack([torch.arange(36), (torch.arange(36) + 1) % 36])
    graph = {**GRAPH, "edge_index": torch.cat([ends, ends.flip(0)], 1)}
    torch.manual_seed(0)
    module = Mean()
    run = graph, module, train_on(graph, module, steps=2)
    node = int(TRAIN[0])
    edges = [(node, (node + 1) % 36), (node, (node - 1) % 36)]
    with pytest.raises(NonFiniteError, match="probably an isolated one"):
        attribute(run, TracIn(), [RemoveEdges(edges)], NodeTask())


def restricted(graph: Any, nodes: Tensor) -> Any:
    """The subgraph of some nodes."""
    return side_by_side([graph], [inner_part(edge_index(graph), nodes, 36)])


def test_weights_of_edges_go_with_them() -> None:
    weights = torch.arange(GRAPH["edge_index"].shape[1])
    graph = {**GRAPH, "edge_weight": weights, "num_nodes": 36}
    left = RemoveEdges(PRESENT[:1]).applied(graph)
    known = dict(zip(map(tuple, GRAPH["edge_index"].T.tolist()), weights.tolist(), strict=True))
    for edge, weight in zip(
        left["edge_index"].T.tolist(), left["edge_weight"].tolist(), strict=True
    ):
        assert known[tuple(edge)] == weight
    nodes = torch.tensor([3, 5, 8, 13, 21])
    part = restricted(graph, nodes)
    assert part["num_nodes"] == len(part["x"]) == 5
    for (u, v), weight in zip(
        part["edge_index"].T.tolist(), part["edge_weight"].tolist(), strict=True
    ):
        assert known[int(nodes[u]), int(nodes[v])] == weight


def test_parts_of_graphs_stand_side_by_side() -> None:
    """Nodes, edges and what belongs to either keep their order, in every form of a graph."""
    nodes = [torch.tensor([9, 2, 30, 7]), torch.arange(36)]
    plain = {**GRAPH, "edge_weight": torch.arange(GRAPH["edge_index"].shape[1]).double()}
    edited = RemoveEdges(PRESENT[:1]).applied(plain)
    parts = [inner_part(edge_index(g), n, 36) for g, n in zip([plain, edited], nodes, strict=True)]
    both = side_by_side([plain, edited], parts)
    alone = [restricted(graph, own) for graph, own in zip([plain, edited], nodes, strict=True)]
    assert torch.equal(both["x"], torch.cat([graph["x"] for graph in alone]))
    assert torch.equal(both["edge_weight"], torch.cat([graph["edge_weight"] for graph in alone]))
    shifted = [alone[0]["edge_index"], alone[1]["edge_index"] + 4]
    assert torch.equal(both["edge_index"], torch.cat(shifted, 1))
    matrix = torch.zeros(36, 36, dtype=torch.float64)
    matrix[tuple(GRAPH["edge_index"])] = 1
    graph = {"adj": matrix, "x": GRAPH["x"]}
    parts = [inner_part(edge_index(graph), own, 36) for own in nodes]
    dense = side_by_side([graph] * 2, parts)
    expected = torch.block_diag(matrix[nodes[0]][:, nodes[0]], matrix)
    assert torch.equal(dense["adj"], expected)


class Keeping(GCN):
    """Keeps the edges of its first call, under names of its own."""

    def forward(self, graph: Any) -> Tensor:
        if not hasattr(self, "_edges"):
            self._edges = graph["edge_index"]
        return super().forward({**graph, "edge_index": self._edges})


class Cached(GCN):
    """Keeps them as the layers of torch_geometric do with ``cached=True``."""

    def __init__(self) -> None:
        super().__init__()
        self.cached, self._cached_edge_index = True, None

    def forward(self, graph: Any) -> Tensor:
        edges = self._cached_edge_index
        edges = graph["edge_index"] if edges is None else edges
        if self.cached:
            self._cached_edge_index = edges
        return super().forward({**graph, "edge_index": edges})


def test_what_layers_keep_of_the_first_graph_is_not_taken_for_an_edited_one(run: Any) -> None:
    torch.manual_seed(0)
    module = Cached()
    own = GRAPH, module, train_on(GRAPH, module)
    for estimator in (TracIn(), Unrolled()):
        scores = attribute(own, estimator)
        expected = attribute(run, estimator)
        assert relative(scores.through_weights, expected.through_weights) < 1e-10
        assert relative(scores.direct, expected.direct) < 1e-10
    assert module.cached
    assert module._cached_edge_index is not None  # as it was
    attribution = AttributionModule(module, own[2], InfluenceFunction("identity", damping=1.0))
    assert attribution.unlearned(loader_of(GRAPH), EDITS[:1])._cached_edge_index is None


def test_a_model_that_keeps_its_edges_otherwise_is_named() -> None:
    torch.manual_seed(0)
    module = Keeping()
    scores = attribute((GRAPH, module, train_on(GRAPH, module)), TracIn())
    assert any("has kept those of its first call" in n for n in scores.provenance["notes"])


@pytest.mark.parametrize("seed", range(4))
def test_nodes_at_the_border_keep_their_degrees(seed: int) -> None:
    """In a directed graph with loops and double edges; one node stands for several outside."""
    own = torch.Generator().manual_seed(seed)
    edges = torch.randint(0, 40, (2, 160), generator=own)
    edges = torch.cat([edges, edges[:, :20], torch.arange(5).expand(2, 5)], 1)
    inside = torch.rand(40, generator=own) < 0.3
    part = bordered_part(edges, inside)
    count = int(inside.sum())
    assert torch.equal(part.nodes[:count], inside.nonzero().squeeze(1))
    assert not inside[part.nodes[count:]].any()
    assert torch.equal(part.kept, inside[edges].any(0).nonzero().squeeze(1))
    whole = edges[:, part.kept]
    within = part.edges < count
    assert torch.equal(within, inside[whole])
    assert torch.equal(part.nodes[part.edges[within]], whole[within])
    # Neighbours outside of one node stay apart, and every edge to one of them goes to the same.
    for node in range(count):
        there = (part.edges == node).any(0) & ~within.all(0)
        outer, true = part.edges[:, there][~within[:, there]], whole[:, there][~within[:, there]]
        pairs = torch.stack([outer, true]).unique(dim=1)
        assert pairs.shape[1] == len(outer.unique()) == len(true.unique())
    most = max(len(whole[1 - s][(whole[s] == n) & ~inside[whole[1 - s]]].unique())
               for s in (0, 1) for n in part.nodes[:count].tolist())  # fmt: skip
    assert len(part.nodes) - count >= most


def test_an_added_edge_is_there_once_in_each_direction() -> None:
    graph = {"edge_index": torch.tensor([[0, 1], [1, 2]]), "num_nodes": 3}
    both = AddEdges([(2, 1), (0, 2), (2, 0)]).applied(graph)["edge_index"].T.tolist()
    assert sorted(both) == [[0, 1], [0, 2], [1, 2], [2, 0], [2, 1]]
    one = AddEdges([(2, 0), (2, 0)], directed=True).applied(graph)["edge_index"].T.tolist()
    assert sorted(one) == [[0, 1], [1, 2], [2, 0]]
    assert AddEdges([(0, 0)]).applied(graph)["edge_index"].T.tolist()[2:] == [[0, 0]]
