"""Models of the environment's steps of several runs in one picture, and their errors as a table.

python studies/transitions.py PICTURE.png RUN ...    folders of finished runs with agent/dynamics; the picture and the
                                                     table of docs/transitions.md
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from deflow.evaluation.open_loop import CENTRAL, LENGTHS, MOVES, UNCHANGED, draw_transitions
from deflow.run_folder import SUMMARY_FILE, read_summary

MEASURED = ("error", "coverage", "error_by_distance", "reward_error", "spread")


def together(runs: list[Path]) -> dict[str, Any]:
    """What the runs found, every way to draw from a model named after its run's folder."""
    found: dict[str, Any] = {key: {} for key in MEASURED}
    for run in runs:
        summary = read_summary(run / SUMMARY_FILE)
        if summary is None or "error" not in summary.get("dynamics", {}):
            raise SystemExit(f"{run} is no finished run with agent/dynamics and validation data")
        for key in MEASURED:
            of_run = summary["dynamics"][key]
            found[key] |= {name if name == UNCHANGED else f"{run.name}, {name}": of_run[name] for name in of_run}
    return found


def table(found: dict[str, Any]) -> str:
    """Markdown: a line for each way to draw from a model; what is not measured of it is left empty."""
    heads = [f"error, {length}" for length in LENGTHS] + [f"inside {share:.0%}" for share in CENTRAL]
    heads += ["reward"] + [f"spread, {move:g}" for move in MOVES]
    lines = [f"| | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for name, errors in found["error"].items():
        numbers = [errors.get(str(length)) for length in LENGTHS]
        numbers += [found["coverage"].get(name, {}).get(f"{share:.0%}") for share in CENTRAL]
        numbers += [found["reward_error"].get(name)]
        numbers += [found["spread"].get(name, {}).get(f"{move:g}") for move in MOVES]
        lines.append(f"| {name} | {' | '.join('' if n is None else f'{n:.2g}' for n in numbers)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    picture, *folders = (Path(argument) for argument in sys.argv[1:])
    of_runs = together(folders)
    draw_transitions(of_runs, picture)
    print(table(of_runs))
