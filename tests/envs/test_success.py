from __future__ import annotations

import numpy as np
import pytest

from deflow.envs.success import SuccessRule
from deflow.errors import UserError


@pytest.mark.parametrize("said", [3.2, -1.0, float("nan"), np.array([0.0, 2.0])])
def test_what_is_no_share_is_refused(said: float | np.ndarray) -> None:
    with pytest.raises(UserError, match=r"info says reached=.* from 0 to 1: name another key by data"):
        SuccessRule("reached").of_step({"reached": said})


def test_what_is_one() -> None:
    said = [SuccessRule().of_step({"is_success": value}) for value in (True, np.array([0.0, 1.0]), 0.5)]
    assert said == [1.0, 1.0, 0.5]
    assert SuccessRule().of_step({"reached": 1.0}) is None
