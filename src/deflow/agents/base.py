"""Agent: composes parts, sums the losses of those that train, steps one optimizer, moves the targets, logs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from lightning import LightningModule
from torch import Tensor, nn
from torch.optim import Optimizer

from deflow.agents.noise import FlowNoise
from deflow.distributed import rank
from deflow.errors import NonFiniteLossError, UserError
from deflow.seeding import torch_generator
from deflow.types import Batch, Metrics, Spec

Loss = tuple[str, Tensor, Metrics]

WHOLE_STAGES = "use stages=joint, stages=offline_to_online or stages=from_scratch"  # in which all of an agent trains

# Left alone, torch.compile's C++ computes a GELU anew in each pass of the layer normalisation over it; with this option
# it keeps what took so many operations. Code for a GPU, which is another, keeps the defaults.
COMPILED_FOR_CPU: dict[str, Any] = {"realize_opcount_threshold": 4}


class Agent(LightningModule, ABC):
    """The outer LightningModule. An algorithm subclasses it and writes `losses` and `act`.

    The losses of all training parts are summed and one optimizer with one parameter group a part steps them:
    Adam is per parameter, so this equals an Adam for each part as long as no loss reaches another's parameters
    (which the shared test in `tests/agents` checks).

    Args:
        spec: sizes of the task.
        parts: names of the attributes that hold the trainable modules.
        optimizer: makes the optimizer from parameter groups.
        seed: of every noise draw.
    """

    # Whether the losses take cached proposals from the batch, which come without the noise they started from.
    uses_cached_proposals: bool = False
    # Whether the losses read the returns of the data from the batch.
    uses_returns: bool = False
    # Whether the losses are plain enough for several seeds to be one `vmap`, see `SeedStack`.
    stackable: bool = True
    # Whether policy and values only make sense when they train in the same stage.
    trains_jointly: bool = False

    def __init__(
        self, spec: Spec, parts: Mapping[str, nn.Module], optimizer: Callable[[Any], Optimizer], seed: int
    ) -> None:
        super().__init__()
        self.spec = spec
        for name, part in parts.items():
            self.add_module(name, part)
        # Targets and other fixed parameters are never unfrozen, so remember what is trainable at all.
        self._trainable = {name: [p for p in part.parameters() if p.requires_grad] for name, part in parts.items()}
        self._make_optimizer = optimizer
        self._moments: dict[str, list[dict[str, Any] | None]] = {}
        self._seed = seed
        self._list_losses = _list_losses
        self.begin_stage("unnamed", "all", first_step=0)

    # What an algorithm writes.

    def draw_noise(self, batch: Batch, generator: torch.Generator) -> Any:
        """Every random number that one evaluation of the losses uses: those of a flow agent, unless it needs others."""
        return FlowNoise.draw(batch, generator)

    @abstractmethod
    def losses(self, batch: Batch, noise: Any) -> Iterator[Loss]:
        """`(part, loss, metrics)` of every part that trains in this stage (see `trains`)."""

    @abstractmethod
    def act(self, observations: Tensor, z: Tensor) -> Tensor:
        """The best actions that the agent knows, in [-1, 1], shape (batch, action_dim); called by `Policy`.

        Args:
            observations: shape (batch, observation_dim).
            z: standard normal noise, shape (batch, *act_noise_shape).
        """

    def explore(self, observations: Tensor, z: Tensor) -> Tensor:
        """As `act`, but the actions from which to learn in the environment; the same ones, unless it needs others."""
        return self.act(observations, z)

    @property
    def act_noise_shape(self) -> tuple[int, ...]:
        """Shape of the noise that one decision in one state takes: one vector, unless it needs more."""
        return (self.spec.action_dim,)

    def propose(self, observations: Tensor, z: Tensor) -> Tensor | None:
        """What `act` improves on, from the same arguments and of the same shape; None if there is no such thing."""
        return None

    def action_values(self, observations: Tensor, actions: Tensor) -> Tensor | None:
        """How good actions are, shape (batch,), higher is better; None for an agent without values."""
        return None

    # What a stage sets.

    def begin_stage(
        self,
        name: str,
        train: Sequence[str] | Literal["all"],
        first_step: int,
        freeze: Sequence[str] = (),
        lr: float | None = None,
        cosine_decay_steps: int | None = None,
    ) -> None:
        """Freeze every part but those of `train`; must precede `Trainer.fit` so that DDP sees the right set.

        Args:
            name: of the stage; part of the seed of its noise.
            train: parts that train, or `all`.
            freeze: parts that do not, whatever `train` says.
            first_step: updates of the run before this stage, so that logs go on where they were.
            lr: learning rate of this stage instead of the optimizer's own.
            cosine_decay_steps: if given, the learning rate falls to 0 over so many updates, along half a cosine.

        Raises:
            UserError: if a part is not one of the agent's, or none trains.
        """
        train = tuple(self._trainable) if train == "all" else train
        unknown = sorted({*train, *freeze} - set(self._trainable))
        train = [part for part in train if part not in freeze]
        if unknown:
            known = ", ".join(self._trainable)
            instead = f"; better, {WHOLE_STAGES}" if self.trains_jointly else ""
            raise UserError(f"stage '{name}' trains {unknown}: choose among the agent's parts {known}{instead}")
        if not train:
            raise UserError(f"stage '{name}' leaves nothing of {type(self).__name__} to train: use stages=joint")
        self._stage, self._active, self._first_step = name, tuple(train), first_step
        self._lr, self._cosine_decay_steps = lr, cosine_decay_steps
        for part, parameters in self._trainable.items():
            for parameter in parameters:
                parameter.requires_grad_(part in train)
        self._bad_step: Tensor | None = None

    def start_from(self, checkpoint: Mapping[str, Any]) -> None:
        """Go on from the weights, and the optimizer's moments if it has them, of an agent like this one."""
        self.load_state_dict(checkpoint["state_dict"])
        self.keep_moments(checkpoint)

    def keep_moments(self, checkpoint: Mapping[str, Any]) -> None:
        """Let the next stages' optimizers go on with the moments of the parts that `checkpoint` was training."""
        for state in checkpoint.get("optimizer_states", ()):
            for group in state["param_groups"]:
                self._moments[group["name"]] = [state["state"].get(number) for number in group["params"]]

    def trains(self, part: str) -> bool:
        """Whether `part` trains in the current stage."""
        return part in self._active

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of all parts that can train."""
        return tuple(self._trainable)

    @property
    def run_step(self) -> int:
        """Updates since the start of the run, over all stages."""
        return self._first_step + self.global_step

    def terms(self, batch: Batch, noise: Any) -> list[Loss]:
        """All of `losses`, by compiled code after `compile_losses`."""
        return self._list_losses(self, batch, noise)

    def compile_losses(self) -> None:
        """Let torch.compile fuse what `terms` and its gradient are made of; every stage compiles once, at its start."""
        on_cpu, elsewhere = torch.compile(_list_losses, options=COMPILED_FOR_CPU), torch.compile(_list_losses)

        def compiled(agent: Agent, batch: Batch, noise: Any) -> list[Loss]:
            return (on_cpu if batch.rewards.is_cpu else elsewhere)(agent, batch, noise)

        self._list_losses = compiled

    # What Lightning calls.

    def configure_optimizers(self) -> Any:
        own_lr = {} if self._lr is None else {"lr": self._lr}
        groups = [{"params": self.parameters_of(part), "name": part} | own_lr for part in self._active]
        optimizer = self._make_optimizer(groups)
        fresh = optimizer.state_dict()
        for group in fresh["param_groups"]:
            moments = zip(group["params"], self._moments.get(group["name"], ()), strict=False)
            fresh["state"] |= {number: of_one for number, of_one in moments if of_one is not None}
        optimizer.load_state_dict(fresh)
        if self._cosine_decay_steps is None:
            return optimizer
        decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self._cosine_decay_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": decay, "interval": "step"}}

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        terms = self.terms(batch, self.noise(batch, self._stage, "noise", rank(), self.global_step))
        self._watch_for_nan(terms)
        if (self.global_step + 1) % self.trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            self._check_finite()
            self.log_dict(_named("train", terms) | {"step": float(self.run_step + 1)})
            self.log_dict(self.headline(terms), prog_bar=True, logger=False)
        return torch.stack([loss for _, loss, _ in terms]).sum()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        metrics = _named("val", self.losses(batch, self.noise(batch, "validation", rank(), batch_idx)))
        self.log_dict(metrics | {"step": float(self.run_step)}, batch_size=len(batch.rewards), sync_dist=True)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        # Before the step: a target moves toward the weights that made this update's losses, as in the original code.
        by_tau: dict[float, tuple[list[Tensor], list[Tensor]]] = {}
        for online, target, tau in self.target_pairs():
            targets, onlines = by_tau.setdefault(tau, ([], []))
            targets.append(target)
            onlines.append(online.detach())
        for tau, (targets, onlines) in by_tau.items():
            torch._foreach_lerp_(targets, onlines, tau)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._check_finite()

    # Helpers.

    def noise(self, batch: Batch, *names: int | str) -> Any:
        """The random numbers that belong to the agent's seed and `names`."""
        return self.draw_noise(batch, torch_generator(self.device, self._seed, *names))

    def draw_act_noise(self, states: int, generator: torch.Generator) -> Tensor:
        """The noise of a decision in so many states, shape (states, *act_noise_shape), on the agent's device."""
        return torch.randn((states, *self.act_noise_shape), generator=generator, device=self.device)

    def parameters_of(self, part: str) -> list[Tensor]:
        """What the optimizer steps for a part."""
        return list(self._trainable[part])

    def target_pairs(self) -> Iterator[tuple[Tensor, Tensor, float]]:
        """`(online, target, tau)` of the parts that train."""
        for part in self._active:
            pairs = getattr(getattr(self, part), "target_pairs", None)
            if pairs is not None:
                yield from pairs()

    def headline(self, terms: Iterable[Loss]) -> Metrics:
        """The few metrics worth a place on the progress bar: each part's loss, unless an algorithm knows better."""
        return {part: loss.detach() for part, loss, _ in terms}

    def _watch_for_nan(self, terms: Sequence[Loss]) -> None:
        """Remember, without waiting for the device, the first step at which each part's loss was not finite."""
        finite = torch.stack([loss.detach() for _, loss, _ in terms]).isfinite()
        if self._bad_step is None:
            self._bad_step = torch.full(finite.shape, -1, device=finite.device)
        self._bad_step = torch.where(finite | (self._bad_step >= 0), self._bad_step, self.global_step + 1)

    def _check_finite(self) -> None:
        """Raise `NonFiniteLossError` if a loss was NaN or infinite; called on the log interval and before saving."""
        if self._bad_step is None or bool((self._bad_step < 0).all()):
            return
        steps = dict(zip(self._active, self._bad_step.tolist(), strict=True))
        part, step = min(((p, s) for p, s in steps.items() if s >= 0), key=lambda item: item[1])
        raise NonFiniteLossError(f"the loss of '{part}' is not finite at update {step} of stage '{self._stage}'")


def _list_losses(agent: Agent, batch: Batch, noise: Any) -> list[Loss]:
    return list(agent.losses(batch, noise))


def _named(prefix: str, terms: Iterable[Loss]) -> Metrics:
    return {f"{prefix}/{part}/{key}": value for part, _, metrics in terms for key, value in metrics.items()}
