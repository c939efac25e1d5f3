"""Measure every library on every work, each time in a fresh process, and print the table.

python -m experiments.benchmark.run                      the whole benchmark, resumed row by row
python -m experiments.benchmark.run --scale 0.02 --results trial.json --folder trial
python -m experiments.benchmark.run --write              the README's tables from kept results
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

# This process stays small and imports no torch: Linux hands its peak memory on to the children.
OURS = "tda-lightning"
RECORDED = ("lightning", "checkpoints", "online curvature")  # training, and with a recorder
# (work, job, checkpoints of the recorded run, libraries). The repeats are rounds over all rows, so
# that whatever else the machine does meets all libraries alike.
ROWS = (
    ("mlp", "ekfac", 3, (OURS, "floor", "kronfluence")),
    ("mlp", "ekfac+self", 3, (OURS, "kronfluence")),
    ("mlp", "tracin", 3, (OURS, "captum", "dattri")),
    ("mlp", "source blocks", 3, (OURS, "floor")),
    ("mlp", "source", 3, (OURS,)),
    ("mlp", "source+self", 3, (OURS,)),
    ("mlp", "fastif", 3, (OURS,)),
    ("mlp", "trak", 3, (OURS, "traker")),
    ("mlp", "training", 3, RECORDED),
    ("mlp", "unrolled", 3, (OURS,)),
    ("cnn", "ekfac", 3, (OURS, "floor", "kronfluence")),
    ("cnn", "ekfac+self", 3, (OURS, "kronfluence")),
    ("cnn", "tracin", 3, (OURS, "floor", "captum", "dattri")),
    ("cnn", "tracin+self", 3, (OURS,)),
    ("cnn", "source blocks", 3, (OURS, "floor")),
    ("cnn", "source", 3, (OURS,)),
    ("cnn", "source+self", 3, (OURS,)),
    ("cnn", "fastif", 3, (OURS,)),
    ("cnn", "training", 3, RECORDED),
    ("cnn", "unrolled", 3, (OURS,)),
)
# (what, its row, the row it is compared with, whether to be at least or at most this).
RATIOS = (
    ("EK-FAC: kronfluence / ours", "mlp ekfac kronfluence", f"mlp ekfac {OURS}", ">=", 10.0),
    ("EK-FAC: ours / floor", f"mlp ekfac {OURS}", "mlp ekfac floor", "<=", 1.1),
    ("EK-FAC: kronfluence / ours", "cnn ekfac kronfluence", f"cnn ekfac {OURS}", ">=", 3.5),
    ("EK-FAC: ours / floor", f"cnn ekfac {OURS}", "cnn ekfac floor", "<=", 2.0),
    ("TracIn: captum / ours", "cnn tracin captum", f"cnn tracin {OURS}", ">=", 1.5),
    ("TracIn: ours / floor", f"cnn tracin {OURS}", "cnn tracin floor", "<=", 1.3),
    ("TracIn: with / without self-influence", f"cnn tracin+self {OURS}", f"cnn tracin {OURS}",
     "<=", 1.15),
    ("EK-FAC: with / without self-influence", f"cnn ekfac+self {OURS}", f"cnn ekfac {OURS}",
     "<=", 1.15),
    ("EK-FAC: with / without self-influence", f"mlp ekfac+self {OURS}", f"mlp ekfac {OURS}",
     "<=", 1.15),
    ("kronfluence's EK-FAC / our SOURCE", "mlp ekfac kronfluence", f"mlp source {OURS}", ">=", 2.0),
    ("SOURCE: default / blocks alone", f"mlp source {OURS}", f"mlp source blocks {OURS}",
     "<=", 1.5),
    ("SOURCE / EK-FAC, ours", f"cnn source {OURS}", f"cnn ekfac {OURS}", "<=", 4.0),
    ("SOURCE: default / blocks alone", f"cnn source {OURS}", f"cnn source blocks {OURS}",
     "<=", 1.5),
    *(
        ratio
        for work in ("mlp", "cnn")
        for ratio in (
            ("recording: checkpoints / training", f"{work} training checkpoints",
             f"{work} training lightning", "<=", 1.02),
            ("recording: online curvature / training", f"{work} training online curvature",
             f"{work} training lightning", "<=", 1.08),
        )
    ),
)  # fmt: skip
# The same estimator without randomness on either side: the scores should be the same.
AGREEMENT = (("mlp", "empirical", 3, "kronfluence"), ("cnn", "empirical", 3, "kronfluence"))
TITLES = {
    "ekfac": "EK-FAC factors + scores",
    "ekfac+self": "the same + self-influence",
    "tracin": "TracIn, 3 checkpoints",
    "tracin+self": "the same + self-influence",
    "source blocks": "SOURCE, 3 segments, blocks alone",
    "source": "SOURCE, 3 segments",
    "source+self": "the same + self-influence",
    "unrolled": "exact unrolling of 12 steps",
    "fastif": "FastIF",
    "trak": "TRAK, 512 dimensions, 1 checkpoint",
    "training": "30 steps of training",
}
RESULTS = Path(__file__).parent / "results" / "benchmark.json"
README = Path(__file__).parent / "README.md"

PEERS = ("kronfluence", "captum", "dattri", "traker")
MARKS = ("<!-- benchmark -->", "<!-- end of benchmark -->")
Found = dict[str, float]


def measured(
    arguments: argparse.Namespace, work: str, job: str, count: int, library: str
) -> Found | None:
    """One fresh process; None where the library is not installed."""
    print(f"{work} {job} {library} ...", end=" ", file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "experiments.benchmark.measure", work, job, library]
    command += [str(arguments.folder / f"{work}-{count}")]
    command += [str(scores_path(arguments, work, job, library))]
    command += ["--scale", str(arguments.scale), "--threads", str(arguments.threads)]
    done = subprocess.run(command, capture_output=True, text=True)
    if "ModuleNotFoundError" in done.stderr and library in PEERS:
        print("not installed", file=sys.stderr, flush=True)
        return None
    if done.returncode:
        sys.exit(done.stderr)
    found: Found = json.loads(done.stdout.splitlines()[-1])
    found["load"] = os.getloadavg()[0]
    print(f"{found['seconds']:.1f} s, load {found['load']:.1f}", file=sys.stderr, flush=True)
    return found


def scores_path(arguments: argparse.Namespace, work: str, job: str, library: str) -> Path:
    return arguments.folder / f"{work}-{job}-{library}.pt"


def agreement(first: Path, second: Path) -> str:
    """How two matrices of scores compare, worked out in a process that may import torch."""
    program = (
        "import sys, torch\n"
        "a, b = (torch.load(path).double() for path in sys.argv[1:])\n"
        "slope = float((a * b).sum() / (b * b).sum())\n"
        "together = torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]\n"
        "rows = [torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(a, b)]\n"
        "print(f'{float(together):.6f} | {float(min(rows)):.6f} | {slope:.6f}')\n"
    )
    command = [sys.executable, "-c", program, str(first), str(second)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def table(results: dict[str, list[Found]]) -> str:
    lines = [
        "| work | job | library | wall s (median; all) | processor s | peak memory MB | "
        "others / ours: wall, processor, memory |",
        "|---|---|---|---|---|---|---|",
    ]
    for work, job, _, libraries in ROWS:
        ours = None
        for library in libraries:
            runs = results.get(f"{work} {job} {library}")
            if not runs:
                continue
            wall, cpu, memory = (
                statistics.median(run[key] for run in runs)
                for key in ("seconds", "cpu_seconds", "bytes")
            )
            every = ", ".join(f"{run['seconds']:.1f}" for run in runs)
            ratio = ""
            if ours is None:
                ours = (wall, cpu, memory)
            else:
                parts = zip((wall, cpu, memory), ours, strict=True)
                ratio = ", ".join(f"{other / own:.1f}" for other, own in parts)
            lines.append(
                f"| {work} | {TITLES[job]} | {library} | {wall:.1f} ({every}) | {cpu:.1f} | "
                f"{memory / 1e6:.0f} | {ratio} |"
            )
    return "\n".join(lines)


def ratios(results: dict[str, list[Found]]) -> str:
    """Ratios of the medians of rows that were measured in this run, wall and processor time."""
    lines = ["| work | ratio | wall | processor | should be |", "|---|---|---|---|---|"]
    for title, above, below, sense, bound in RATIOS:
        if not results.get(above) or not results.get(below):
            continue
        wall, cpu = (
            statistics.median(run[key] for run in results[above])
            / statistics.median(run[key] for run in results[below])
            for key in ("seconds", "cpu_seconds")
        )
        work = above.split()[0]
        lines.append(f"| {work} | {title} | {wall:.2f} | {cpu:.2f} | {sense} {bound:g} |")
    return "\n".join(lines)


def written(readme: str, found: dict[str, Any]) -> str:
    """The README with the tables of kept results between its two marks."""
    about = found["about"]
    text = (
        f"Scale {about['scale']:g} of the numbers of examples, {about['threads']} thread(s), torch "
        f"{about['torch']}.\n\n{table(found['rows'])}\n\n{ratios(found['rows'])}"
    )
    before, _, rest = readme.partition(MARKS[0])
    after = rest.partition(MARKS[1])[2]
    return f"{before}{MARKS[0]}\n\n{text}\n\n{MARKS[1]}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("runs/benchmark"))
    parser.add_argument("--scale", type=float, default=1.0, help="of the number of examples")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", nargs="*", help="works and jobs, such as 'mlp ekfac'")
    parser.add_argument("--results", type=Path, default=RESULTS, help="kept row by row")
    parser.add_argument("--write", action="store_true", help="only write the README's tables")
    arguments = parser.parse_args()
    if arguments.write:
        README.write_text(written(README.read_text(), json.loads(arguments.results.read_text())))
        return
    about = {
        "scale": arguments.scale,
        "threads": arguments.threads,
        "torch": metadata.version("torch"),
        "cores": os.cpu_count(),
    }
    kept = json.loads(arguments.results.read_text()) if arguments.results.exists() else {}
    if kept.get("about", about) != about:
        sys.exit(
            f"{arguments.results} was measured with {kept['about']}, now {about}: choose another "
            "file with --results, or remove it."
        )
    results: dict[str, list[Found]] = kept.get("rows", {})
    arguments.folder.mkdir(parents=True, exist_ok=True)
    if not (arguments.folder / f"recorded-{arguments.scale:g}").exists():
        command = [sys.executable, "-m", "experiments.benchmark.record", str(arguments.folder)]
        command += ["--scale", str(arguments.scale)]
        subprocess.run(command, check=True, capture_output=True)
        (arguments.folder / f"recorded-{arguments.scale:g}").touch()
    for number in range(1, arguments.repeats + 1):
        for work, job, count, libraries in ROWS:
            if arguments.only and f"{work} {job}" not in arguments.only:
                continue
            for library in libraries:
                runs = results.setdefault(f"{work} {job} {library}", [])
                if len(runs) >= number:
                    continue  # measured before an interruption
                found = measured(arguments, work, job, count, library)
                if found is None:
                    continue
                runs.append(found)
                text = json.dumps({"about": about, "rows": results}, indent=1)
                arguments.results.write_text(text + "\n")
    print(table(results))
    print()
    print(ratios(results))
    if not arguments.only:
        print("\n| work | scores against | correlation of all | lowest of a query | slope |")
        print("|---|---|---|---|---|")
        for work, job, count, library in AGREEMENT:
            for one in (OURS, library):
                measured(arguments, work, job, count, one)
            paths = [scores_path(arguments, work, job, one) for one in (OURS, library)]
            print(f"| {work} | {library}, EK-FAC of the empirical Fisher | {agreement(*paths)} |")
        for work in ("mlp", "cnn"):
            for library in ("captum", "dattri"):
                paths = [scores_path(arguments, work, "tracin", own) for own in (OURS, library)]
                if all(path.exists() for path in paths):
                    print(f"| {work} | {library}, TracIn | {agreement(*paths)} |")


if __name__ == "__main__":
    main()
