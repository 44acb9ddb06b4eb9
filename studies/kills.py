"""Kill runs at random moments, let them go on, and compare what comes out with runs that nothing interrupted.

python studies/kills.py [kills=50] [seed=0]     works in logs/kills, which is emptied first; a few seconds a kill

Half of the kills hit a staged run, half an offline-to-online one: SIGKILL, or by turns SIGTERM, at a moment drawn
uniformly from the first seconds of a process, so that some come while it starts, some in updates, evaluations and
checkpoints, and some while it ends. What must be the same: the weights of every stage, the optimizer's moments, the
replay, `metrics.csv` and the episodes of the last evaluation, bit for bit.
"""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from common import LOGS, ROOT, is_done

FOLDER = LOGS / "kills"
LATEST = 20.0  # seconds after the start of a process at which a kill comes at the latest
FILES = ("metrics.csv", "episodes.json", "replay/online_0.bin")

SETTINGS = ["experiment=pointmaze", "threads=1", "networks.hidden=[32,32]", "logger=csv", "updates=1500"]
SETTINGS += [f"paths.data={FOLDER}/data", "data.source.download=false", "data.source.generate_if_missing=true"]
SETTINGS += ["data.source.generate_episodes=4", "data.batch_size=32", "eval.every=500", "eval.episodes=2"]
SETTINGS += ["validate_every=250", "checkpoint_every=50", "trainer.log_every_n_steps=50", "diversity.states=0"]
STAGES = {"staged": [], "offline_to_online": ["updates=500", "online_updates=1500"]}


def main(kills: int, seed: int) -> int:
    """Returns the number of differences."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    rng = random.Random(seed)
    differences = 0
    for number, stages in enumerate(STAGES):
        settings = [*SETTINGS, f"stages={stages}", *STAGES[stages]]
        whole = FOLDER / f"{stages}_whole"
        train([*settings, f"hydra.run.dir={whole}"])
        left, run = kills // 2 + (number < kills % 2), 0
        while left:
            folder = FOLDER / f"{stages}_{run}"
            done = campaign(folder, settings, left, rng)
            found = list(compare(folder, whole))
            print(f"{stages} run {run}: {done} kills, {len(found)} differences {' '.join(found)}", flush=True)
            left, run, differences = left - done, run + 1, differences + len(found)
    print(f"{kills} kills, {differences} differences")
    return differences


def campaign(folder: Path, settings: list[str], kills: int, rng: random.Random) -> int:
    """Train in `folder` through at most so many kills; how many there were."""
    done = 0
    while not is_done(folder):
        begun = (folder / "config.yaml").exists()
        arguments = [f"resume={folder}"] if begun else [*settings, f"hydra.run.dir={folder}"]
        if done == kills:
            train(arguments)
            continue
        process = subprocess.Popen([sys.executable, "train.py", *arguments], cwd=ROOT, stdout=subprocess.DEVNULL)
        try:
            process.wait(timeout=rng.uniform(0, LATEST))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM if done % 2 else signal.SIGKILL)
            done += 1
        status = process.wait()
        if status not in (0, -signal.SIGKILL, -signal.SIGTERM, 128 + signal.SIGTERM):
            raise SystemExit(f"{folder} ended with status {status}")
    return done


def train(arguments: list[str]) -> None:
    subprocess.run([sys.executable, "train.py", *arguments], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def compare(folder: Path, whole: Path) -> Iterator[str]:
    """What differs."""
    for path in sorted(whole.rglob("final.ckpt")):
        name = str(path.relative_to(whole))
        checkpoints = [torch.load(each / name, weights_only=True) for each in (folder, whole)]
        for key in ("state_dict", "optimizer_states"):
            if not same(*(checkpoint[key] for checkpoint in checkpoints)):
                yield f"{name}:{key}"
    for name in FILES:
        if (whole / name).exists() and (folder / name).read_bytes() != (whole / name).read_bytes():
            yield name


def same(a: Any, b: Any) -> bool:
    """Whether two nests of tensors and plain values are equal to the bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


if __name__ == "__main__":
    options = {"kills": 50, "seed": 0}
    started = time.perf_counter()
    for argument in sys.argv[1:]:
        name, _, value = argument.partition("=")
        if name not in options or not value.isdigit():
            sys.exit(__doc__)
        options[name] = int(value)
    status = main(**options)
    print(f"{(time.perf_counter() - started) / 60:.1f} min")
    sys.exit(status > 0)
