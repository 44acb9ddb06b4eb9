"""The card of a shared policy: what it is, what it reaches and how it was made, in Markdown from the run's summary."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from deflow.exported import About
from deflow.report import EVALUATED, LAST_EVALUATIONS
from deflow.sharing.address import LATEST, POLICY, HubAddress, RegistryAddress

TAGS = ("reinforcement-learning", "offline-rl", "robotics", "flow-matching", "deflow")
EXPLAINED = ("name", "path", "bytes", "generated")  # entries of a summary's data that the card has words for, or leaves


@dataclass(frozen=True)
class Shared:
    """What a card is about.

    Args:
        about: the policy, as its file says it.
        trained: the configuration that it was trained with.
        summary: of its run; None if there is none.
        is_result: whether the summary's numbers are this very policy's, and not those of a later checkpoint.
        command: that began the run; empty if it was not recorded.
        picture: name of the file with the report's picture, if there is one.
        trust: packages of one's own that the file names.
    """

    about: About
    trained: Mapping[str, Any]
    summary: Mapping[str, Any] | None
    is_result: bool
    command: str
    picture: str | None
    trust: Sequence[str]

    @property
    def title(self) -> str:
        """The heading: agent and task."""
        return f"{self.about.agent} on {self.about.task}"

    @property
    def results(self) -> dict[str, dict[str, Any]]:
        """Name of a measure -> what the evaluations came to; empty if they are not this policy's."""
        if self.summary is None or not self.is_result:
            return {}
        found = {key: self.summary.get(f"eval/{key}") for key in EVALUATED}
        return {key: numbers for key, numbers in found.items() if numbers}


def write_card(shared: Shared, address: HubAddress | RegistryAddress) -> str:
    """The card as Markdown, with what the hub reads of it as YAML in front."""
    parts = [_metadata(shared), f"# {shared.title}", _kind(shared), *_use(shared, address), *_results(shared)]
    parts += _training(shared)
    if shared.picture is not None:
        parts.append(f"![Losses, what else the agent shows, and success over the training]({shared.picture})")
    return "\n\n".join(parts) + "\n"


def _metadata(shared: Shared) -> str:
    fields: dict[str, Any] = {"library_name": "deflow", "pipeline_tag": "reinforcement-learning", "tags": [*TAGS]}
    measured = [key for key in ("success", "score", "return") if key in shared.results]
    if measured:
        task = {"type": "reinforcement-learning", "name": shared.about.task}
        data = {"type": _data(shared)["name"], "name": _data_in_words(shared)}
        metrics = [{"type": key, "name": f"{key}, last", "value": shared.results[key]["last"]} for key in measured[:1]]
        result = {"task": task, "dataset": data, "metrics": metrics}
        fields["model-index"] = [{"name": shared.title, "results": [result]}]
    return f"---\n{yaml.safe_dump(fields, sort_keys=False, allow_unicode=True, width=1000)}---"


def _kind(shared: Shared) -> str:
    online = any(stage.get("environment") is not None for stage in shared.trained["stages"].values())
    how = "from data and then in the environment" if online else "from data alone"
    return f"A policy trained {how} by deflow {shared.about.version}: offline reinforcement learning, flow policies."


def _use(shared: Shared, address: HubAddress | RegistryAddress) -> Iterator[str]:
    spec, (horizon, action_dim) = shared.about.spec, shared.about.plan_shape
    trust = f", trust=[{', '.join(repr(name) for name in shared.trust)}]" if shared.trust else ""
    where = address if isinstance(address, HubAddress) else RegistryAddress(address.name, LATEST)
    extra = "[hub]" if isinstance(address, HubAddress) else ""
    chunk = f", decided {horizon} at a time" if horizon > 1 else ""
    yield "## Use"
    # An index may know another project of this name, which strangers are not to be sent to.
    yield (
        f"Install deflow {shared.about.version} from its authors' repository, `pip install '.{extra}'` in a clone "
        "(what PyPI has under this name is something else)."
    )
    yield "\n".join(
        (
            "```python",
            "import deflow",
            "",
            f'policy = deflow.load("{where}"{trust})',
            "policy.reset(seed=0)  # before each episode",
            "action = policy.act(observation)  # one observation, or a batch of them",
            "```",
        )
    )
    yield (
        f"Observations have shape {tuple(spec.observation_shape)}, actions {action_dim} numbers{chunk}. `{POLICY}` "
        "holds the weights, and the settings as JSON: nothing in it runs when it is read."
    )


