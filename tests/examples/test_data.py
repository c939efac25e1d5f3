"""The example data modules: parsing, splits, flipped labels, rendering, missing files."""

import gzip
import os

import numpy as np
import pytest
import torch

from tda_lightning.examples.data import (
    CIFAR10Data,
    ConcreteData,
    DigitsData,
    FashionMNISTData,
    MNISTData,
    MNLIData,
    OutlierImages,
    WikiText2Data,
)

FILE_MODULES = [
    CIFAR10Data,
    ConcreteData,
    FashionMNISTData,
    MNISTData,
    MNLIData,
    WikiText2Data,
]


@pytest.mark.parametrize("module", FILE_MODULES)
def test_missing_files_are_named_with_a_way_to_get_them(module, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"Missing data files: .*data\.root=FOLDER") as got:
        module(root=str(tmp_path)).setup()
    assert "http" in str(got.value) or "LeCun" in str(got.value)


def test_digits_are_split_once_and_scaled():
    data = DigitsData()
    train, query = data.train_dataset, data.query_dataset
    assert (len(train), len(query)) == (1500, 297)
    assert train[0][0].shape == (1, 8, 8)
    assert train.tensors[0].mean().item() == pytest.approx(0, abs=1e-5)
    assert train.tensors[0].std().item() == pytest.approx(1, abs=1e-3)
    rows = {tuple(image.flatten().tolist()) for image in train.tensors[0]}
    assert not rows & {tuple(image.flatten().tolist()) for image in query.tensors[0]}


def test_flipped_labels_are_remembered_and_wrong():
    clean, flipped = DigitsData(num_train=200), DigitsData(num_train=200, flip_fraction=0.1)
    wrong = clean.train_dataset.tensors[1] != flipped.train_dataset.tensors[1]
    assert wrong.sum() == 20
    assert wrong.nonzero()[:, 0].equal(flipped.flipped)
    assert clean.train_dataset.tensors[1].equal(flipped.clean_labels)
    assert clean.query_dataset.tensors[1].equal(flipped.query_dataset.tensors[1])
    again = DigitsData(num_train=200, flip_fraction=0.1)
    assert again.train_dataset.tensors[1].equal(flipped.train_dataset.tensors[1])
    other = DigitsData(num_train=200, flip_fraction=0.1, flip_seed=1)
    assert not other.train_dataset.tensors[1].equal(flipped.train_dataset.tensors[1])
    shown = flipped.render("train", int(flipped.flipped[0]))
    assert "label flipped, was" in shown.caption
    assert shown.image.shape == (8, 8)
    columns = flipped.group_columns("train")
    assert columns["class"] == list(map(str, flipped.train_dataset.tensors[1].tolist()))
    yes = [index for index, told in enumerate(columns["flipped"]) if told == "yes"]
    assert yes == flipped.flipped.tolist()
    assert list(flipped.group_columns("query")) == list(clean.group_columns("train")) == ["class"]


def test_batches_are_shuffled_by_the_seed_alone():
    def order(seed):
        torch.rand(seed + 1)
        return torch.cat([labels for _, labels in DigitsData(seed=seed).train_dataloader()])

    assert order(0).equal(order(0))
    assert not order(0).equal(order(1))


def test_what_the_model_said_is_told_by_class_name():
    assert DigitsData().describe(torch.tensor([[0.0, 9.0] + 8 * [0.0]])) == ["1 (100%)"]


def test_bad_arguments():
    with pytest.raises(ValueError, match="between 1 and 1500, got 5000"):
        DigitsData(num_train=5000).setup()
    with pytest.raises(ValueError, match=r"flip_fraction must be in \[0, 1\), got 1.5"):
        DigitsData(flip_fraction=1.5)
    with pytest.raises(ValueError, match="got 'test'"):
        DigitsData().dataset("test")


