"""The notebook, from its first cell to its last, with settings that take seconds."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tests.commands import ROOT, TINY


@pytest.mark.parametrize("where", [".", "docs"])
def test_data_and_runs_lie_beside_those_of_other_commands(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notebook = nbformat.read(ROOT / "docs" / "quickstart.ipynb", as_version=4)
    (parameters,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())]
    (tmp_path / "docs").mkdir()
    monkeypatch.chdir(tmp_path / where)
    names = {"Path": Path}
    exec(parameters.source, names)
    assert (names["DATA"], names["LOGS"]) == (tmp_path / "data/cube-single-play-v0.npz", tmp_path / "logs/notebook")


@pytest.mark.slow
def test_the_notebook_runs(
    tiny_data: Callable[[str, str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notebook = nbformat.read(ROOT / "docs" / "quickstart.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)
    (parameters,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())]
    data = tiny_data("cube-single", "play") / "cube-single-play-v0.npz"
    once = ("eval.every=6", "eval.episodes=1", "eval.num_envs=1", "validate_every=6", "checkpoint_every=6")
    tiny = [*TINY, *once, "diversity.states=2"]
    parameters.source = (
        f"DATA, LOGS, DELTAS = Path({str(data)!r}), Path({str(tmp_path)!r}), [0.01]\n"
        f"BEHAVIOR_UPDATES, SETTINGS = 4, {tiny}"
    )
    again = [cell for cell in notebook.cells if cell.cell_type == "code" and "train(" in cell.source]
    assert len(again) == 2
    notebook.cells += [nbformat.v4.new_code_cell(cell.source) for cell in again]  # run twice, each is whole
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 4  # card, curves, actions, deltas
    printed = "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")
    assert "steps, success: " in printed
    assert os.listdir(tmp_path / "delta_0.01")