def _results(shared: Shared) -> Iterator[str]:
    yield "## What it reaches"
    summary = shared.summary
    if summary is None:
        yield "Not known: the policy was shared without its run's summary."
        return
    if not shared.results:
        why = "the run evaluated nothing" if shared.is_result else "the run's numbers are those of another checkpoint"
        yield f"Not known: {why}."
        return
    rows = [f"| | last evaluation | 95% interval | mean of the last {LAST_EVALUATIONS} |", "|---|---|---|---|"]
    for key, numbers in shared.results.items():
        last, mean, (low, high) = (numbers[name] for name in ("last", "mean_of_last_three", "last_interval_95"))
        rows.append(f"| {key} | {last:.2f} | {low:.2f} to {high:.2f} | {mean:.2f} |")
    yield "\n".join(rows)
    yield (
        f"{summary['eval_episodes']} episodes an evaluation, {summary['evaluations']} evaluations; the interval is "
        f"over the episodes of the last one. {_of_seeds(shared, summary)}"
    )


def _of_seeds(shared: Shared, summary: Mapping[str, Any]) -> str:
    first, count, own = summary["seed"], summary["seeds"], shared.trained["seed"]
    if count == 1:
        return f"They are those of one training, seed {own}: another seed may come out beyond the interval."
    of_all = f"They are of seeds {first} to {first + count - 1} together; this policy is that of seed {own}"
    for key, numbers in shared.results.items():
        if str(own) in (of_seed := numbers.get("last_of_seed", {})):
            return f"{of_all}, whose last {key} was {of_seed[str(own)]:.2f}."
    return f"{of_all}."


def _training(shared: Shared) -> Iterator[str]:
    summary = shared.summary or {}
    yield "## How it was trained"
    yield "\n".join(f"- {what}: {said}" for what, said in _facts(shared, summary))
    yield f"    {shared.command}" if shared.command else "The command was not recorded; all settings are in the file."


def _facts(shared: Shared, summary: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    trained, about = shared.trained, shared.about
    yield "task", about.task
    for name, said in about.protocol.items():
        yield name.replace("_", " "), str(said)
    yield "data", _data_in_words(shared)
    if "transitions" in summary:
        yield "transitions", ", ".join(f"{count:,} for {part}" for part, count in summary["transitions"].items())
    stages = trained["stages"].items()
    yield "updates", ", ".join(f"{stage['steps']:,} ({name})" for name, stage in stages)
    yield "seed", str(trained["seed"])
    yield "returns", f"of {trained['data']['n_step']} steps" if trained["data"]["n_step"] > 1 else "of one step"
    yield "actions", f"chunks of {about.spec.horizon}" if about.spec.horizon > 1 else "one at a time"
    if about.settings:
        yield "acts with", ", ".join(f"{name}={value}" for name, value in about.settings.items())
    if "seconds" in summary:
        yield "time", f"{summary['seconds'] / 60:.0f} min"
    if summary.get("commit"):
        yield "commit", str(summary["commit"])
    if "versions" in summary:
        yield "versions", ", ".join(f"{name} {number}" for name, number in summary["versions"].items())


def _data(shared: Shared) -> Mapping[str, Any]:
    return (shared.summary or {}).get("data") or {"name": shared.about.task}


def _data_in_words(shared: Shared) -> str:
    """Without the path: whose machine it was is nobody's business."""
    data = _data(shared)
    if "generated" not in data:
        return "not known"
    if not data["generated"]:
        return str(data["name"])
    made = ", ".join(f"{name} {value}" for name, value in data.items() if name not in EXPLAINED)
    return f"{data['name']}, GENERATED and not the published set" + (f" ({made.replace('_', ' ')})" if made else "")
