"""Clients at a running service: how long they wait, and what an answer costs.

python -m experiments.serve.run RUN             # a run with an index: tda index RUN

For each number of clients and with batches on and off, a fresh `tda serve` answers searches of
different queries; every answer is compared with `index.search`. Writes results/load.json, from
which table.py makes the table of the README.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np

RESULTS = Path(__file__).parent / "results"
CLIENTS = (1, 10, 50)
K = 10


def main() -> None:
    """Measure, and keep the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", help="folder of a recorded run with an index")
    parser.add_argument("--searches", type=int, default=300, help="in each case")
    options = parser.parse_args()
    rows = []
    for clients in CLIENTS:
        for batch in (64, 1):
            rows.append(measured(options.run, clients, batch, options.searches))
            print({key: value for key, value in rows[-1].items() if key != "answers"}, flush=True)
    same = all(row.pop("answers") == rows[0]["answers"] for row in rows[1:])
    rows[0].pop("answers")
    if not same:
        raise RuntimeError("Answers differ between the cases.")
    RESULTS.mkdir(exist_ok=True)
    found = {"cores": os.cpu_count(), "load": os.getloadavg()[0], "rows": rows}
    (RESULTS / "load.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def measured(run: str, clients: int, batch: int, searches: int) -> dict[str, Any]:
    """One case."""
    command = [sys.executable, "-m", "tda_lightning.cli", "serve", run, "port=0", "threads=1"]
    command += [f"limits.batch={batch}", "limits.seconds=300"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as service:
        try:
            assert service.stdout is not None
            url = ""
            while not url:
                line = service.stdout.readline()
                found = re.search(r"http://\S+:\d+", line)
                url = found.group() if found else ""
                if not line:
                    raise RuntimeError("The service did not start.")
            return asyncio.run(asked(url, service.pid, clients, batch, searches))
        finally:
            service.send_signal(signal.SIGTERM)
            service.communicate()


async def asked(url: str, pid: int, clients: int, batch: int, searches: int) -> dict[str, Any]:
    """What clients that ask one query after another find."""
    async with httpx.AsyncClient(base_url=url, timeout=600) as client:
        queries = (await client.get("/health")).json()["queries"]
        await client.post("/search", json={"query": {"index": 0}, "k": K})  # the first one loads
        before = processor_seconds(pid), (await client.get("/health")).json()["searches"]
        waits: list[float] = []
        answers: dict[int, list[int]] = {}
        left = iter(range(searches))

        async def one() -> None:
            for number in left:
                index = number * 7 % queries
                began = time.perf_counter()
                response = await client.post("/search", json={"query": {"index": index}, "k": K})
                waits.append(time.perf_counter() - began)
                answer = response.raise_for_status().json()
                assert answer["query"] == {"index": index}, answer
                answers[index] = [found["index"] for found in answer["proponents"]]

        began = time.perf_counter()
        await asyncio.gather(*(one() for _ in range(clients)))
        seconds = time.perf_counter() - began
        walks = (await client.get("/health")).json()["searches"] - before[1]
    return {
        "clients": clients,
        "batch": batch,
        "searches": searches,
        "seconds": seconds,
        "processor_seconds": processor_seconds(pid) - before[0],
        "walks": walks,
        "median": float(np.median(waits)),
        "p95": float(np.quantile(waits, 0.95)),
        "answers": answers,
    }


def processor_seconds(pid: int) -> float:
    """Processor time of a process so far (Linux)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    main()