@pytest.fixture
def root(tmp_path):
    """A data folder with tiny files of every format."""
    rng = np.random.default_rng(0)
    (tmp_path / "mnist").mkdir()
    for part, count in (("train", 9), ("t10k", 4)):
        images = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = rng.integers(0, 10, count, dtype=np.uint8)
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            _write_idx(tmp_path / "mnist" / f"{part}-{kind}-ubyte.gz", array)
    (tmp_path / "cifar10").mkdir()
    np.savez(
        tmp_path / "cifar10" / "tiny.npz",
        x_train=rng.integers(0, 256, (6, 32, 32, 3), dtype=np.uint8),
        y_train=np.arange(6),
        x_test=rng.integers(0, 256, (3, 32, 32, 3), dtype=np.uint8),
        y_test=np.arange(3),
    )
    (tmp_path / "uci_concrete").mkdir()
    rows = "\n".join(f"{i},7,{3 * i + 1}" for i in range(12))
    (tmp_path / "uci_concrete" / "concrete.csv").write_text(f"cement,water,strength\n{rows}\n")
    (tmp_path / "wikitext2").mkdir()
    for part, text in (("valid", " a b a b a c \n \n a <unk> b \n"), ("test", " c a d b a b \n")):
        with gzip.open(tmp_path / "wikitext2" / f"wiki.{part}.tokens.gz", "wt") as file:
            file.write(text)
    return tmp_path


def test_idx_files(root):
    data = MNISTData(root=str(root), num_query=2)
    assert data.train_dataset[0][0].shape == (1, 28, 28)
    assert (len(data.train_dataset), len(data.query_dataset)) == (9, 2)
    raw = gzip.decompress((root / "mnist" / "train-images-idx3-ubyte.gz").read_bytes())
    assert bytes(data.render("train", 8).image.numpy().tobytes()) == raw[-784:]


def test_broken_idx_files_are_named(root):
    path = root / "mnist" / "train-images-idx3-ubyte.gz"
    raw = gzip.decompress(path.read_bytes())
    path.write_bytes(gzip.compress(raw[:-5]))
    with pytest.raises(ValueError, match=r"train-images.* is cut short: .* 7056 bytes"):
        MNISTData(root=str(root)).setup()
    path.write_bytes(gzip.compress(b"hello"))
    with pytest.raises(ValueError, match=r"train-images.* is not an idx file"):
        MNISTData(root=str(root)).setup()


def test_npz_files(root):
    data = CIFAR10Data(root=str(root), file="tiny.npz")
    assert data.train_dataset[5][0].shape == (3, 32, 32)
    assert data.train_dataset[5][1] == 5
    assert data.render("query", 2).caption == "bird"
    assert data.render("query", 2).image.shape == (32, 32, 3)
    np.savez(root / "cifar10" / "other.npz", x_train=np.zeros(1))
    with pytest.raises(ValueError, match="has no array x_test, y_test, y_train"):
        CIFAR10Data(root=str(root), file="other.npz").setup()


def test_outliers_come_last(root):
    labels = root / "mnist" / "train-labels-idx1-ubyte.gz"
    digit = int(gzip.decompress(labels.read_bytes())[-1])
    test_labels = gzip.decompress((root / "mnist" / "t10k-labels-idx1-ubyte.gz").read_bytes())
    _write_idx(
        root / "mnist" / "t10k-labels-idx1-ubyte.gz",
        np.full(len(test_labels) - 8, digit, np.uint8),
    )
    options = {"root": str(root), "file": "tiny.npz", "digit": digit, "size": 8}
    data = OutlierImages(category="bird", num_outliers=1, num_query=2, **options)
    assert [len(data.dataset(split)) for split in ("train", "query")] == [2, 2]
    for split in ("train", "query"):
        assert data.is_outlier(split).tolist() == [False, True]
    bird, digits = (data.train_dataset[n][0] for n in (0, 1))
    assert bird.shape == digits.shape == (3, 8, 8)
    raw = CIFAR10Data(root=str(root), file="tiny.npz").read()[0].images[2]
    assert float(bird[1, 0, 0]) == pytest.approx(raw[:4, :4, 1].mean() / 127.5 - 1, abs=1e-5)
    assert torch.equal(digits[0], digits[2])  # grey
    assert bool((digits[:, 0, 0] < 0).all())  # the padding is black
    assert data.render("query", 1).caption == f"MNIST {digit}"
    assert data.render("train", 0).image.shape == (8, 8, 3)
    for wrong, message in (
        ({"size": 5}, "size must divide 32, got 5"),
        ({"digit": 10}, "digit must be in 0 to 9"),
        ({"category": "plane"}, "category must be one of airplane"),
        ({"num_query": 3}, "num_query must be even"),
    ):
        with pytest.raises(ValueError, match=message):
            OutlierImages(**{**options, **wrong})


