"""Configurations in files name components and nothing else, whatever command reads them and wherever they stand."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from omegaconf import OmegaConf

from deflow.command_line import choices
from deflow.config import plain
from deflow.errors import UserError
from deflow.run_folder import CONFIG_FILE
from deflow.stored import checked, load_config
from deflow.trust import trust_only
from tests.calls import call
from tests.conftest import CKPT, compose_config

pytestmark = pytest.mark.usefixtures("short_episodes")

MISSING = {"custom": "data.source.path=own.npz", "minari": "data.source.dataset_id=some/set-v0"}  # what one has to give


@pytest.fixture(autouse=True)
def _nobody_is_trusted() -> Iterator[None]:
    trust_only(())
    yield
    trust_only(())


@pytest.fixture(scope="module")
def sound() -> dict[str, Any]:
    """A configuration as a file holds it."""
    return plain(compose_config("experiment=pointmaze", "stages=staged"))


def put(config: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    """A copy with `value` at `key`."""
    changed = copy.deepcopy(config)
    *outer, last = key.split(".")
    node = changed
    for name in outer:
        node = node[name]
    node[last] = value
    return changed


@pytest.mark.parametrize(
    "choice",
    [
        *(f"experiment={name}" for name in choices("experiment")),
        *(f"experiment=online/{name}" for name in choices("experiment/online")),
        *(
            f"{group}={name}"
            for group in ("agent", "agent/critic", "solver", "stages", "trainer", "logger")
            for name in choices(group)
        ),
    ],
)
def test_every_configuration_of_the_project_passes(choice: str) -> None:
    given = [MISSING[choice.partition("=")[2]]] if choice.partition("=")[2] in MISSING else []
    config = plain(compose_config(choice, *given))
    assert checked(config, Path("config.yaml")) == config


TARGETS = [
    {"_target_": "torch.hub.load", "repo_or_dir": "somebody/something", "model": "evil"},
    {"_target_": "os.system", "command": "touch {ran}"},
    {"_target_": "subprocess.Popen", "args": ["touch", "{ran}"]},
    {"_target_": "builtins.eval", "source": "open('{ran}', 'w')"},
    {"_target_": "deflow.config.os.system", "command": "touch {ran}"},
    {"_target_": "deflow.data.sources.minari.json.loads", "s": "1"},
    {"_target_": "functools.partial", "func": "os.system"},
    {"_target_": "hydra.utils.get_object", "path": "os.system"},
    {"_target_": "deflow.data.sources.download.download", "url": "http://127.0.0.1:9", "path": "{ran}"},
    {"_target_": "deflow.data.generate.runner.generate_dataset", "name": "x", "episodes": 1, "out": "{ran}"},
    {"_target_": "deflow.pipeline.train", "config": None, "folder": "{ran}"},
    {"_target_": "deflow.loggers.CsvMetrics", "path": "{ran}"},  # of this package, but no component
    {"_target_": "deflow.data.sources.custom.Source"},  # imported there
    {"_target_": "deflow.agents.deflow"},
    {"_target_": "deflow.agents.deflow.DeFlow.losses"},
    {"_target_": "deflow.nothing.Here"},
    {"_target_": "deflow...data.Source"},
    {"_target_": "deflow/agents/deflow.DeFlow"},
    {"_target_": "torch.optim.LBFGS"},
    {"_target_": "torch.optim.lr_scheduler.LambdaLR", "lr_lambda": "x"},
    {"_target_": "mylab.agents.Mine"},
    {"_target_": ["os.system"]},
    {"_target_": None},
]
PLACES = [
    "agent",
    "agent.optimizer",
    "agent.behavior_flow.solver",
    "data",
    "data.source",
    "trainer",
    "trainer.callbacks",
    "logger",
    "stages.behavior",
    "stages.behavior.train",
    "networks",
    "iav.rule",
    "name",
]


def written(node: dict[str, Any], ran: Path) -> dict[str, Any]:
    """The node with the place of what it would create."""
    return yaml.safe_load(yaml.safe_dump(node).replace("{ran}", str(ran)))


@pytest.mark.parametrize("node", TARGETS, ids=lambda node: str(node["_target_"]))
def test_targets_that_are_no_components(node: dict[str, Any], sound: dict[str, Any], tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    for place in PLACES:
        with pytest.raises(UserError, match=r"config\.yaml: ") as raised:
            checked(put(sound, place, written(node, ran)), Path("config.yaml"))
        assert place in str(raised.value)
        assert "\n" not in str(raised.value)
    for nested in ([node], [{"deep": [[written(node, ran)]]}], {"deep": {"deeper": written(node, ran)}}):
        with pytest.raises(UserError, match="which a file may not"):
            checked(put(sound, "agent.behavior_flow.hidden", nested), Path("config.yaml"))
    assert list(tmp_path.iterdir()) == []
    assert "mylab" not in sys.modules


@pytest.mark.parametrize(
    "key,value,says",
    [
        ("agent.nonsense", 1, "agent gives deflow.agents.deflow.DeFlow the unknown argument 'nonsense'"),
        ("agent.critic.horizon", 1, "the unknown argument 'horizon'"),
        ("trainer.nonsense", 1, "trainer gives lightning.Trainer the unknown argument 'nonsense'"),
        ("agent.optimizer.nonsense", 1, "the unknown argument 'nonsense'"),
        ("data.source._args_", [1], "data.source holds '_args_'"),
        ("agent._mode_", "x", "agent holds '_mode_'"),
        ("networks._partial_", True, "networks holds '_partial_'"),
        ("name", "${oc.env:HOME}", "name holds an interpolation"),
        ("stages.behavior.train", ["${run_folder:x,y,null}"], "holds an interpolation"),
        ("networks", {"${a}": 1}, "holds the name '${a}'"),
        ("networks", {3: 1}, "holds the name 3"),
        ("networks.hidden", torch.zeros(3), "networks.hidden holds a Tensor"),
        ("networks.hidden", {1, 2}, "networks.hidden holds a set"),
        (
            "agent",
            {"_target_": "deflow.modules.critic.Critic"},
            "agent names deflow.modules.critic.Critic, which is of",
        ),
        ("agent", {"_target_": "deflow.loggers.csv_only"}, "which is of another kind"),
        ("logger", {"_target_": "torch.optim.Adam"}, "which is of another kind"),
        ("data.source", None, "data.source is missing"),
        ("data", [], "data is missing"),
        ("data.source.env", "own_envs:pointmaze-medium", "data.source.env names code of 'own_envs'"),
        (
            "data.source",
            {"_target_": "deflow.data.sources.custom.CustomSource", "env": "own_envs:A-v0"},
            "code of 'own_envs'",
        ),
    ],
)
def test_what_is_wrong_is_named(key: str, value: Any, says: str, sound: dict[str, Any]) -> None:
    with pytest.raises(UserError) as raised:
        checked(put(sound, key, value), Path("config.yaml"))
    assert says in str(raised.value)


def test_a_structure_that_contains_itself(sound: dict[str, Any]) -> None:
    ring: list[Any] = []
    ring.append(ring)
    with pytest.raises(UserError, match="deeper than any configuration"):
        checked(put(sound, "networks.hidden", ring), Path("config.yaml"))


@pytest.mark.parametrize(
    "content",
    [b"", b"[1]", b"3", b"a: [", b"a: {b", b"\xff\xfe\x00", b"a: !!python/object/apply:os.system [ls]", b"a: &a [*a]"],
)
def test_a_damaged_file_is_one_line(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / CONFIG_FILE
    path.write_bytes(content)
    with pytest.raises(UserError, match=CONFIG_FILE):
        load_config(path)


def test_nothing_is_resolved_when_a_file_is_read(
    sound: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    called = []
    OmegaConf.register_new_resolver("marks", lambda: called.append(1), replace=True)
    path = tmp_path / CONFIG_FILE
    path.write_text(yaml.safe_dump(put(sound, "name", "${marks:}")))
    with pytest.raises(UserError, match="interpolation"):
        load_config(path)
    assert called == []
    OmegaConf.clear_resolver("marks")


def test_a_file_cannot_trust(sound: dict[str, Any]) -> None:
    own = put(put(sound, "trust", ["mylab"]), "agent", {"_target_": "mylab.Mine", "whatever": {"_target_": "mylab.f"}})
    with pytest.raises(UserError, match=r"names mylab.Mine, which a file may not: a package .* trust=\[PACKAGE\]"):
        checked(own, Path("config.yaml"))
    trust_only(["mylab"])
    checked(own, Path("config.yaml"))
    with pytest.raises(UserError, match=r"os\.system"):
        checked(put(own, "agent.whatever", {"_target_": "os.system"}), Path("config.yaml"))


# Every command, and every way in.


def change(run: Path, name: str | Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    """Edit the configuration in a run's file."""
    if Path(name).suffix == ".ckpt":
        content = torch.load(run / name, weights_only=True)
        edit(content["deflow"]["config"])
        torch.save(content, run / name)
    else:
        content = yaml.safe_load((run / name).read_text())
        edit(content)
        (run / name).write_text(yaml.safe_dump(content))


