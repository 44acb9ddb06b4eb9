"""Every setting is described, and a value that it may not have is refused in words."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from deflow.checks import check
from deflow.command_line import choices
from deflow.errors import UserError
from deflow.sections import OPTIMIZERS, SETTINGS_OF
from deflow.settings import HYDRA_KEYS, check_component, check_settings, described
from tests.conftest import compose_config

GIVEN = {
    "train": (),
    "distill": ("ckpt=a.ckpt",),
    "evaluate": ("ckpt=a.ckpt", "task=scene"),
    "serve": ("ckpt=a.ckpt",),
    "export": ("ckpt=a.ckpt",),
    "push": ("ckpt=a.ckpt", "to=hf://a/b"),
    "generate": ("dataset=scene-play-v0", "out=data"),
    "inspect_data": (),
    "benchmark": (),
    "train_expert": (),
}
OWN = {"custom": "data.source.path=a.npz", "minari": "data.source.dataset_id=a"}


def commands() -> Iterator[tuple[str, tuple[str, ...]]]:
    """Every command, every experiment, and every choice of every other group of a training run."""
    yield from GIVEN.items()
    for experiment in (*choices("experiment"), *(f"online/{name}" for name in choices("experiment/online"))):
        more = (OWN[experiment],) if experiment in OWN else ()
        yield "train", (f"experiment={experiment}", *more)
    for group in ("solver", "stages", "trainer", "logger"):
        yield from (("train", (f"{group}={name}",)) for name in choices(group))
    yield from (("train", (f"agent={name}", "stages=joint")) for name in choices("agent"))
    yield "train", ("agent.constraints=[{kind: action_norm, limit: 0.3}]", "agent/critic=flow")
    yield "train", ("agent=fql", "agent/critic=floq", "stages=joint")
    yield "train", ("experiment=custom", "data=hdf5", OWN["custom"])
    yield "train", ("agent.trust_region=auto", "trainer.precision=auto")
    yield "train", ("experiment=door-human-v1", "agent=fql")


@pytest.mark.parametrize(("command", "overrides"), commands())
def test_every_setting_is_described(command: str, overrides: tuple[str, ...]) -> None:
    config = compose_config(*overrides, config_name=command)
    check_settings(config, command)
    plain = OmegaConf.to_container(config, resolve=True)
    settings = {key: type_ for key, _, type_ in described(plain, SETTINGS_OF[command])}
    assert None not in settings.values(), [key for key, type_ in settings.items() if type_ is None]
    assert {
        key for key in leaves(plain) if key not in settings and not any(key.startswith(f"{s}.") for s in settings)
    } == set()


@cache
def composed(command: str, *groups: str) -> DictConfig:
    given = [word for word in GIVEN[command] if word != "task=scene"]
    return compose_config(*given, *groups, config_name=command)


def changed(command: str, overrides: str) -> DictConfig:
    """The command's configuration with some overrides; only those of groups are worth composing it again."""
    words = [overrides] if "{" in overrides else overrides.split()
    groups = [word for word in words if choices(word.partition("=")[0])]
    config = copy.deepcopy(composed(command, *(["stages=joint"] if command == "train" else []), *groups))
    OmegaConf.set_struct(config, False)
    for word in words:
        override = OverridesParser.create().parse_override(word)
        if override.is_delete():
            parent, _, name = str(override.key_or_group).rpartition(".")
            del OmegaConf.select(config, parent)[name]
        elif word not in groups:
            OmegaConf.update(config, override.key_or_group, override.value(), merge=False)
    return config


def leaves(values: Any, key: str = "") -> Iterator[str]:
    if isinstance(values, Mapping) and values:
        for name, value in values.items():
            if name not in HYDRA_KEYS:
                yield from leaves(value, f"{key}.{name}" if key else name)
    elif isinstance(values, list) and values and isinstance(values[0], Mapping):
        for number, value in enumerate(values):
            yield from leaves(value, f"{key}[{number}]")
    else:
        yield key


