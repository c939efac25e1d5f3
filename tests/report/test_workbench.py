"""The report's script in a real browser: search, sort, triage, export and import."""

import csv
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

from tda_lightning.edits import Relabel, Removal, load_edits
from tda_lightning.records.scores import Scores
from tda_lightning.report import Rendered, write_report
from tests.report.browser import opened

NUM_TRAIN, NUM_QUERIES = 80, 20
HOSTILE = "</script><script>window.hit=1</script><img src=x onerror='window.hit=1'>\"'&"
ATTACKS = [
    HOSTILE,
    "<svg onload=window.hit=1>",
    "<!--<script>",
    "javascript:window.hit=1",
    "${window.hit=1}",
    "{{window.hit=1}}",
    "\u2028window.hit=1\u2029",
    "</style><iframe srcdoc='<script>parent.hit=1</script>'>",
    "\ud800\0\u202eabc",
    "=HYPERLINK(1)",
]


@pytest.fixture(scope="module")
def browser():
    with opened() as found:
        yield found


def example_scores(members=True):
    generator = torch.Generator().manual_seed(0)
    shape = (3, NUM_QUERIES, NUM_TRAIN)
    parts = 1e-3 * torch.randn(shape, generator=generator)
    runs = parts.sum(0) + 1e-3 * torch.randn((4, *shape[1:]), generator=generator)
    mean = runs.mean(0)
    segments = torch.stack([mean * 0.5, mean * 0.25, mean * 0.25])
    labels = [f"label {n % 2}" for n in range(NUM_QUERIES)]
    provenance = {
        "segments": [[0, 10], [10, 20], [20, 30]],
        # Every fifth query is wrong.
        "predictions": [f"label {(n + (n % 5 == 0)) % 2} (75%)" for n, _ in enumerate(labels)],
        "measurements": torch.rand(NUM_QUERIES, generator=generator).tolist(),
    }
    own = torch.rand(NUM_TRAIN, generator=generator)
    return Scores(mean, segments, own, provenance, members=runs if members else None)


@pytest.fixture(scope="module")
def workbench(browser, tmp_path_factory):
    """A page of pictures of two classes, the data behind it, and a second file of scores."""
    scores = example_scores()
    pictures = torch.rand(NUM_TRAIN, 1, 8, 8)
    train = TensorDataset(pictures, torch.arange(NUM_TRAIN) % 2)
    query = TensorDataset(pictures[:NUM_QUERIES], torch.arange(NUM_QUERIES) % 2)
    noise = torch.randn(scores.values.shape, generator=torch.Generator().manual_seed(1))
    other = Scores(scores.values + 1e-3 * noise)
    path = tmp_path_factory.mktemp("workbench") / "report.html"
    write_report(scores, path, train=train, query=query, compare={"other": other})
    return SimpleNamespace(scores=scores, path=path, other=other)


@pytest.fixture
def page(browser, workbench):
    context = browser.new_context(accept_downloads=True, viewport={"width": 1280, "height": 900})
    context.set_default_timeout(15_000)
    page = context.new_page()
    problems = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda said: problems.append(said.text) if said.type == "error" else None)
    page.goto(workbench.path.as_uri())
    yield page
    context.close()
    assert problems == []


def listed(page):
    return [
        int(line.get_attribute("data-row")) for line in page.query_selector_all("#query-list a")
    ]


def triaged(page):
    items = page.query_selector_all("#triage-list > li")
    return [int(item.get_attribute("data-train")) for item in items]


def exported(page, button):
    with page.expect_download() as download:
        page.click(button)
    return download.value.path()


def test_what_runs_of_an_ensemble_agree_on(page, workbench):
    page.goto(f"{workbench.path.as_uri()}#query-3")
    said = page.inner_text("#tail-proponent li")
    assert "among the top 50 in 4/4 runs" in said and "4/4 runs agree" in said
    page.click("#tail-proponent .more")
    lines = page.locator("#tail-proponent li").all()
    unstable = [line for line in lines if line.locator(".unstable").count()]
    assert 0 < len(unstable) < len(lines)
    for line in lines:  # those whose sign changes are marked
        assert ("4/4 runs agree" in line.inner_text()) == (line not in unstable)


