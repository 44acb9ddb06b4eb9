"""Tests that could not fail: one line of the code is made wrong at a time, and the tests that must notice are run.

python studies/mutations.py [NAMES]     NAMES: mutations whose names hold one of these texts; all unless given

Each line is changed in a copy of the tree, in a temporary folder. The exit status is 1 if a mutation survives, 2 if the
list does not fit the tree or its tests fail without a mutation.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from common import ROOT

from deflow.errors import UserError

LEFT_OUT = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "logs")


@dataclass
class Mutation:
    """A line of `file` in which `old`, found once in the file, becomes `new`; `tests`, as pytest names them, notice."""

    name: str
    file: str
    old: str
    new: str
    tests: Sequence[str]


AGENTS, MODULES = "src/deflow/agents", "src/deflow/modules"
OF_TABLE, OF_DIFFUSION = "tests/agents/test_table.py", "tests/parity/test_diffusion.py"
OF_BASELINES, OF_REBRAC = "tests/agents/test_baselines.py", "tests/agents/test_rebrac.py"
NEXT_STATE = f"{OF_BASELINES}::test_the_target_is_of_the_next_state_and_the_policys_action_there"
TARGETS_MOVE = f"{OF_REBRAC}::test_targets_move_with_the_actor_and_it_drifts_in_between"
HELD_NEAR = f"{OF_REBRAC}::test_the_target_is_held_near_the_datas_next_action_from_a_clipped_noise_away"

MUTATIONS = [
    # Data.
    Mutation(
        "D4RL's labels are not shifted",
        "src/deflow/data/sources/d4rl.py",
        "return reward - self._step_cost",
        "return reward",
        ["tests/data/sources/test_contract.py::test_d4rl"],
    ),
    Mutation(
        "adroit's terminals end nothing",
        "src/deflow/data/sources/d4rl.py",
        "timeouts if self._is_maze else terminals | timeouts",
        "timeouts",
        ["tests/data/sources/test_d4rl.py"],
    ),
    Mutation(
        "the split is of no use",
        "src/deflow/data/sources/source.py",
        "for rows in (~held_out, held_out)",
        "for rows in (held_out | True, held_out)",
        ["tests/data/test_cases.py::test_a_folder_is_one_data_set"],
    ),
    Mutation(
        "actions are executed as they are decided",
        "src/deflow/policy.py",
        "return self.units.executed(",
        "return (",
        ["tests/test_units.py::test_a_policy_sees_and_executes_in_them"],
    ),
    # Losses of single agents.
    Mutation(
        "FBRAC minimises Q",
        f"{AGENTS}/fbrac.py",
        "value_loss = -q.mean()",
        "value_loss = q.mean()",
        [f"{OF_BASELINES}::test_fbracs_policy_climbs_the_value"],
    ),
    Mutation(
        "FBRAC's target with the state s",
        f"{AGENTS}/fbrac.py",
        "propose(batch.next_observations, noise.z_next)",
        "propose(batch.observations, noise.z)",
        [NEXT_STATE],
    ),
    Mutation(
        "Implicit values bootstrap from s",
        f"{AGENTS}/implicit.py",
        "self.value(batch.next_observations)",
        "self.value(batch.observations)",
        [NEXT_STATE],
    ),
    Mutation(
        "FAWAC's target with the noise of s at s'",
        f"{AGENTS}/fawac.py",
        "propose(batch.next_observations, noise.z_next)",
        "propose(batch.next_observations, noise.z)",
        [NEXT_STATE],
    ),
    Mutation(
        "RLPD's entropy sign in the backup",
        f"{AGENTS}/rlpd.py",
        "next_value - self.actor.temperature",
        "next_value + self.actor.temperature",
        ["tests/agents/test_rlpd.py::test_the_target_counts_the_next_actions_entropy"],
    ),
    Mutation(
        "Cal-QL's actor climbs the mean",
        f"{AGENTS}/cal_ql.py",
        ".amin(0, keepdim=True)",
        ".mean(0, keepdim=True)",
        ["tests/agents/test_cal_ql.py::test_the_actor_climbs_the_smaller_value"],
    ),
    Mutation(
        "FlowCritic ignores aggregate=min",
        f"{MODULES}/flow_critic.py",
        'next_values.mean(0) if self.aggregate == "mean" else next_values.amin(0)',
        "next_values.mean(0)",
        ["tests/modules/test_flow_critic.py::test_the_target_bootstraps_in_units_of_reward"],
    ),
    Mutation(
        "IQL's weights of the larger value",
        f"{AGENTS}/iql.py",
        "q = values(batch.observations, batch.actions).amin(0)",
        "q = values(batch.observations, batch.actions).amax(0)",
        [f"{OF_TABLE}::test_iql_weighs_imitation_by_the_advantage_of_the_smaller_value"],
    ),
    Mutation(
        "IDQL samples without the noise of its steps",
        f"{MODULES}/diffusion.py",
        "x = x + beta.sqrt() * z[number + 1]",
        "x = x + 0 * z[number + 1]",
        [f"{OF_DIFFUSION}::test_idql"],
    ),
    Mutation(
        "SRPO climbs away from the value",
        f"{AGENTS}/srpo.py",
        "score_loss - self.beta",
        "score_loss + self.beta",
        [f"{OF_TABLE}::test_srpos_policy_goes_where_score_and_value_say"],
    ),
    Mutation(
        "CAC's teacher never rests",
        f"{AGENTS}/cac.py",
        "self._number >= TEACHER_RESTS and ",
        "",
        [f"{OF_TABLE}::test_cacs_teacher_rests_and_then_moves_in_every_fifth_update"],
    ),
    Mutation(
        "ReBRAC's actor ignores its rhythm",
        f"{AGENTS}/rebrac.py",
        "optimizer, seed, every)",
        "optimizer, seed)",
        [TARGETS_MOVE],
    ),
    Mutation(
        "ReBRAC's targets move in every update",
        f"{AGENTS}/rebrac.py",
        'return self.trains("actor")',
        "return True",
        [TARGETS_MOVE],
    ),
    Mutation(
        "ReBRAC's next action is near the data's at s",
        f"{AGENTS}/rebrac.py",
        "(next_actions - batch.next_actions)",
        "(next_actions - batch.actions)",
        [HELD_NEAR],
    ),
    Mutation(
        "ReBRAC's smoothing is not clipped",
        f"{AGENTS}/rebrac.py",
        ".clamp(-self.noise_clip, self.noise_clip)",
        "",
        [HELD_NEAR],
    ),
    # What agents share.
    Mutation(
        "targets move after the step",
        f"{AGENTS}/base.py",
        "def on_before_optimizer_step(self, optimizer: Optimizer) -> None:",
        "def on_train_batch_end(self, *_: Any) -> None:",
        ["tests/agents/test_targets.py"],
    ),
    Mutation(
        "a gradient of zeros",
        f"{MODULES}/behavior_flow.py",
        "loss = errors.mean() if weights is None",
        "loss = 0 * errors.mean() if weights is None",
        [f"{OF_BASELINES}::test_shared_checks[flow_bc]"],
    ),
    Mutation(
        "a multiplier's loss without its limit",
        f"{MODULES}/constraints.py",
        "violation = cost.detach() - self.limit",
        "violation = cost.detach() - 0 * self.limit",
        ["tests/parity/test_parity.py::test_mixed_precision_agrees_to_its_own_accuracy[deflow_mean]"],
    ),
    Mutation(
        "images of 0 to 255",
        "src/deflow/nets/encoder.py",
        ".float() / 255.0",
        ".float()",
        ["tests/test_images.py::test_the_encoder_pools_as_the_original"],
    ),
    # Evaluation.
    Mutation(
        "success if ever",
        "src/deflow/envs/success.py",
        "if self.ever and before is not None",
        "if before is not None",
        ["tests/evaluation/test_rollout.py::test_success_is_that_of_the_end_unless_asked_otherwise"],
    ),
    # Serving.
    Mutation(
        "whoever waits is decided for alone",
        "src/deflow/serving/batching.py",
        "while not self._asked.empty()",
        "while False",
        ["tests/test_serving.py::test_who_asks_in_the_meantime_is_decided_for_together_and_as_alone"],
    ),
    Mutation(
        "robots share their noise",
        "src/deflow/serving/server.py",
        "self._noise = noise_stream(seed)",
        "self._noise = policy.__dict__.setdefault('noise', noise_stream(seed))",
        ["tests/test_serving.py::test_a_trained_policy_decides_for_many_as_for_each"],
    ),
    Mutation(
        "a token that begins as the right one",
        "src/deflow/serving/server.py",
        'hmac.compare_digest(given[0].encode(errors="replace"), f"Api-Key {token}".encode())',
        'f"Api-Key {token}".startswith(given[0])',
        ["tests/test_serving.py::test_without_the_token_nobody_is_served"],
    ),
    Mutation(
        "arrays of objects are read",
        "src/deflow/serving/wire.py",
        "if not isinstance(dtype, str) or not NUMBERS.fullmatch(dtype):",
        "if not isinstance(dtype, str):",
        ["tests/test_serving.py::test_a_wrong_request_is_answered_by_a_line_and_changes_nothing"],
    ),
    Mutation(
        "a stop forgets what waits for its turn",
        "src/deflow/serving/server.py",
        "while (message := await self._next(connection)) is not None:",
        "while not self._stopping and (message := await self._next(connection)) is not None:",
        ["tests/test_serving.py::test_what_was_asked_is_answered_before_it_stops"],
    ),
]


def main(names: Sequence[str], mutations: Sequence[Mutation] = MUTATIONS, root: Path = ROOT) -> int:
    """Print the table; the exit status."""
    chosen = [one for one in mutations if not names or any(name in one.name for name in names)]
    if not chosen:
        raise UserError(f"no mutation's name holds {' or '.join(names)}")
    changed = {one.name: mutated(root, one) for one in chosen}  # all of them, before the first is run
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        shutil.copytree(root, tree, ignore=LEFT_OUT)
        if fails(tree, sorted({test for one in chosen for test in one.tests})):
            raise UserError("the tests fail without a mutation: mend them first")
        print("| mutation | file | outcome |\n|---|---|---|")
        survivors = sum(not is_killed(tree, one, changed[one.name]) for one in chosen)
    print(f"\n{len(chosen)} mutations, {survivors} survived", file=sys.stderr)
    return int(survivors > 0)


def mutated(root: Path, mutation: Mutation) -> str:
    """The file's text with the mutation.

    Raises:
        UserError: if the line is not found exactly once.
    """
    text = (root / mutation.file).read_text()
    if text.count(mutation.old) != 1:
        found = text.count(mutation.old)
        raise UserError(f"'{mutation.name}': {mutation.file} has '{mutation.old}' {found} times and not once")
    return text.replace(mutation.old, mutation.new)


def is_killed(tree: Path, mutation: Mutation, text: str) -> bool:
    """Whether the mutation's tests notice it; prints its row."""
    file = tree / mutation.file
    before = file.read_text()
    file.write_text(text)
    killed = fails(tree, mutation.tests)
    file.write_text(before)
    print(f"| {mutation.name} | {mutation.file} | {'killed' if killed else 'SURVIVED'} |", flush=True)
    return killed


def fails(tree: Path, tests: Sequence[str]) -> bool:
    """Whether one of the tests fails.

    Raises:
        UserError: if they do not run at all.
    """
    command = [sys.executable, "-B", "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    paths = {"PYTHONPATH": os.pathsep.join([str(tree / "src"), str(tree)])}
    result = subprocess.run(command, cwd=tree, env=os.environ | paths, capture_output=True, text=True)
    if result.returncode > 1:
        raise UserError(f"pytest cannot run {' '.join(tests)}: {(result.stdout + result.stderr)[-2000:]}")
    return result.returncode == 1


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