def test_every_experiment_names_its_runs_after_itself() -> None:
    named = {name: compose_config(f"experiment={name}").name for name in choices("experiment")}
    sizes = {"antmaze": "antmaze_large", "pointmaze": "pointmaze_medium"}
    assert named == {name: name for name in named} | sizes


SEED = "a whole number from 0 to 4294967295"
COUNT = "a whole number of at least 1"
TRAIN = [
    ("seed=abc", f"seed must be {SEED}, got 'abc'"),
    ("seed=-1", f"seed must be {SEED}, got -1"),
    ("seed=4294967296", f"seed must be {SEED}, got 4294967296"),
    ("seed=true", f"seed must be {SEED}, got True"),
    ("seed=4294967295 seeds=2", "seed=4294967295 with seeds=2 goes beyond 4294967295"),
    ("seeds=0", f"seeds must be {COUNT}, got 0"),
    ("updates=abc", f"updates must be {COUNT}, got 'abc'"),
    ("updates=60.5", f"updates must be {COUNT}, got 60.5"),
    ("updates=1e2", f"updates must be {COUNT}, got 100.0"),
    ("updates=0", f"updates must be {COUNT}, got 0"),
    ("online_updates=0", f"online_updates must be {COUNT}, got 0"),
    ("task_id=6", "task_id must be a whole number from 1 to 5 or null, got 6"),
    ("agent.optimizer.lr=-1", "agent.optimizer.lr must be a number above 0, got -1"),
    ("agent.optimizer.lr=nan", "agent.optimizer.lr must be a number above 0, got nan"),
    ("agent.optimizer.lr=inf", "agent.optimizer.lr must be a number above 0, got inf"),
    ("agent.optimizer.fused=maybe", "agent.optimizer.fused must be true or false, got 'maybe'"),
    ("agent.optimizer.clip=0", "agent.optimizer.clip must be a number above 0 or null, got 0"),
    ("+agent.optimizer.parts.critic.lr=0", "agent.optimizer.parts.critic.lr must be a number above 0, got 0"),
    ("+agent.optimizer.parts.critic.rl=1", "no setting 'agent.optimizer.parts.critic.rl': did you mean"),
    ("+agent.optimizer.betas=[0.9,1.0]", "each a number of at least 0 and below 1 (2 of them), got [0.9, 1.0]"),
    ("+agent.optimizer.rl=1", "no setting 'agent.optimizer.rl': did you mean 'agent.optimizer.lr'?"),
    ("networks.hidden=[-3]", f"networks.hidden must be a list, each {COUNT} (not empty), got [-3]"),
    ("networks.hidden=abc", "networks.hidden must be a list"),
    ("networks.hidden=[]", "networks.hidden must be a list"),
    ("networks.activation=swish", "networks.activation must be gelu or gelu_tanh or relu or mish or silu, got 'swish'"),
    ("networks.encoder.features=0", f"networks.encoder.features must be {COUNT}, got 0"),
    ("networks.encoder=5", "networks.encoder must be a group of settings or null, got 5"),
    ("tau=0", "tau must be a number above 0 and at most 1, got 0"),
    ("tau=2", "tau must be a number above 0 and at most 1, got 2"),
    ("tau=-0.1", "tau must be a number above 0 and at most 1, got -0.1"),
    ("threads=0", f"threads must be {COUNT} or null, got 0"),
    ("eval.seed=-5", f"eval.seed must be {SEED}, got -5"),
    ("eval.num_envs=0", f"eval.num_envs must be {COUNT} or null, got 0"),
    ("eval.every=0", f"eval.every must be {COUNT}, got 0"),
    ("eval.episodes=0", f"eval.episodes must be {COUNT}, got 0"),
    ("checkpoint_every=0", f"checkpoint_every must be {COUNT}, got 0"),
    ("validate_every=0.5", f"validate_every must be {COUNT}, got 0.5"),
    ("video.episodes=-1", "video.episodes must be a whole number of at least 0, got -1"),
    ("diversity.radius=0", "diversity.radius must be a number above 0, got 0"),
    ("iav.neighbours=1", "iav.neighbours must be a whole number of at least 2, got 1"),
    ("matmul_precision=low", "matmul_precision must be auto or highest or high or medium, got 'low'"),
    ("compile=1", "compile must be true or false, got 1"),
    ("name=5", "name must be text, got 5"),
    ("trainer.precision=foo", "trainer.precision must be 32-true or bf16-mixed or auto, got 'foo'"),
    ("trainer.precision=16-mixed", "trainer.precision must be 32-true or bf16-mixed or auto, got '16-mixed'"),
    ("trainer.devices=0", f"trainer.devices must be {COUNT} or auto or -1 or a list, each a whole number"),
    ("trainer.accelerator=tpu", "trainer.accelerator must be cpu or gpu"),
    ("trainer.log_every_n_steps=0", f"trainer.log_every_n_steps must be {COUNT}, got 0"),
    ("+trainer.precisionz=auto", "no setting 'trainer.precisionz': did you mean 'trainer.precision'?"),
    ("stages.joint.lr=0", "stages.joint.lr must be a number above 0 or null, got 0"),
    ("stages.joint.steps=1.5", f"stages.joint.steps must be {COUNT}, got 1.5"),
    ("stages.joint.train=some", "stages.joint.train must be all or a list, each text, got 'some'"),
    ("+stages.joint.frozen=[]", "no setting 'stages.joint.frozen': did you mean 'stages.joint.freeze'?"),
    ("stages=online stages.online.environment.online_share=2", "online_share must be a number from 0 to 1 or null"),
    ("stages=staged stages.extraction.proposals=0", f"stages.extraction.proposals must be {COUNT} or null, got 0"),
    ("task.discount=1", "task.discount must be a number of at least 0 and below 1, got 1"),
    ("task.discount=2 agent=flow_bc", "task.discount must be a number of at least 0 and below 1, got 2"),
    ("data.discount=1", "data.discount must be a number of at least 0 and below 1, got 1"),
    ("data.reward_scale=0", "data.reward_scale must be a number above 0 or auto, got 0"),
    ("data.reward_shift=inf", "data.reward_shift must be a number, got inf"),
    ("data.n_step=0", f"data.n_step must be {COUNT}, got 0"),
    ("data.batch_size=0", f"data.batch_size must be {COUNT}, got 0"),
    ("data.source.download=5", "data.source.download must be true or false, got 5"),
    ("data.source.generate_workers=0", f"data.source.generate_workers must be {COUNT} or null, got 0"),
    ("solver.steps=0", f"solver.steps must be {COUNT}, got 0"),
    ("solver.method=eulr", "solver.method must be euler or midpoint"),
    ("agent.horizon=0", f"agent.horizon must be {COUNT}, got 0"),
    ("agent.best_of_n=0", f"agent.best_of_n must be {COUNT}, got 0"),
    ("agent.critic=5", "agent.critic must be a component, with a _target_ and its settings, got 5"),
    ("agent.critic.members=0", f"agent.critic.members must be {COUNT}, got 0"),
    ("agent.critic.aggregate=max", "agent.critic.aggregate must be mean or min, got 'max'"),
    ("agent/critic=flow agent.critic.noise_width=0", "agent.critic.noise_width must be a number above 0 and at most 1"),
    ("agent/critic=flow agent.critic.value_range=[1]", "agent.critic.value_range must be a list, each a number (2 of"),
    ("agent/critic=floq agent.critic.samples=0", f"agent.critic.samples must be {COUNT}, got 0"),
    ("agent/critic=floq agent.critic.noise_around=top", "agent.critic.noise_around must be middle or zero, got 'top'"),
    ("agent.trust_region=large", "agent.trust_region must be a number above 0 or a list, each a number above 0"),
    ("agent.trust_region=[0.1,-1]", "agent.trust_region must be a number above 0 or a list"),
    ("agent.constraints=[{kind: action_norm, limit: 0}]", "agent.constraints[0].limit must be a number above 0"),
    ("agent.constraints=[{kind: action_norm}]", "the setting 'agent.constraints[0].limit' is missing"),
    ("agent.refiner.objective=policy", "agent.refiner.objective must be value or gradient_step or demonstration"),
    ("agent.refiner.eta=0", "agent.refiner.eta must be a number above 0, got 0"),
    ("agent=fql agent.actor.alpha=0", "agent.actor.alpha must be a number above 0, got 0"),
    ("agent=ifql agent.value.expectile=0.4", "agent.value.expectile must be a number of at least 0.5 and below 1"),
    ("agent=fbrac agent.gradient=none", "agent.gradient must be backprop or adjoint, got 'none'"),
    ("agent=rebrac agent.every.actor=0", f"agent.every.actor must be {COUNT}, got 0"),
    ("agent=rebrac agent.every=2", "agent.every must be a group of settings, got 2"),
    ("agent.critic.rho=-1", "agent.critic.rho must be a number of at least 0, got -1"),
    ("agent=rlpd agent.target_members=0", f"agent.target_members must be {COUNT} or null, got 0"),
    ("agent=rlpd agent.actor.output_scale=0", "agent.actor.output_scale must be a number above 0, got 0"),
    ("agent=rlpd agent.actor.temperature_loss=log", "agent.actor.temperature_loss must be alpha or log_alpha, got"),
    ("agent=rlpd agent.actor.temperature=0", "agent.actor.temperature must be a number above 0, got 0"),
    ("+agent.best_of_m=1", "no setting 'agent.best_of_m': did you mean 'agent.best_of_n'?"),
    ("+nonsense=1", "no setting 'nonsense': choose among name, seed"),
    ("+updatesz=1", "no setting 'updatesz': did you mean 'updates'?"),
    ("~eval.every", "the setting 'eval.every' is missing"),
    ("agent._target_=deflow.agents.deflow.DeeFlow", "agent._target_: Error"),
    ("trainer=gpu", "torch finds no GPU here: choose trainer=cpu"),
    ("trainer.accelerator=mps", "torch finds no GPU here: choose trainer=cpu"),
    ("trainer.devices=-1", "trainer.devices=-1 names GPUs"),
    ("trainer.devices=[0]", "trainer.devices=[0] names GPUs"),
    ("trainer=ddp_sim trainer.devices=300", "trainer.devices=300 processes would share"),
    ("trainer=ddp_sim data.batch_size=7", "data.batch_size=7 does not divide by the 2 processes"),
    ("agent.optimizer.lr=null", "agent.optimizer.lr must be a number above 0, got null"),
    ("+agent.spec=5", "no setting 'agent.spec'"),
    ("+trainer.fast_dev_run=true", "no setting 'trainer.fast_dev_run'"),  # as all that ends a stage early
    ("+trainer.max_steps=20", "no setting 'trainer.max_steps'"),
    ("agent.optimizer._target_=torch.optim.Adagrad", "agent.optimizer._target_ must be one of torch.optim.Adam, "),
    ("agent.optimizer._target_=torch.hub.load", "agent.optimizer._target_ must be one of torch.optim.Adam, "),
]
OTHERS = [
    ("evaluate", "num_envs=0", f"num_envs must be {COUNT} or null, got 0"),
    ("evaluate", "seed=abc", f"seed must be {SEED}, got 'abc'"),
    ("evaluate", "episodes=0", f"episodes must be {COUNT}, got 0"),
    ("evaluate", "best_of_n=0", f"best_of_n must be {COUNT} or null, got 0"),
    ("serve", "port=65536", "port must be a whole number from 0 to 65535, got 65536"),
    ("serve", "seed=-1", f"seed must be {SEED}, got -1"),
    ("evaluate", "threads=0", f"threads must be {COUNT} or null, got 0"),
    ("evaluate", "+task=scene", "task must be a group of settings or null, got 'scene'"),
    ("push", "private=perhaps", "private must be true or false or null, got 'perhaps'"),
    ("export", "format=tflite", "format must be onnx or torch, got 'tflite'"),
    ("export", "episodes=-1", "episodes must be a whole number of at least 0, got -1"),
    ("distill", "lr=0", "lr must be a number above 0, got 0"),
    ("distill", "lr=abc", "lr must be a number above 0, got 'abc'"),
    ("distill", "+agent.actor.alpha=-1", "agent.actor.alpha must be a number above 0, got -1"),
    ("distill", "+teacher=4", "teacher must be a group of settings, got 4"),
    ("generate", "episodes=0", f"episodes must be {COUNT}, got 0"),
    ("generate", "workers=0", f"workers must be {COUNT} or null, got 0"),
    ("generate", "steps=1", "steps must be a whole number of at least 2 or null, got 1"),
    ("benchmark", "batch_size=0", f"batch_size must be {COUNT}, got 0"),
    ("benchmark", "updates=0", f"updates must be {COUNT}, got 0"),
    ("benchmark", "agents=[]", "agents must be a list, each text (not empty), got []"),
    ("benchmark", "rounds=0", f"rounds must be {COUNT}, got 0"),
    ("inspect_data", "samples=1", "samples must be a whole number of at least 2, got 1"),
    ("train_expert", "episodes=1", "episodes must be a whole number of at least 2, got 1"),
]


