"""What is measured: the studies and the estimators, as settings of the tda commands."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Study:
    """One recorded run and how often it is retrained.

    Attributes:
        title: for the table.
        subsets: retrained on half of the training set, in both protocols.
        validation: further subsets, on which dampings are chosen.
        validated: the protocol in which those are retrained; "": both.
        together: replays at once through vmap.
        without: estimators that would take too long.
        peers: outside libraries that are asked.
    """

    title: str
    subsets: int = 100
    validation: int = 25
    validated: str = ""
    together: int = 1
    without: tuple[str, ...] = ()
    peers: tuple[str, ...] = ("kronfluence", "trak", "trak_last", "captum")


# traker draws 2048 normal numbers for each weight, over and over at every checkpoint, which takes
# minutes for these MLPs: they are asked at the last checkpoint alone.
MLP_PEERS = ("kronfluence", "trak_last", "captum")

STUDIES = {
    "concrete": Study("Concrete, MLP", together=5),
    "mnist": Study(
        "MNIST, MLP",
        validated="algorithm",
        together=5,
        without=("source_recorded",),
        peers=MLP_PEERS,
    ),
    "fashion_mnist": Study(
        "FashionMNIST, MLP",
        validation=20,
        validated="algorithm",
        together=5,
        without=("source_recorded",),
        peers=MLP_PEERS,
    ),
    "cifar10_resnet9": Study(
        "CIFAR-10, ResNet-9",
        subsets=50,
        validation=20,
        validated="algorithm",
        without=("source_recorded", "unrolled"),
    ),
    "wikitext2_gpt": Study("WikiText-2, GPT", subsets=50, validated="single_run"),
    "fashion_mnist_noisy": Study(
        "FashionMNIST, MLP, 30% random labels, 3 epochs", together=5, peers=MLP_PEERS
    ),
    "fashion_mnist_noisy_third": Study(
        "the same at a third of the rate",
        validated="algorithm",
        together=5,
        peers=("kronfluence",),
    ),
    "fashion_mnist_noisy_tenth": Study(
        "the same at a tenth of the rate",
        validated="algorithm",
        together=5,
        peers=("kronfluence",),
    ),
}

# Multiples of the layer's mean eigenvalue; 0.1 is the default, ours and kronfluence's. It comes
# first, so that its time is with the curvature that the others take up.
DAMPINGS = ("0.1", "0.001", "0.01", "1", "10", "100", "1000")
# Added to the curvature; and multiples of the mean eigenvalue of TRAK's second moments.
KRONFLUENCE_DAMPINGS = ("1e-5", "1e-4", "1e-3", "1e-2", "1e-1")
TRAK_DAMPINGS = ("0.1", "1", "10", "100")

ESTIMATORS: dict[str, list[str]] = {
    "source": ["estimator=source"],
    "source_blocks": ["estimator=source", "estimator.leading_directions=0"],
    "source_recorded": ["estimator=source", "estimator.order=recorded"],
    **{
        f"influence-{damping}": ["estimator=influence", f"estimator.relative_damping={damping}"]
        for damping in DAMPINGS
    },
    "tracin": ["estimator=tracin"],
    "unrolled": ["estimator=unrolled"],
}
# Their scores with every damping of a grid: the default one, and the name of the family.
DAMPED = {
    "influence": "influence-0.1",
    "kronfluence": "kronfluence",
    "trak": "trak",
    "trak_last": "trak_last",
}

TITLES = {
    "unrolled": "exact unrolling",
    "source_recorded": "SOURCE, recorded order",
    "source": "SOURCE",
    "source_blocks": "SOURCE, blocks alone (as in the paper)",
    "influence": "influence function, EK-FAC",
    "kronfluence": "kronfluence, EK-FAC",
    "trak": "TRAK, the run's checkpoints",
    "trak_last": "TRAK, the last checkpoint",
    "tracin": "TracIn",
    "captum": "captum, TracInCP",
    "gradient_dot": "gradient dot product",
    "last_layer": "cosine of last-layer inputs",
    "self_loss": "self-loss",
    "random": "random",
}