def test_csv_files_are_scaled_by_the_training_rows(root):
    data = ConcreteData(root=str(root), num_query=3)
    inputs, targets = data.train_dataset.tensors
    assert (inputs.shape, targets.shape) == ((9, 2), (9, 1))
    assert targets.mean().item() == pytest.approx(0, abs=1e-6)
    assert targets.std().item() == pytest.approx(1, abs=1e-6)
    assert bool((inputs[:, 1] == 0).all())  # a column that never varies
    torch.testing.assert_close(inputs[:, :1], targets)
    row = data.render("query", 0).row
    assert row["strength"] == 3 * row["cement"] + 1
    told = data.describe(data.query_dataset.tensors[1])
    assert told[0] == f"strength {row['strength']:g}"
    columns = data.group_columns("query")
    assert {name: numbers[0] for name, numbers in columns.items()} == row


@pytest.mark.parametrize(
    ("line", "message"), [("1,2\n", "line 3: expected 3"), ("1,x,2\n", "line 3: expected numbers")]
)
def test_broken_csv_lines_are_named(root, line, message):
    (root / "uci_concrete" / "concrete.csv").write_text("a,b,c\n1,2,3\n" + line)
    with pytest.raises(ValueError, match=message):
        ConcreteData(root=str(root), num_query=1).setup()


def test_text_files(root):
    data = WikiText2Data(root=str(root), sequence_length=4, num_query=None)
    inputs, targets = data.train_dataset.tensors
    # a b a b a c <eos> <eos> a <unk> b <eos>: c comes once and is unknown.
    assert data.vocabulary == ["<unk>", "<eos>", "a", "b"]
    assert inputs.tolist() == [[2, 3, 2, 3], [2, 0, 1, 1]]
    assert targets.tolist() == [[3, 2, 3, 2], [0, 1, 1, 2]]
    assert data.query_dataset.tensors[0].tolist() == [[0, 2, 0, 3]]
    assert data.documents("train")[1] == ["a", "c", "<eos>", "<eos>", "a"]
    assert len(data.documents("query")) == len(data.query_dataset)
    assert data.render("train", 0).text == "a b a b a"
    assert data.render("train", 1).text == "a \u2039c\u203a\na"
    assert "are <unk> to the model" in data.render("query", 0).caption
    # The first word of a sequence is predicted by none.
    assert data.render("train", 0).pieces == (
        ("a", None),
        (" b", 0),
        (" a", 1),
        (" b", 2),
        (" a", 3),
    )
    shown = data.render("train", 1)
    assert [position for _, position in shown.pieces] == [None, 0, 1, 2, 3]
    assert "".join(piece for piece, _ in shown.pieces) == shown.text
    with pytest.raises(ValueError, match="no sequence of 50"):
        WikiText2Data(root=str(root), sequence_length=50).setup()


@pytest.mark.skipif("TDA_DATA_ROOT" not in os.environ, reason="TDA_DATA_ROOT is not set")
@pytest.mark.parametrize(
    ("module", "train", "query"),
    [
        (CIFAR10Data, 4000, 1000),
        (ConcreteData, 927, 103),
        (FashionMNISTData, 60000, 10000),
        (MNISTData, 60000, 10000),
        (MNLIData, 8000, 200),
        (WikiText2Data, 3400, 100),
    ],
)
def test_real_files(module, train, query):
    data = module(root=os.environ["TDA_DATA_ROOT"])
    assert (len(data.train_dataset), len(data.query_dataset)) == (train, query)
    assert all(bool(part.isfinite().all()) for part in data.train_dataset.tensors)
    assert data.render("train", 0) is not None


def _write_idx(path, array):
    header = b"\x00\x00\x08" + bytes([array.ndim]) + np.array(array.shape, ">u4").tobytes()
    path.write_bytes(gzip.compress(header + array.tobytes()))