def test_a_few_proponents_stand_for_the_others(page):
    page.select_option("select[aria-label='order of proponents and opponents']", "stands")
    said = page.locator("#tail-proponent li").all_inner_texts()
    shares = [int(text.split("stands for ")[1].split("%")[0]) for text in said[:4]]
    assert shares == sorted(shares, reverse=True) and 98 <= sum(shares) <= 102
    assert not any("stands for" in text for text in said[4:])
    assert "stands for" not in page.inner_text("#tail-opponent")


def test_queries_are_sorted_searched_and_followed(page, workbench):
    losses = workbench.scores.provenance["measurements"]
    wrong = {n for n in range(NUM_QUERIES) if n % 5 == 0}
    order = sorted(range(NUM_QUERIES), key=lambda n: (n not in wrong, -losses[n]))
    assert listed(page) == order
    assert page.locator("#query-list .is-wrong").count() == len(wrong)
    assert page.inner_text("#query-panel h2").startswith(f"Query {order[0]}")

    sort = "select[aria-label='order of queries']"
    page.select_option(sort, "best")
    assert listed(page) == sorted(range(NUM_QUERIES), key=lambda n: losses[n])
    page.select_option(sort, "spread")
    shares = [
        float((part.std(0) / 2).norm() / part.mean(0).norm())
        for part in workbench.scores.members.double().transpose(0, 1)
    ]
    assert listed(page) == sorted(range(NUM_QUERIES), key=lambda n: -shares[n])
    page.select_option(sort, "row")
    page.select_option("select[aria-label=predictions]", "wrong")
    assert listed(page) == sorted(wrong)
    page.keyboard.press("Escape")
    page.locator("body").press("/")
    page.keyboard.type("#15")
    assert listed(page) == [15]
    assert page.inner_text("#query-count") == "1 of 20 queries"
    page.fill("#tab-queries input[type=search]", "")
    page.keyboard.press("Escape")
    page.keyboard.press("j")  # from the query shown, the worst of all
    place = sorted(wrong).index(order[0])
    following = sorted(wrong)[min(place + 1, len(wrong) - 1)]
    assert page.evaluate("location.hash") == f"#query-{following}"
    assert page.inner_text("#query-panel h2").startswith(f"Query {following}")


def test_proponents_are_those_of_the_scores(page, workbench):
    page.goto(f"{workbench.path.as_uri()}#query-3")

    def shown(kind):
        items = page.query_selector_all(f"#tail-{kind} li")
        return [int(item.get_attribute("data-train")) for item in items]

    positive = int((workbench.scores.values[3] > 0).sum())
    indices, values = workbench.scores.proponents(3, positive)
    assert shown("proponent") == indices[:8].tolist()
    assert page.locator("#tail-proponent .score").first.inner_text() == f"+{values[0]:.5f}"
    assert page.locator("#query-charts .mark").count() == 16
    page.click("#tail-proponent .more")
    assert shown("proponent") == indices[:32].tolist()
    assert shown("opponent") == workbench.scores.opponents(3, 8)[0].tolist()
    page.check("#query-panel input[type=checkbox]")
    members = workbench.scores.members[:, 3]
    stable = [n for n in indices.tolist() if bool((members[:, n] > 0).all())]
    assert shown("proponent") == stable[:32]