WAYS = [
    ("evaluate", CKPT),
    ("export", CKPT),
    ("distill", CKPT),
    ("inspect_data", CKPT),
    ("train ckpt", CKPT),
    ("resume", CONFIG_FILE),
    ("resume", CKPT),
    ("resume", CKPT.with_name("last.ckpt")),
]


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("key", ["agent.optimizer", "data.source", "trainer", "logger"])
@pytest.mark.parametrize("name,file", WAYS)
def test_no_command_runs_what_a_file_names(
    name: str, file: str | Path, key: str, run: Path, point_data: Path, tmp_path: Path
) -> None:
    if name == "resume" and file == CKPT.with_name("last.ckpt"):
        (run / CKPT).unlink()  # so that the stage is not done
    evil = {"_target_": "os.system", "command": f"touch {tmp_path}/ran"}
    outer, _, last = key.rpartition(".")
    change(run, file, lambda config: (config[outer] if outer else config).update({last: evil}))
    before = snapshot(run)
    with pytest.raises(UserError, match=rf"{Path(file).name}: {key} names os\.system"):
        call(name, run, point_data, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert snapshot(run) == before


def test_an_own_package_that_the_command_line_trusts(
    run: Path, point_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mylab_of_tests.py").write_text(
        "from deflow.agents.deflow import DeFlow\n\n\nclass Mine(DeFlow):\n"
        "    def __init__(self, *args, taste=0, **settings):\n        super().__init__(*args, **settings)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    for file in (CONFIG_FILE, CKPT):
        change(run, file, lambda config: config["agent"].update(_target_="mylab_of_tests.Mine", taste=3))
    for name in ("evaluate", "export", "distill", "inspect_data", "train ckpt", "resume"):
        with pytest.raises(UserError, match=r"names mylab_of_tests\.Mine"):
            call(name, run, point_data, tmp_path / name)
        assert not (tmp_path / name).exists()
    assert "mylab_of_tests" not in sys.modules
    for name in ("evaluate", "export", "distill", "inspect_data", "train ckpt", "resume"):
        call(name, run, point_data, tmp_path / name, "trust=[mylab_of_tests]")
