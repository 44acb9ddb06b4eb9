"""What happens when something is wrong: every case is run as a user would, and its exit status and last line are shown.

python studies/faults.py [ONLY]     prints the table of docs/reliability.md; ONLY: cases whose name holds this text

The exit status of this script is that of the comparison with what is expected of each case.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil
import torch
from common import ROOT
from filelock import FileLock

TINY = "networks.hidden=[16,16] updates=6 eval.every=3 eval.episodes=1 eval.num_envs=1 validate_every=3 logger=csv "
TINY += "checkpoint_every=2 data.batch_size=8 data.validation_batches=2 trainer.log_every_n_steps=2 threads=1 "
TINY += "diversity.states=0"
SET = "pointmaze-medium-navigate-v0"
JOINT = "checkpoints/0_joint/final.ckpt"


@dataclass
class Case:
    """A command that goes wrong, or must not.

    `arguments` may hold {dir}, a folder of the case's own; {data}, of a data set; {run} and {long}, of a finished run
    and of one that a signal stopped; {url}, a server with the data set.
    """

    name: str
    script: str
    arguments: str
    status: int
    says: str  # in the last line
    prepare: Callable[[Path, Place], Any] = lambda folder, place: None
    strike: Callable[[subprocess.Popen, Path], None] = lambda process, folder: None  # while the command runs
    leaves: Callable[[Path], bool] = lambda folder: True  # what must hold afterwards
    environment: dict[str, str] = field(default_factory=dict)


@dataclass
class Place:
    """What all cases share."""

    root: Path
    url: str

    @property
    def data(self) -> Path:
        return self.root / "data"

    @property
    def run(self) -> Path:
        return self.root / "run"

    @property
    def stopped(self) -> Path:
        return self.root / "stopped"


# What a case finds.


def files_of_somebody(folder: Path, place: Place) -> None:
    for name in ("train.py", "README.md", "train.log"):
        (folder / name).write_text("somebody's")


def keeps_files_of_somebody(folder: Path) -> bool:
    return sorted(path.name for path in folder.iterdir()) == ["README.md", "train.log", "train.py"]


def copy_of_run(folder: Path, place: Place) -> None:
    shutil.copytree(place.run, folder / "run")


def copy_of_stopped(folder: Path, place: Place) -> None:
    shutil.copytree(place.stopped, folder / "run")


def broken(path: str, content: bytes, source: Callable[[Path, Place], None] = copy_of_stopped) -> Callable:
    def prepare(folder: Path, place: Place) -> None:
        source(folder, place)
        (folder / "run" / path).write_bytes(content)

    return prepare


def hostile_checkpoint(folder: Path, place: Place) -> None:
    """One whose agent is a call that would leave a file."""
    checkpoint = torch.load(place.run / JOINT, weights_only=True)
    checkpoint["deflow"]["config"]["agent"] = {"_target_": "os.mkdir", "path": str(folder / "ran")}
    torch.save(checkpoint, folder / "hostile.ckpt")


def hostile_run(folder: Path, place: Place) -> None:
    copy_of_stopped(folder, place)
    path = folder / "run" / "config.yaml"
    path.write_text(re.sub(r"_target_: \S+Adam\b", "_target_: torch.hub.load", path.read_text()))


def did_not_run(folder: Path) -> bool:
    return not (folder / "ran").exists()


def broken_data(folder: Path, place: Place) -> None:
    for suffix in ("", "-val"):
        shutil.copy(place.data / f"{SET}{suffix}.npz", folder)
    file = folder / f"{SET}.npz"
    file.write_bytes(file.read_bytes()[:-500])


def part_of_another_file(folder: Path, place: Place) -> None:
    (folder / f"{SET}.npz.part").write_bytes(b"begun long ago")


def training_file_alone(folder: Path, place: Place) -> None:
    shutil.copy(place.data / f"{SET}.npz", folder)


def a_data_set(folder: Path, place: Place) -> None:
    for suffix in (".npz", "-val.npz"):
        shutil.copy(place.data / f"{SET}{suffix}", folder)


def corrupt_data_base(folder: Path, place: Place) -> None:
    (folder / "mlflow.db").write_bytes(b"not a data base" * 1000)


def locked_data_base(folder: Path, place: Place) -> None:
    """Whole, and written to by somebody who does not end."""
    a_data_base(folder, place)
    connection = sqlite3.connect(folder / "mlflow.db", check_same_thread=False)
    connection.execute("BEGIN EXCLUSIVE")
    HELD.append(connection)


def a_data_base(folder: Path, place: Place) -> None:
    shutil.copy(place.root / "mlflow.db", folder)


def held_by_another(path: str, seconds: float) -> Callable[[Path, Place], None]:
    def prepare(folder: Path, place: Place) -> None:
        lock = FileLock(folder / path, thread_local=False)
        lock.acquire()
        threading.Timer(seconds, lock.release).start()

    return prepare


def stopped_run_in_use(folder: Path, place: Place) -> None:
    copy_of_stopped(folder, place)
    held_by_another("run/.lock", 60)(folder, place)


def a_text_in_a_folder(folder: Path, place: Place) -> None:
    (folder / "run").mkdir()
    (folder / "run" / "README").write_text("no")


HELD: list[Any] = []  # as long as the cases run


# What happens to a command while it runs.


def terminated_after(seconds: float) -> Callable[[subprocess.Popen, Path], None]:
    def strike(process: subprocess.Popen, folder: Path) -> None:
        time.sleep(seconds)
        process.send_signal(signal.SIGTERM)

    return strike


def after_rows(number: int, act: Callable[[subprocess.Popen], None]) -> Callable[[subprocess.Popen, Path], None]:
    """`act` once `metrics.csv` has so many lines."""

    def strike(process: subprocess.Popen, folder: Path) -> None:
        metrics = folder / "run" / "metrics.csv"
        while process.poll() is None and not (metrics.exists() and len(metrics.read_text().splitlines()) >= number):
            time.sleep(0.05)
        act(process)

    return strike


def send(number: int) -> Callable[[subprocess.Popen], None]:
    return lambda process: process.send_signal(number)


def kill_a_worker(process: subprocess.Popen, folder: Path) -> None:
    def workers() -> list[psutil.Process]:
        children = psutil.Process(process.pid).children()
        return [child for child in children if "spawn_main" in " ".join(child.cmdline())]

    while process.poll() is None and len(workers()) < 2:
        time.sleep(0.1)
    workers()[0].kill()


def lock_the_data_base(process: subprocess.Popen, folder: Path) -> None:
    def lock(_: subprocess.Popen) -> None:
        connection = sqlite3.connect(folder / "mlflow.db", check_same_thread=False, timeout=60)
        connection.execute("BEGIN EXCLUSIVE")
        HELD.append(connection)

    after_rows(3, lock)(process, folder)


LONG = f"experiment=pointmaze {TINY} updates=1000000 checkpoint_every=1000 eval.every=1000000 paths.data={{data}}"
LONG += " trainer.log_every_n_steps=50 hydra.run.dir={dir}/run"
SHORT = f"experiment=pointmaze {TINY} paths.data={{data}} hydra.run.dir={{dir}}/run"
GO_ON = r"go on by python train\.py resume="


def refused(name: str, setting: str, says: str, **more: Any) -> Case:
    """A training run with a setting that cannot be; nothing may be left of it."""
    return Case(name, "train.py", f"{SHORT} {setting}", 2, says, leaves=leaves_no_run, **more)


def leaves_no_run(folder: Path) -> bool:
    return not (folder / "run").exists()


CASES = [
    # A. Lost or foreign files.
    Case(
        "a failing run in a folder with files",
        "train.py",
        f"experiment=pointmaze {TINY} paths.data={{data}} hydra.run.dir={{dir}} ckpt=nowhere.ckpt",
        2,
        "no checkpoint .*nowhere.ckpt",
        files_of_somebody,
        leaves=keeps_files_of_somebody,
    ),
    Case("a new run in a run's folder", "train.py", SHORT, 2, "holds a run already: go on with it by", copy_of_run),
    Case(
        "a second process in a run's folder",
        "train.py",
        "resume={dir}/run",
        2,
        "is in use by another process|is in use by process",
        stopped_run_in_use,
    ),
    Case(
        "a lock that another process holds for 8 s",
        "generate.py",
        f"dataset={SET} out={{dir}} episodes=1 steps=20 workers=1",
        0,
        "wrote ",
        held_by_another(f".{SET}.lock", 8),
    ),
    Case(
        "generate into a folder with that set",
        "generate.py",
        f"dataset={SET} out={{dir}} episodes=1 steps=20",
        2,
        "overwrite=true",
        a_data_set,
    ),
    Case("resume a finished run", "train.py", "resume={dir}/run", 0, "report.png", copy_of_run),
    Case(
        "the part of another download",
        "train.py",
        f"experiment=pointmaze {TINY} paths.data={{dir}} data.source.url={{url}} hydra.run.dir={{dir}}/run",
        0,
        "report.png",
        part_of_another_file,
    ),
    Case(
        "a downloaded file that is broken",
        "train.py",
        f"experiment=pointmaze {TINY} paths.data={{dir}} data.source.url={{url}} hydra.run.dir={{dir}}/run",
        0,
        "report.png",
        broken_data,
        leaves=lambda folder: len(list(folder.glob(f"{SET}.npz*"))) > 1,  # the broken one is set aside
    ),
    Case(
        "MLflow's data base is locked while a run trains",
        "train.py",
        f"{SHORT} updates=600 logger=mlflow logger.tracking_uri=sqlite:///{{dir}}/mlflow.db eval.every=600",
        0,
        "report.png|mlflow|MLflow",
        strike=lock_the_data_base,
    ),
    # B. Code in files.
    *(
        Case(
            f"a checkpoint that names os.mkdir: {script}",
            script,
            arguments,
            2,
            "os.mkdir",
            hostile_checkpoint,
            leaves=did_not_run,
        )
        for script, arguments in {
            "evaluate.py": "ckpt={dir}/hostile.ckpt",
            "distill.py": "ckpt={dir}/hostile.ckpt hydra.run.dir={dir}/run",
            "inspect_data.py": "task=pointmaze_medium paths.data={data} ckpt={dir}/hostile.ckpt out={dir}/out",
            "train.py": f"{SHORT} ckpt={{dir}}/hostile.ckpt",
        }.items()
    ),
    Case("a run's folder that names torch.hub.load", "train.py", "resume={dir}/run", 2, "torch.hub.load", hostile_run),
    # C. Signals.
    *(
        Case(
            f"SIG{number.name[3:]} in training",
            "train.py",
            LONG,
            128 + number,
            f"stopped by {number.name}: {GO_ON}",
            strike=after_rows(4, send(number)),
        )
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    ),
    Case(
        "SIGTERM before the first update",
        "train.py",
        LONG,
        143,
        "stopped by SIGTERM",
        strike=terminated_after(2),
        leaves=leaves_no_run,
    ),
    Case(
        "SIGTERM while Python imports",
        "evaluate.py",
        f"ckpt={{run}}/{JOINT}",
        143,
        "stopped by SIGTERM",
        strike=terminated_after(1.2),
    ),
    Case(
        "a worker of generate.py is killed",
        "generate.py",
        f"dataset={SET} out={{dir}} episodes=50000 workers=2",
        2,
        "was killed: generate it again",
        strike=kill_a_worker,
    ),
    Case(
        "SIGTERM to one of two processes",
        "train.py",
        f"{LONG} trainer=ddp_sim",
        143,
        f"stopped by SIGTERM: {GO_ON}",
        strike=after_rows(4, send(signal.SIGTERM)),
    ),
    # D. Plain mistakes.
    *(
        refused(setting, setting, says)
        for setting, says in {
            "seed=abc": "seed must be a whole number from 0 to 4294967295, got 'abc'",
            "seed=-1": "seed must be a whole number from 0 to 4294967295, got -1",
            "seed=4294967296": "seed must be a whole number",
            "updates=abc": "must be a whole number of at least 1, got 'abc'",
            "updates=60.5": "must be a whole number of at least 1, got 60.5",
            "updates=1e2": "must be a whole number of at least 1, got 100.0",
            "agent.optimizer.lr=-1": "agent.optimizer.lr must be a number above 0, got -1",
            "agent.optimizer.lr=nan": "agent.optimizer.lr must be a number above 0, got nan",
            "networks.hidden=[-3]": "networks.hidden must be",
            "networks.hidden=abc": "networks.hidden must be",
            "networks.hidden=[]": "networks.hidden must be",
            "threads=0": "threads must be a whole number of at least 1",
            "trainer.precision=foo": "trainer.precision must be",
            "trainer.devices=0": "trainer.devices must be",
            "trainer=gpu": "torch finds no GPU here: choose trainer=cpu",
            "trainer.log_every_n_steps=0": "trainer.log_every_n_steps must be",
            "+trainer.fast_dev_run=true": "no setting 'trainer.fast_dev_run'",
            "trainer=ddp_sim trainer.devices=300": "processes would share",
            "trainer=ddp_sim data.batch_size=7": "does not divide by the 2 processes",
            "agent.optimizer._target_=torch.optim.LBFGS": "must be one of torch.optim.Adam",
            "eval.seed=-5": "eval.seed must be",
            "networks.activation=swish": "networks.activation must be gelu or gelu_tanh",
            "tau=0": "tau must be",
            "tau=2": "tau must be",
            "tau=-0.1": "tau must be",
            "+stages.joint.lr=-1": "stages.joint.lr must be",
            "agent=flow_bc task.discount=7": "task.discount must be",
            "updatesz=5": "no setting 'updatesz': did you mean 'updates'",
            "agent.best_off_n=5": "did you mean 'agent.best_of_n'",
            "+nonsense=1": "no setting 'nonsense'",
            "agent=rlpd stages=staged": "stages=from_scratch",
            "paths.data=/dev/null": "is not a folder",
        }.items()
    ),
    Case(
        "neither a task nor an experiment",
        "train.py",
        f"{TINY} hydra.run.dir={{dir}}/run",
        2,
        "nothing to train on",
    ),
    Case("a run's folder that is a file", "train.py", SHORT, 2, "folder", lambda folder, _: (folder / "run").touch()),
    refused(
        "MUJOCO_GL=osmesa without its library",
        "video.episodes=1",
        "MUJOCO_GL|OSMesa|osmesa",
        environment={"MUJOCO_GL": "osmesa"},
    ),
    Case("evaluate num_envs=0", "evaluate.py", "ckpt={run}/" + JOINT + " num_envs=0", 2, "num_envs must be"),
    Case("evaluate seed=abc", "evaluate.py", "ckpt={run}/" + JOINT + " seed=abc", 2, "seed must be"),
    Case("evaluate another task's", "evaluate.py", "ckpt={run}/" + JOINT + " task=scene", 2, "is a checkpoint of"),
    Case("distill lr=-1", "distill.py", "ckpt={run}/" + JOINT + " lr=-1 hydra.run.dir={dir}/run", 2, "lr must be"),
    Case("benchmark batch_size=0", "benchmark.py", "batch_size=0 out={dir}/b.json", 2, "batch_size must be"),
    Case("benchmark updates=0", "benchmark.py", "updates=0 out={dir}/b.json", 2, "updates must be"),
    Case(
        "MLflow's data base is locked",
        "train.py",
        f"{SHORT} logger=mlflow logger.tracking_uri=sqlite:///{{dir}}/mlflow.db",
        2,
        "locked",
        locked_data_base,
        leaves=leaves_no_run,
    ),
    Case(
        "MLflow's data base is corrupt",
        "train.py",
        f"{SHORT} logger=mlflow logger.tracking_uri=sqlite:///{{dir}}/mlflow.db",
        2,
        "mlflow.db",
        corrupt_data_base,
        leaves=leaves_no_run,
    ),
    Case(
        "no MLflow server",
        "train.py",
        f"{SHORT} logger=mlflow logger.tracking_uri=http://127.0.0.1:9",
        2,
        "no MLflow server answers",
        leaves=leaves_no_run,
    ),
    Case(
        "a checkpoint that is none",
        "evaluate.py",
        "ckpt={dir}/run/README",
        2,
        "not a whole checkpoint",
        a_text_in_a_folder,
    ),
    Case(
        "a checkpoint of something else",
        "evaluate.py",
        "ckpt={dir}/a.ckpt",
        2,
        "is a checkpoint of something else",
        lambda folder, _: torch.save([1, 2], folder / "a.ckpt"),
    ),
    Case("a damaged config.yaml", "train.py", "resume={dir}/run", 2, "config.yaml", broken("config.yaml", b"{[")),
    Case(
        "a damaged metrics.csv",
        "train.py",
        "resume={dir}/run",
        2,
        "metrics.csv",
        broken("metrics.csv", b"\xff\xfe\x00step,\n1,2,3"),
    ),
    Case(
        "a data set without its validation file",
        "train.py",
        f"experiment=pointmaze {TINY} paths.data={{dir}} data.source.download=false hydra.run.dir={{dir}}/run",
        2,
        "-val.npz",
        training_file_alone,
    ),
    Case(
        "a sweep",
        "train.py",
        f"-m seed=0,1 experiment=pointmaze {TINY} paths.data={{data}} hydra.sweep.dir={{dir}}",
        0,
        "report.png",
    ),
    Case(
        "a sweep whose first job fails",
        "train.py",
        f"-m tau=7,0.1 experiment=pointmaze {TINY} paths.data={{data}} hydra.sweep.dir={{dir}}",
        2,
        "1 of 2 jobs failed",
        leaves=lambda folder: (folder / "1" / "summary.json").exists(),
    ),
    Case(
        "a path with = and a space",
        "evaluate.py",
        f"'ckpt={{dir}}/a =b/{JOINT}' episodes=1",
        0,
        "one decision",
        lambda folder, place: shutil.copytree(place.run, folder / "a =b"),
    ),
    Case("an open bracket", "train.py", f"{SHORT} networks.hidden=[16", 2, "close its brackets"),
]


def main(only: str) -> int:
    with tempfile.TemporaryDirectory() as root:
        server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=f"{root}/data"))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        place = Place(Path(root), f"http://127.0.0.1:{server.server_port}")
        furnish(place)
        chosen = [case for case in CASES if only in case.name]
        with ThreadPoolExecutor(2) as pool:  # two cores
            results = list(pool.map(partial(play, place=place), chosen))
    print("| case | exit status | last line |\n|---|---|---|")
    for case, (status, line, _) in zip(chosen, results, strict=True):
        print(f"| {case.name} | {status} | {line.replace('|', '/')} |")
    wrong = [case.name for case, (*_, right) in zip(chosen, results, strict=True) if not right]
    print(f"\n{len(chosen)} cases, {len(wrong)} not as expected {' '.join(wrong)}", file=sys.stderr)
    return len(wrong)


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        pass


def furnish(place: Place) -> None:
    """A data set, a finished run, one that a signal stopped, and MLflow's data base."""
    start("generate.py", [f"dataset={SET}", f"out={place.data}", "episodes=10", "steps=100", "workers=1"]).wait()
    settings = f"experiment=pointmaze {TINY} paths.data={place.data}".split()
    start("train.py", [*settings, f"hydra.run.dir={place.run}"]).wait()
    tracker = [f"logger.tracking_uri=sqlite:///{place.root}/mlflow.db", f"hydra.run.dir={place.root}/tracked"]
    start("train.py", [*settings, "logger=mlflow", *tracker]).wait()
    process = start("train.py", [*settings, "updates=100000", "eval.every=100000", f"hydra.run.dir={place.stopped}"])
    while not list(place.stopped.glob("checkpoints/*/last.ckpt")):
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    process.wait()


def start(script: str, arguments: list[str], **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, script, *arguments],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def play(case: Case, place: Place) -> tuple[int, str, bool]:
    """Exit status, last line, and whether both are as expected."""
    folder = place.root / re.sub(r"\W+", "_", case.name)
    folder.mkdir()
    case.prepare(folder, place)
    names = {"dir": folder, "data": place.data, "run": place.run, "url": place.url}
    arguments = [argument.format(**names) for argument in shlex.split(case.arguments)]
    process = start(case.script, arguments, **case.environment)
    threading.Thread(target=case.strike, args=(process, folder), daemon=True).start()
    output, _ = process.communicate()
    lines = [line.strip() for line in output.splitlines() if line.strip()] or [""]
    line = lines[-1].replace(str(folder), "DIR").replace(str(place.root), "DIR").replace(str(ROOT), ".")
    right = process.returncode == case.status and bool(re.search(case.says, line)) and case.leaves(folder)
    if not right:
        print(f"{case.name}: {' '.join(arguments)}\n{output[-2000:]}", file=sys.stderr)
    return process.returncode, line, right


if __name__ == "__main__":
    sys.exit(main(" ".join(sys.argv[1:])) > 0)
