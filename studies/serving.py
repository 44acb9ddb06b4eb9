"""How long a served policy takes to answer, and how many answers there are, with one client and with many.

python studies/serving.py CKPT...     needs pip install 'deflow[serve]'; under a minute for each, on two cores

A server on one thread, and 1, 8 and 32 clients in another process, each of which asks again once it has its answer. The
quantiles are of the clients' round trips and, with "decide" before them, of what `server_timing` says. The first row, 0
clients, is of decisions without a server.
"""

from __future__ import annotations

import asyncio
import re
import signal
import subprocess
import sys
import time

import msgpack
import numpy as np
import torch
from common import ROOT
from websockets.asyncio.client import connect

import deflow
from deflow.evaluation.latency import latency

CLIENTS = (1, 8, 32)
COLUMNS = ("clients", "p50 ms", "p99 ms", "decide p50", "decide p99", "decided together", "answers/s")
WARM_UP, SECONDS = 1.0, 10.0


async def robot(port: int, until: float) -> list[tuple[float, float, float, int]]:
    """When each answer came, how long it took the client and the server (ms), how many were decided together."""
    found = []
    rng = np.random.default_rng(0)
    async with connect(f"ws://127.0.0.1:{port}", compression=None, max_size=None, proxy=None) as line:
        shape = msgpack.unpackb(await line.recv())["observation_shape"]
        while time.perf_counter() < until:
            data = rng.standard_normal(shape, dtype=np.float32).tobytes()
            observation = {b"__ndarray__": True, b"data": data, b"dtype": "<f4", b"shape": shape}
            asked = time.perf_counter()
            await line.send(msgpack.packb({"observation": observation}))
            timing = msgpack.unpackb(await line.recv())["server_timing"]
            now = time.perf_counter()
            found.append((now, 1e3 * (now - asked), timing["infer_ms"], timing["batch"]))
    return found


async def robots(port: int, clients: int) -> tuple[np.ndarray, float]:
    """All their answers but those of the warm-up, as `robot` has them, and the seconds in which they came."""
    begin = time.perf_counter() + WARM_UP
    found = await asyncio.gather(*(robot(port, begin + SECONDS) for _ in range(clients)))
    rows = np.array([row for each in found for row in each if row[0] > begin])
    return rows, rows[:, 0].max() - begin


def measure(ckpt: str, clients: int) -> list[float]:
    """A row of the table, but for its first column."""
    command = [sys.executable, "serve.py", f"ckpt={ckpt}", "port=0", "threads=1"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    port = re.search(r"ws://127\.0\.0\.1:(\d+)", process.stdout.readline())
    assert port is not None, "it does not serve"
    rows, seconds = asyncio.run(robots(int(port[1]), clients))
    process.send_signal(signal.SIGTERM)
    process.communicate()
    times = [value for column in (1, 2) for value in np.quantile(rows[:, column], [0.5, 0.99])]
    together = len(rows) / (1 / rows[:, 3]).sum()  # each answer has the size of its batch, which shall count once
    return [*times, together, len(rows) / seconds]


def main(ckpts: list[str]) -> None:
    torch.set_num_threads(1)
    for ckpt in ckpts:
        print(f"\n{ckpt}\n\n| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
        alone = latency(deflow.load(ckpt)).values()
        print(f"| 0 | | | {' | '.join(f'{value:.2f}' for value in alone)} | | |")
        for clients in CLIENTS:
            *times, answers = measure(ckpt, clients)
            print(f"| {clients} | {' | '.join(f'{value:.2f}' for value in times)} | {answers:.0f} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
