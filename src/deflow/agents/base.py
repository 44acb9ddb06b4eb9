"""Agent: composes parts, sums the losses of those that train, steps one optimizer, moves the targets, logs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any, Literal

import torch
from lightning import LightningModule
from torch import Tensor, nn
from torch.optim import Optimizer

from deflow.agents.algorithm import Algorithm, Loss
from deflow.agents.compiling import compiled
from deflow.agents.watch import LossWatch
from deflow.distributed import rank
from deflow.errors import UserError
from deflow.flow.ode import ADAPTIVE, Solver
from deflow.seeding import fold_seed
from deflow.types import Batch, Block, Drawn, Metrics, Spec

ALMOST_0 = 1e-6  # added to a gradient's norm before something is divided by it, as torch does it

UNNAMED = "unnamed"  # stage of an agent that is in none yet
LATEST = "latest_metrics"  # of a checkpoint, see `on_save_checkpoint`
MODEL = "dynamics"  # the part that is a model of the environment's steps, of the agents that have one
WHOLE_STAGES = "stages=joint, stages=offline_to_online or stages=from_scratch"  # in which all of an agent trains


class Agent(Algorithm, LightningModule):
    """The outer LightningModule: everything but the `Algorithm`, which a subclass writes.

    The losses of all training parts are summed and one optimizer with one parameter group a part steps them:
    Adam is per parameter, so this equals an Adam for each part as long as no loss reaches another's parameters
    (which the shared test in `tests/agents` checks). A part that is not due in an update has no gradient there, and the
    optimizer leaves it and its moments alone.

    Args:
        spec: sizes of the task.
        parts: names of the attributes that hold the trainable modules.
        optimizer: makes the optimizer from parameter groups.
        seed: of every noise draw.
        every: rhythm of a part beside others: it trains in every so many-th update of a stage, those not named in each.

    Raises:
        UserError: if `every` or the optimizer names what is no part.
    """

    def __init__(
        self,
        spec: Spec,
        parts: Mapping[str, nn.Module],
        optimizer: Callable[[Any], Optimizer],
        seed: int,
        every: Mapping[str, int] = MappingProxyType({}),
    ) -> None:
        super().__init__()
        self.spec = spec
        for name, part in parts.items():
            self.add_module(name, part)
        # Targets and other fixed parameters are never unfrozen, so remember what is trainable at all.
        self._trainable = {name: [p for p in part.parameters() if p.requires_grad] for name, part in parts.items()}
        self._make_optimizer = optimizer
        self._refuse_unknown("agent.optimizer.parts", getattr(optimizer, "parts", ()))
        self._moments: dict[str, list[dict[str, Any] | None]] = {}
        self._seed = seed
        self._generator: torch.Generator | None = None
        self.compiled = False  # True once `compile_losses` was called
        self.stacked = False  # whether they are computed together with other seeds', see `SeedStack`
        # If given, does all of an update by itself, and Lightning only keeps count.
        self.whole_update: Callable[..., list[Loss]] | None = None
        self._refuse_unknown("agent.every", every)
        self.every = dict(every)
        self.begin_stage(UNNAMED, "all", first_step=0)

    # What a stage sets.

    def begin_stage(
        self,
        name: str,
        train: Sequence[str] | Literal["all"],
        first_step: int,
        freeze: Sequence[str] = (),
        lr: float | None = None,
        cosine_decay_steps: int | None = None,
        decaying: Sequence[str] | Literal["all"] = "all",
    ) -> None:
        """Freeze every part but those of `train`; must precede `Trainer.fit` so that DDP sees the right set.

        Args:
            name: of the stage; part of the seed of its noise.
            train: parts that train, or `all`.
            freeze: parts that do not, whatever `train` says.
            first_step: updates of the run before this stage, so that logs go on where they were.
            lr: learning rate of this stage instead of the optimizer's own.
            cosine_decay_steps: if given, the learning rate falls to 0 over so many updates, along half a cosine.
            decaying: parts of which it does.

        Raises:
            UserError: if a part is not one of the agent's, none trains, or there are updates in which none would.
        """
        train = tuple(self._trainable) if train == "all" else train
        decaying = tuple(self._trainable) if decaying == "all" else decaying
        unknown = sorted({*train, *freeze, *decaying} - set(self._trainable))
        train = [part for part in train if part not in freeze]
        if unknown:
            known = ", ".join(self._trainable)
            model = " (a model is added by agent/dynamics=flow)" if MODEL in unknown else ""
            own = self.traits.own_stages
            whole = f"use stages={own}, which is made for it, or {WHOLE_STAGES}" if own else f"use {WHOLE_STAGES}"
            raise UserError(
                f"stage '{name}' names {unknown}: choose among the agent's parts {known}{model}, or {whole}"
            )
        if not train:
            raise UserError(f"stage '{name}' leaves nothing of {type(self).__name__} to train: use stages=joint")
        rhythm = {part: self.every.get(part, 1) for part in train}
        if len(set(rhythm.values())) == 1:  # all of them together are as one that trains in each update
            rhythm = {}
        if rhythm and min(rhythm.values()) > 1:
            raise UserError(f"agent.every leaves updates in which nothing trains: set agent.every.{train[0]}=1")
        self._rhythm = rhythm
        self._stage, self._active, self._first_step = name, tuple(train), first_step
        self._lr, self._cosine_decay_steps, self._decaying = lr, cosine_decay_steps, tuple(decaying)
        for part, parameters in self._trainable.items():
            getattr(self, part).train(part in train)  # what is frozen gives its average, if it has one
            for parameter in parameters:
                parameter.requires_grad_(part in train)
        self._latest: dict[str, Metrics] = {}  # of each part, when it was last due
        self._watch = LossWatch()
        self.begin_update(None)

    def begin_update(self, step: int | None) -> None:
        """Settle which parts are due.

        Args:
            step: of the stage, counted from 0; None: outside of updates, where all that train in the stage are.
        """
        # Compiled code depends on this tuple, of which there are few, and never on the step itself.
        self._due = tuple(part for part in self._active if step is None or (step + 1) % self._rhythm.get(part, 1) == 0)

    def start_from(self, checkpoint: Mapping[str, Any]) -> None:
        """Go on from the weights, and the optimizer's moments if it has them, of an agent like this one."""
        self.load_state_dict(checkpoint["state_dict"])
        self.keep_moments(checkpoint)

    def keep_moments(self, checkpoint: Mapping[str, Any]) -> None:
        """Let the next stages' optimizers go on with the moments of the parts that `checkpoint` was training."""
        for state in checkpoint.get("optimizer_states", ()):
            for group in state["param_groups"]:
                self._moments[group["name"]] = [state["state"].get(number) for number in group["params"]]

    @property
    def kind_of_update(self) -> tuple[tuple[str, ...], ...]:
        """What Python decides of the update at hand: the parts that are due, and those whose targets move.

        An agent whose updates differ in more than that adds it, or keeps it in a tensor that it writes in
        `begin_update`: a recorded update, see `GraphedUpdate`, is that of its kind.
        """
        return self._due, tuple(part for part in self._active if self.moves_targets(part))

    def trains(self, part: str) -> bool:
        """Whether `part` trains in the update at hand; outside of updates, in the current stage."""
        return part in self._due

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of all parts that can train."""
        return tuple(self._trainable)

    @property
    def run_step(self) -> int:
        """Updates since the start of the run, over all stages."""
        return self._first_step + self.global_step

    @property
    def device(self) -> torch.device:
        """Where the weights are, whoever moved them there."""
        return next(self.parameters()).device

    @property
    def unrecordable(self) -> str | None:
        """Why an update cannot be recorded on a GPU, see `OneLaunch`; None if it can."""
        if self.uses_torchdiffeq:
            return "torchdiffeq takes part in it"
        if not getattr(self._make_optimizer, "recordable", False):
            return "its optimizer may keep numbers in Python"
        return None

    @property
    def uses_torchdiffeq(self) -> bool:
        """Whether torchdiffeq takes part in the losses: it waits for the device, and several seeds cannot share it."""
        solvers = [getattr(module, "solver", None) for module in self.modules()]
        adaptive = any(isinstance(solver, Solver) and solver.method in ADAPTIVE for solver in solvers)
        return self.traits.differentiates_flow or adaptive

    @property
    def has_rhythm(self) -> bool:
        """Whether there are updates of this stage in which a part that trains is not due."""
        return max(self._rhythm.values(), default=1) > 1

    def compile_losses(self) -> None:
        """Let torch.compile fuse what `losses` and its gradient are made of, once for each set of parts due."""
        self.losses = compiled(self.losses)  # type: ignore[assignment, method-assign]
        self.compiled = True

    # What Lightning calls.

    def configure_optimizers(self) -> Any:
        of_stage = {} if self._lr is None else {"lr": self._lr}
        groups = [{"params": self.parameters_of(part), "name": part} | of_stage for part in self._active]
        optimizer = self._make_optimizer(groups)
        fresh = optimizer.state_dict()
        for group in fresh["param_groups"]:
            moments = zip(group["params"], self._moments.get(group["name"], ()), strict=False)
            fresh["state"] |= {number: of_one for number, of_one in moments if of_one is not None}
        optimizer.load_state_dict(fresh)
        if self._cosine_decay_steps is None:
            return optimizer
        steps = {part: self._cosine_decay_steps for part in self._decaying}
        factors: list[Callable[[int], float]] = [partial(_half_cosine, steps.get(part)) for part in self._active]
        decay = torch.optim.lr_scheduler.LambdaLR(optimizer, factors)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": decay, "interval": "step"}}

    def training_step(self, batch: Batch | Block, batch_idx: int) -> Tensor:
        batches: Sequence[Batch | Drawn] = batch.one_by_one() if isinstance(batch, Block) else [batch]
        for number, one in enumerate(batches):
            if number:
                self._count_another_update()
            self.begin_update(self.global_step)
            self.seed_noise(self._stage, "noise", rank(), self.global_step)
            losses = self._seen_losses(whole(one)) if self.whole_update is None else self.whole_update(one)
            self._latest |= {part: metrics for part, _, metrics in losses}
        if (self.global_step + 1) % self.trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            self._watch.check(self._stage, self.global_step + 1)
            self.log_dict(_named("train", self._latest) | {"step": float(self.run_step + 1)})
            # On the CPU: Lightning reads what the bar shows after every batch, and would wait for the device each time.
            self.log_dict(_on_cpu(self._shown()), prog_bar=True, logger=False)
        return _sum(losses)

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        if self.whole_update is None:
            super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        else:
            optimizer_closure()  # `training_step`, and the two that follow

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Optimizer) -> None:
        if self.whole_update is None:
            super().optimizer_zero_grad(epoch, batch_idx, optimizer)

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        if self.whole_update is None:
            super().backward(loss, *args, **kwargs)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.begin_update(None)
        noise = self.noise(batch, "validation", rank(), batch_idx)
        if "keep" in getattr(noise, "_fields", ()):
            noise = noise._replace(keep=None)  # dropout is of updates alone
        losses = type(self).losses(self, batch, noise)  # never compiled: it is seldom called
        metrics = _named("val", {part: metrics for part, _, metrics in losses})
        self.log_dict(metrics | {"step": float(self.run_step)}, batch_size=len(batch.rewards), sync_dist=True)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        for group in optimizer.param_groups:
            if (limit := group.get("clip")) is None:
                continue
            gradients = [parameter.grad for parameter in group["params"] if parameter.grad is not None]
            if gradients:
                self.clip(gradients, limit)
        if self.drifts:
            for parameter in (p for part in set(self._active) - set(self._due) for p in self.parameters_of(part)):
                parameter.grad = torch.zeros_like(parameter)
        # Before the step: a target moves toward the weights that made this update's losses, as in the original code.
        by_tau: dict[float, tuple[list[Tensor], list[Tensor]]] = {}
        for online, target, tau in self.target_pairs():
            targets, onlines = by_tau.setdefault(tau, ([], []))
            targets.append(target)
            onlines.append(online.detach())
        for tau, (targets, onlines) in by_tau.items():
            torch._foreach_lerp_(targets, onlines, tau)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._watch.check(self._stage, self.global_step)
        if self.has_rhythm:  # the next row of the log may need them
            checkpoint[LATEST] = {part: _on_cpu(metrics) for part, metrics in self._latest.items()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._latest = dict(checkpoint.get(LATEST, {}))

    # Helpers.

    def update(self, optimizer: Optimizer, batch: Batch) -> list[Loss]:
        """All of an update, without Lightning: losses, their gradient, the targets' step and the optimizer's.

        Args:
            optimizer: of the stage.
            batch: of the update, whose noise is the generators' next.

        Returns:
            The losses, detached.
        """
        optimizer.zero_grad()
        losses = list(self.losses(batch, self.next_noise(batch)))
        with torch.autocast(self.device.type, enabled=False):  # which is for the losses alone
            _sum(losses).backward()
            return self.step(optimizer, losses)

    def step(self, optimizer: Optimizer, losses: Sequence[Loss]) -> list[Loss]:
        """What follows the gradients in an update; the losses, detached."""
        self._watch.see(losses)
        self.on_before_optimizer_step(optimizer)
        optimizer.step()
        return [(part, loss.detach(), metrics) for part, loss, metrics in losses]

    def _count_another_update(self) -> None:
        """Let Lightning, which takes a block of updates for one, count one more, and do what follows each."""
        loop = self.trainer.fit_loop.epoch_loop
        loop.batch_progress.increment_by(1, loop.batch_progress.is_last_batch)
        loop.automatic_optimization.optim_progress.optimizer.step.increment_by(1)
        loop._batches_that_stepped += 1
        for config in self.trainer.lr_scheduler_configs:
            self.lr_scheduler_step(config.scheduler, None)

    def _seen_losses(self, batch: Batch) -> list[Loss]:
        losses = list(self.losses(batch, self.next_noise(batch)))
        self._watch.see(losses)
        return losses

    def noise(self, batch: Batch, *names: int | str) -> Any:
        """The random numbers that belong to the agent's seed and `names`."""
        self.seed_noise(*names)
        return self.next_noise(batch)

    def seed_noise(self, *names: int | str) -> None:
        """Let the next noise be what belongs to the agent's seed and `names`."""
        (generator,) = self.generators
        generator.manual_seed(fold_seed(self._seed, *names))

    def next_noise(self, batch: Batch) -> Any:
        """The generators' next random numbers."""
        (generator,) = self.generators
        return self.draw_noise(batch, generator)

    @property
    def generators(self) -> list[torch.Generator]:
        """The generators of the noise, on the agent's device."""
        if self._generator is None or self._generator.device != self.device:
            self._generator = torch.Generator(self.device)
        return [self._generator]

    def draw_act_noise(self, states: int, generator: torch.Generator) -> Tensor:
        """The noise of a decision in so many states, shape (states, *act_noise_shape), on the agent's device."""
        return torch.randn((states, *self.act_noise_shape), generator=generator, device=self.device)

    def parameters_of(self, part: str) -> list[Tensor]:
        """What the optimizer steps for a part."""
        return list(self._trainable[part])

    def clip(self, gradients: Sequence[Tensor], limit: float) -> None:
        """Shorten a part's gradient, these tensors together, if its norm is above `limit`."""
        norm = torch.stack([gradient.square().sum() for gradient in gradients]).sum().sqrt()
        torch._foreach_mul_(list(gradients), (limit / (norm + ALMOST_0)).clamp(max=1.0))

    def target_pairs(self) -> Iterator[tuple[Tensor, Tensor, float]]:
        """`(online, target, tau)` of the parts that train and whose targets move in this update."""
        for part in self._active:
            pairs = getattr(getattr(self, part), "target_pairs", None)
            if pairs is not None and self.moves_targets(part):
                yield from pairs()

    def _refuse_unknown(self, setting: str, names: Iterable[str]) -> None:
        unknown = sorted(set(names) - set(self.parts))
        if unknown:
            raise UserError(f"{setting} names {unknown}: choose among the agent's parts {', '.join(self.parts)}")

    def _shown(self) -> Metrics:
        """The headline's metrics, of the parts that have trained."""
        latest = _named("", self._latest)
        headline = self.headline or {part: f"{part}/loss" for part in self._active}
        return {name: latest[f"/{metric}"] for name, metric in headline.items() if f"/{metric}" in latest}


def whole(batch: Batch | Drawn) -> Batch:
    """The batch, put together if it is not yet."""
    return batch.batch() if isinstance(batch, Drawn) else batch


def _sum(losses: Sequence[Loss]) -> Tensor:
    return torch.stack([loss for _, loss, _ in losses]).sum()


def _half_cosine(steps: int | None, step: int) -> float:
    """Factor of the learning rate after `step` of so many updates; 1 if there is no number."""
    return 1.0 if steps is None else (1 + math.cos(math.pi * min(step / steps, 1.0))) / 2


def _named(prefix: str, metrics: Mapping[str, Metrics]) -> Metrics:
    return {f"{prefix}/{part}/{key}": value for part, of_part in metrics.items() for key, value in of_part.items()}


def _on_cpu(metrics: Metrics) -> Metrics:
    return {name: value.detach().cpu() for name, value in metrics.items()}
