"""The settings that are no constructor's, section by section as in the YAML files, and what each of them may be.

What a constructor takes is described by its own signature. `settings.py` compares a configuration with both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, NotRequired, TypedDict

from pydantic import Field

from deflow.ranges import (
    Activation,
    Count,
    Discount,
    Natural,
    Neighbours,
    NonNegative,
    Port,
    Positive,
    Probability,
    ReadIf,
    Seed,
    Share,
    TaskId,
    Widths,
)

AUTO = "auto"  # in the place of a setting that the data (or the machine) decide

# Such settings of an agent, and what stands in for them in one that is built before the data are there.
OF_STATES = {"observation_mean": [0.0], "observation_std": [1.0], "reward_centre": 0.0, "reward_scale": 1.0}
STAND_IN: dict[str, Any] = {
    "trust_region": 1.0,
    "path": {"mean": [0.0], "std": [1.0]},
    "critic.value_range": [-1.0, 0.0],
    "critic.statistics": OF_STATES,
    "dynamics.statistics": OF_STATES | {"change_mean": [0.0], "change_std": [1.0]},
}

# All of them are per parameter, so that one with a group for each part equals one for each part.
OPTIMIZERS = tuple(f"torch.optim.{name}" for name in ("Adam", "AdamW", "NAdam", "RAdam", "RMSprop", "SGD"))

TRAINER = "lightning.Trainer"

Component = Mapping[str, Any]  # with a `_target_`, whose signature describes the rest


class Encoder(TypedDict):
    stacks: Widths
    blocks: Natural
    features: Count


class Networks(TypedDict):
    hidden: Widths
    activation: Activation
    encoder: Encoder | None


class Evaluation(TypedDict):
    every: Count
    episodes: Count
    num_envs: Count | None
    seed: Seed


class Video(TypedDict):
    episodes: Natural


class Diversity(TypedDict):
    states: Natural
    samples: Count
    neighbours: Count
    radius: Positive


class Paths(TypedDict):
    logs: str
    data: NotRequired[str]


class Task(TypedDict):
    name: NotRequired[str]  # runs from before the tables have none, nor updates
    env: NotRequired[str]
    dataset: NotRequired[str]
    discount: Discount
    updates: NotRequired[Count]
    task_id: NotRequired[TaskId]
    generate_if_missing: NotRequired[bool]
    frames: NotRequired[Count]
    crop_probability: NotRequired[Probability]
    side_by_side: NotRequired[Count]


class Environment(TypedDict):
    num_envs: Count
    updates_per_step: Positive
    online_share: Probability | None
    capacity: Count | None


class Stage(TypedDict):
    train: Literal["all"] | Sequence[str]
    steps: Count
    freeze: NotRequired[Sequence[str]]
    lr: NotRequired[Positive | None]
    cosine_decay: NotRequired[bool | Sequence[str]]
    evaluate: NotRequired[bool]
    proposals: NotRequired[Count | None]
    environment: NotRequired[Environment | None]


IF_AUTO = ReadIf("agent.trust_region", AUTO)


class IAV(TypedDict):
    factor: Annotated[Positive, IF_AUTO]
    per_dimension: Annotated[bool, IF_AUTO]
    neighbours: Annotated[Neighbours, IF_AUTO]
    include_self: Annotated[bool, IF_AUTO]
    standardise: Annotated[bool, IF_AUTO]
    sample: Annotated[Count | None, IF_AUTO]
    seed: Seed
    result: Mapping[str, Any] | None


class Train(TypedDict):
    name: str
    seed: Seed
    seeds: Count
    task_id: TaskId | None
    updates: Count
    online_updates: Count
    resume: str | None
    ckpt: str | None
    ckpt_of_any_task: bool
    trust: Sequence[str]
    networks: Networks
    tau: Share
    eval: Evaluation
    validate_every: Count
    checkpoint_every: Count
    video: Video
    diversity: Diversity
    matmul_precision: Literal["auto", "highest", "high", "medium"]
    compile: bool
    threads: Count | None
    paths: Paths
    task: Task
    stages: Mapping[str, Stage]
    iav: IAV
    solver: Component
    agent: Component
    data: Component
    trainer: Component
    logger: Component


class Distill(TypedDict):
    ckpt: str | None
    teacher: Mapping[str, Any]  # checked as a part of the agent that is distilled
    name: str
    seed: Seed
    updates: Count
    lr: Positive
    threads: Count | None
    resume: str | None
    trust: Sequence[str]
    eval: Evaluation
    paths: Paths
    agent: Component
    trainer: Component
    logger: Component


class OfPolicy(TypedDict):
    """What commands take that let a checkpoint's policy act."""

    ckpt: str
    best_of_n: Count | None
    refine_steps: Count | None
    trust: Sequence[str]
    threads: Count | None