def test_marks_leave_and_come_back(page, workbench, tmp_path):
    page.keyboard.press("2")
    order = workbench.scores.self_influence.argsort(descending=True, stable=True).tolist()
    assert triaged(page) == order[:24]
    page.select_option("#tab-triage select[aria-label=label]", "1")
    assert triaged(page) == [n for n in order if n % 2 == 1][:24]
    first, second, third = triaged(page)[:3]
    page.click(f"#triage-list [data-train='{first}'] .mark.wrong")
    pressed = page.get_attribute(f"#triage-list [data-train='{first}'] .mark.wrong", "aria-pressed")
    assert pressed == "true"
    # By the keyboard: the next one is relabelled, with a note that a spreadsheet might run.
    page.focus(f"#triage-list [data-train='{first}']")
    page.keyboard.press("j")
    page.keyboard.press("r")
    choice = page.locator(f"#triage-list [data-train='{second}'] select")
    choice.select_option("label 0")
    page.keyboard.press("Escape")
    page.focus(f"#triage-list [data-train='{second}']")
    page.keyboard.press("Enter")
    page.fill("dialog .note", '=1+1, "really"')
    page.keyboard.press("Tab")
    page.keyboard.press("Escape")
    page.focus(f"#triage-list [data-train='{third}']")
    page.keyboard.press("o")
    assert page.inner_text("#mark-count") == "1 wrong, 1 to relabel, 1 to keep"

    edits = exported(page, "#export-edits")
    expected = {first: Removal(first), second: Relabel(second, 0)}
    assert load_edits(edits, NUM_TRAIN) == [expected[index] for index in sorted(expected)]
    table = exported(page, "#export-csv")
    with open(table, newline="", encoding="utf-8") as file:
        rows = {int(row["index"]): row for row in csv.DictReader(file)}
    assert {index: row["mark"] for index, row in rows.items()} == {
        first: "wrong",
        second: "relabel",
        third: "keep",
    }
    assert rows[second]["note"] == '\'=1+1, "really"'
    assert rows[second]["new_label"] == "label 0"

    # What was marked is there again after a reload, and after an import elsewhere.
    page.reload()
    page.keyboard.press("2")
    assert page.inner_text("#mark-count") == "1 wrong, 1 to relabel, 1 to keep"
    page.evaluate("localStorage.clear()")
    page.reload()
    page.keyboard.press("2")
    assert page.inner_text("#mark-count") == "nothing is marked yet"
    page.set_input_files("#import-marks", table)
    page.locator("#announced", has_text="Read 3").wait_for(state="attached")
    assert json.loads(exported(page, "#export-edits").read_text())["edits"][0]["index"] == min(
        first, second
    )
    page.focus(f"#triage-list [data-train='{second}']")
    page.keyboard.press("Enter")
    assert page.input_value("dialog .note") == '=1+1, "really"'
    page.keyboard.press("Escape")
    foreign = tmp_path / "foreign.json"
    foreign.write_text(json.dumps({"format": "tda-lightning edits", "num_train": 3, "edits": []}))
    page.set_input_files("#import-marks", foreign)
    page.locator("#announced", has_text="of 3 tr").wait_for(state="attached")


def test_triage_orders_and_words(page, workbench):
    page.keyboard.press("2")
    values = workbench.scores.values
    page.select_option("#tab-triage select[aria-label='order of training examples']", "net")
    assert triaged(page) == values.double().sum(0).argsort(stable=True).tolist()[:24]
    page.select_option("#tab-triage select[aria-label='order of training examples']", "harmed")
    harmed = torch.bincount(values.argmin(1), minlength=NUM_TRAIN)  # one is 1% of 80
    assert triaged(page) == harmed.argsort(descending=True, stable=True).tolist()[:24]
    page.fill("#tab-triage input[type=search]", "#7")
    assert triaged(page) == [7]
    page.fill("#tab-triage input[type=search]", "LABEL 1")
    assert page.inner_text("#triage-count") == "40 of 80 training examples"
    page.select_option("select[aria-label='suggested label']", "1")
    assert page.inner_text("#triage-count") == "0 of 80 training examples"


