"""`evaluate.py`: the policy of a checkpoint, played again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig

from deflow import report
from deflow.checkpoints import agent_of, checkpoint_at, load_checkpoint, units_of
from deflow.config import plain
from deflow.cores import set_threads
from deflow.data.sources.source import Source
from deflow.errors import UserError
from deflow.evaluation.latency import latency
from deflow.evaluation.rollout import Evaluator
from deflow.evaluation.statistics import summarise
from deflow.files import check_folder
from deflow.loading import ACTING
from deflow.policy import AnyPolicy, Policy
from deflow.sharing.address import is_address
from deflow.trust import trust_only


def evaluate(config: DictConfig) -> dict[str, Any]:
    """Play a checkpoint's policy; the result goes to the terminal and into `evaluation.json` beside the checkpoint.

    Of a policy that is shared it goes to the terminal alone.

    Raises:
        UserError: if the checkpoint is broken or of another task than `config.task`, or its folder is read-only.
    """
    set_threads(config.threads)
    trust_only(config.trust)
    path = str(checkpoint_at(config.ckpt, config.run_seed))
    checkpoint = load_checkpoint(path)
    if not is_address(path):
        check_folder(Path(path).parent, "ckpt")  # the result is written beside it
    trained = checkpoint["deflow"]["config"]
    if config.task is not None:
        _check_task(path, plain(config.task), trained["task"])
    chosen = {key: config[key] for key in ACTING if config[key] is not None}
    policy = Policy(agent_of(checkpoint, **chosen), units=units_of(checkpoint))
    source: Source = instantiate(trained["data"]["source"])
    if not source.has_env:
        raise UserError(f"{path}: {source.task} has no environment to evaluate in")
    num_envs = trained["eval"]["num_envs"] if config.num_envs is None else config.num_envs
    result = {"checkpoint": path, "task": source.task, "seed": config.seed} | source.protocol()
    result |= {"horizon": policy.spec.horizon, "n_step": trained["data"]["n_step"]}
    result |= play(policy, source, config.episodes, num_envs, config.seed) | latency(policy)
    settings = trained["agent"] | chosen
    result |= {key: settings[key] for key in ACTING if key in settings}
    if not is_address(path):
        report.write_json(Path(path).with_name("evaluation.json"), result)
    report.print_evaluation(result)
    return result


def play(policy: AnyPolicy, source: Source, episodes: int, num_envs: int | None, seed: int) -> dict[str, float]:
    """What `episodes` episodes of the policy in the source's environment came to."""
    evaluator = Evaluator(source.make_env, episodes, num_envs, seed, source.success)
    played = evaluator.run(policy)
    evaluator.close()
    return summarise(played, source.score)


def _check_task(path: str, asked: dict[str, Any], trained: dict[str, Any]) -> None:
    """Raise `UserError` unless a checkpoint was trained in the environment and on the data set that are asked for."""
    names = [" ".join(str(task[key]) for key in ("env", "dataset") if key in task) for task in (asked, trained)]
    if names[0] != names[1]:
        raise UserError(f"{path} is a checkpoint of {names[1] or 'own data'}, not of {names[0]}")
