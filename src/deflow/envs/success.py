"""Whether an episode succeeded, by what the environment says in its `info`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from deflow.errors import UserError

KNOWN = ("success", "is_success")  # OGBench and D4RL; gymnasium-robotics and LeRobot


class SuccessRule(NamedTuple):
    """How success is read off an environment."""

    key: str | None = None  # of `info`; None: the first of `KNOWN` that is there
    ever: bool = False  # whether success at any step counts, and not only at the last

    def of_step(self, info: Mapping[str, Any]) -> float | None:
        """What a step says, 0 to 1; None if it says nothing.

        Raises:
            UserError: if it is anything else.
        """
        keys = KNOWN if self.key is None else (self.key,)
        key = next((key for key in keys if key in info), None)
        if key is None:
            return None
        found = float(np.max(info[key]))
        if not 0 <= found <= 1:
            raise UserError(
                f"the environment's info says {key}={found:g}, and a success is from 0 to 1: name another key by "
                "data.source.success_key"
            )
        return found

    def after(self, before: float | None, info: Mapping[str, Any]) -> float | None:
        """An episode's success after a step, given what it was before; None as long as nothing has been said."""
        now = self.of_step(info)
        if self.ever and before is not None and now is not None:
            return max(before, now)
        return before if now is None else now


AT_THE_END = SuccessRule()