def test_groups_and_agreement(page, workbench):
    page.keyboard.press("3")
    values = workbench.scores.values.double()
    means = [[values[q::2, n::2].sum(1).mean() for n in range(2)] for q in range(2)]
    cells = page.query_selector_all(".matrix td.numeric")
    shown = [float(cell.inner_text().replace("\N{MINUS SIGN}", "-")) for cell in cells]
    np.testing.assert_allclose(shown, np.ravel(means), rtol=6e-3)
    page.keyboard.press("4")
    row = page.locator(".compare table").first.locator("tbody td").all_inner_texts()

    def rank(rows):
        return rows.argsort(1).argsort(1).double()

    one, two = rank(values), rank(workbench.other.values)
    expected = [
        float(torch.corrcoef(torch.stack(pair))[0, 1]) for pair in zip(one, two, strict=True)
    ]
    assert row[0] == "other"
    assert float(row[1]) == pytest.approx(np.mean(expected), abs=0.006)


def test_without_scripts_the_sections_are_there(browser, workbench):
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(workbench.path.as_uri())
    assert page.locator("section.query:visible").count() == 12
    assert page.locator("#self-influence:visible").count() == 1
    assert page.locator("#workbench:visible").count() == 0
    context.close()


@pytest.mark.parametrize("width", [390, 820, 1280])
def test_nothing_is_wider_than_the_window(page, workbench, width):
    page.set_viewport_size({"width": width, "height": 800})
    for tab in ("queries", "triage", "groups", "compare", "about", "train-3"):
        page.goto(f"{workbench.path.as_uri()}#{tab}")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    # Whatever can be used has a name.
    names = page.evaluate(
        """[...document.querySelectorAll('input:not([type=file]), select, button, img, audio')]
        .filter((e) => !(e.labels || []).length).map((e) =>
          e.getAttribute('aria-label') || e.textContent || e.getAttribute('alt') || e.outerHTML)"""
    )
    assert not [name for name in names if name.startswith("<")]


@pytest.mark.parametrize("form", ["text", "pieces", "row"])
def test_hostile_texts_stay_texts(browser, form, tmp_path):
    scores = example_scores(members=False)

    def render(split, index):
        text = ATTACKS[index % len(ATTACKS)]
        content = {
            "text": {"text": text},
            "pieces": {"text": text, "pieces": ((text, 0), (text, None))},
            "row": {"row": {text: text}},
        }[form]
        return Rendered(text, **content)

    if form == "pieces":
        scores = Scores(scores.values, by_token=scores.values[:, :, None])
    scores.provenance.update(predictions=[ATTACKS[n % 10] for n in range(NUM_QUERIES)])
    groups = [ATTACKS[n % 10] for n in range(NUM_TRAIN)]
    path = write_report(
        scores,
        tmp_path / "report.html",
        render=render,
        columns={"label": groups, HOSTILE: groups},
        query_columns={"label": groups[:NUM_QUERIES], HOSTILE: groups[:NUM_QUERIES]},
        compare={HOSTILE: Scores(scores.values.flip(1))},
        title=HOSTILE,
    )
    page = browser.new_page()
    problems = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    for tab in ("queries", "triage", "groups", "compare", "about", "query-1", "train-0"):
        page.goto(f"{path.as_uri()}#{tab}")
        page.wait_for_timeout(30)
        assert page.evaluate("window.hit") is None
        assert page.locator("iframe").count() == 0
        assert page.locator("script").count() == 2
    assert HOSTILE in page.inner_text("dialog")
    page.close()
    assert problems == []


def test_an_addition_helps_where_its_score_is_negative(browser, tmp_path):
    scores = Scores(torch.tensor([[-2.0, 1.0, -1.0]]))
    scores.provenance["pool"] = {"size": 3, "in_training": 0, "same": []}
    scores.provenance["edits"] = [{"kind": "Addition"}] * 3
    page = browser.new_page()
    page.goto(write_report(scores, tmp_path / "report.html").as_uri())
    items = page.query_selector_all("#tail-proponent li")
    assert [item.get_attribute("data-train") for item in items] == ["0", "2"]
    assert page.inner_text("#tail-proponent h3").startswith("Would help most")
    assert page.locator(".mark-buttons").count() == 0  # they are not in training
    page.close()