@pytest.mark.parametrize(("overrides", "says"), TRAIN)
def test_a_training_run_that_cannot_be(overrides: str, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)
    with pytest.raises(UserError) as caught:
        check(changed("train", overrides))
    assert says in str(caught.value)


@pytest.mark.parametrize(("command", "override", "says"), OTHERS)
def test_another_command_that_cannot_be(command: str, override: str, says: str) -> None:
    with pytest.raises(UserError) as caught:
        check_settings(changed(command, override), command)
    assert says in str(caught.value)


def test_more_devices_than_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    check(compose_config("trainer=ddp", "trainer.devices=2"))
    with pytest.raises(UserError, match=r"trainer.devices=3, but this machine has 2"):
        check(compose_config("trainer=ddp", "trainer.devices=3"))


def test_whole_numbers_will_do_for_others() -> None:
    check(compose_config("agent.trust_region=1", "agent.critic.tau=1", "agent.optimizer.lr=1"))


def test_what_others_wrote_is_left_to_them() -> None:
    check_component({"_target_": "somewhere.Agent", "alpha": -1, "critic": {"_target_": "elsewhere.Critic"}}, "agent")


def unhinted(spec, anything=None):
    """Stands for a component of the user's."""


def test_signatures_that_say_less(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deflow.agents.deflow.unhinted", unhinted, raising=False)
    monkeypatch.setattr("deflow.agents.deflow.open_to_all", lambda spec, **more: None, raising=False)
    check_component({"_target_": "deflow.agents.deflow.open_to_all", "whatever": -1}, "agent")
    check_component({"_target_": "deflow.agents.deflow.unhinted", "anything": -1}, "agent")
    with pytest.raises(UserError, match=r"no setting 'agent.anythingz': did you mean 'agent.anything'"):
        check_component({"_target_": "deflow.agents.deflow.unhinted", "anythingz": -1}, "agent")


@pytest.mark.parametrize("target", OPTIMIZERS)
def test_optimizers_are_described(target: str) -> None:
    check_component({"_target_": target, "lr": 1e-3, "weight_decay": 0.0}, "agent.optimizer")
    with pytest.raises(UserError, match="weight_decay must be a number of at least 0, got -1"):
        check_component({"_target_": target, "lr": 1e-3, "weight_decay": -1}, "agent.optimizer")