class Evaluate(OfPolicy):
    run_seed: Seed | None
    task: Task | None
    episodes: Count
    num_envs: Count | None
    seed: Seed


class Serve(OfPolicy):
    host: str
    port: Port
    seed: Seed
    device: str
    run_seed: Natural | None


class Export(OfPolicy):
    run_seed: Seed | None
    format: Literal["onnx", "torch"]
    out: str | None
    overwrite: bool
    episodes: Natural
    num_envs: Count | None
    seed: Seed


class Push(TypedDict):
    ckpt: str
    to: str
    run_seed: Natural | None
    private: bool | None
    tracking_uri: str | None
    dry: bool
    out: str
    overwrite: bool
    trust: Sequence[str]
    threads: Count | None


class Generate(TypedDict):
    dataset: str
    episodes: Count
    out: str
    seed: Seed
    workers: Count | None
    steps: Neighbours | None
    overwrite: bool
    threads: Count | None


class InspectData(TypedDict):
    task_id: TaskId | None
    seed: Seed
    ckpt: str | None
    trust: Sequence[str]
    samples: Neighbours
    out: str
    paths: Paths
    threads: Count | None
    task: Task
    iav: IAV
    data: Component


class Episodes(TypedDict):
    steps: Count
    episodes: Count
    one_by_one_episodes: Count
    num_envs: Count


class Benchmark(TypedDict):
    agents: Annotated[Sequence[str], Field(min_length=1)]
    measure: Sequence[str]
    precisions: Sequence[str] | None
    seed: Seed
    seeds: Count
    networks: Networks
    tau: Share
    batch_size: Count
    observation_dim: Count
    action_dim: Count
    rounds: Count
    updates: Count
    log_every: Count
    threads: Count | None
    evaluation: Episodes
    profile: bool
    out: str
    task: Task
    iav: NotRequired[Mapping[str, Any]]  # what a tuned row says for training, and so the next
    data: NotRequired[Mapping[str, Any]]
    eval: NotRequired[Mapping[str, Any]]
    solver: Component
    agent: Component


class Engine(TypedDict):
    jobs: Count | None
    threads: Count
    cluster: str | None
    submit: NotRequired[Mapping[str, Any]]  # checked by submitit
    max_timeouts: NotRequired[Natural]


class Reproduce(TypedDict):
    engine: Engine
    table: str | None
    rows: Sequence[str] | None
    tasks: Sequence[TaskId] | None
    agents: Sequence[str] | None
    seeds: Count | None
    settings: Mapping[str, Any]  # checked by each run
    dry: bool
    compare: Sequence[str] | None
    jobs: Count | None
    threads: Count
    out: str
    mlflow: str | None
    paths: Paths


class TrainExpert(TypedDict):
    steps: Count
    out: str
    seed: Seed
    overwrite: bool
    episodes: Neighbours
    threads: Count | None


SETTINGS_OF: dict[str, Any] = {
    "train": Train,
    "distill": Distill,
    "evaluate": Evaluate,
    "serve": Serve,
    "export": Export,
    "push": Push,
    "generate": Generate,
    "inspect_data": InspectData,
    "benchmark": Benchmark,
    "reproduce": Reproduce,
    "train_expert": TrainExpert,
}


class TrainerArguments(TypedDict, total=False):
    """Lightning has more, but they end a stage early or count updates otherwise than the stages do."""

    one_launch: bool  # ours, see `OneLaunch`
    accelerator: Literal["cpu", "gpu", "cuda", "mps", "auto"]
    devices: Count | Literal["auto", -1] | Sequence[Natural]
    num_nodes: Count
    strategy: str
    precision: Literal["32-true", "bf16-mixed", "auto"]
    log_every_n_steps: Count
    max_epochs: Count
    check_val_every_n_epoch: None
    limit_val_batches: Natural | Probability
    num_sanity_val_steps: Natural
    gradient_clip_val: Positive | None
    enable_model_summary: bool
    use_distributed_sampler: bool
    sync_batchnorm: bool
    deterministic: bool | Literal["warn"]
    benchmark: bool
    profiler: Literal["simple", "advanced", "pytorch"] | None


class OptimizerArguments(TypedDict, total=False):
    """Arguments of which the optimizers' own signatures say too little."""

    lr: Positive
    betas: Sequence[Discount]
    alpha: Discount
    eps: Positive
    weight_decay: NonNegative
    momentum: Discount
    fused: bool | None
    foreach: bool | None
