"""Types that say which values a setting may have: signatures carry them, and `settings.py` checks and explains them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field

Natural = Annotated[int, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
Pairs = Annotated[int, Field(ge=4, multiple_of=2)]  # of sines and cosines
Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]  # what NumPy and Lightning take
TaskId = Annotated[int, Field(ge=1, le=5)]  # of OGBench
Port = Annotated[int, Field(ge=0, le=2**16 - 1)]
Neighbours = Annotated[int, Field(ge=2)]  # as many as a variance needs

Positive = Annotated[float, Field(gt=0)]  # every number is finite, see `settings.py`
NonNegative = Annotated[float, Field(ge=0)]
Probability = Annotated[float, Field(ge=0, le=1)]
Share = Annotated[float, Field(gt=0, le=1)]
Rate = Annotated[float, Field(ge=0, lt=1)]  # such as of dropout, or by which an average forgets
Discount = Annotated[float, Field(ge=0, lt=1)]
Betas = Annotated[Sequence[Discount], Field(min_length=2, max_length=2)]  # of Adam
Expectile = Annotated[float, Field(ge=0.5, lt=1)]  # of the upper half

Widths = Annotated[Sequence[Count], Field(min_length=1)]  # of layers
Names = Annotated[Sequence[str], Field(min_length=1)]
Interval = Annotated[Sequence[float], Field(min_length=2, max_length=2)]  # lowest and highest
Limit = Positive | Annotated[Sequence[Positive], Field(min_length=1)]  # one for all action dimensions, or one for each


class ReadIf(NamedTuple):
    """Marks a setting that only matters while another one has a certain value.

    Its key is that of a neighbour, or a whole one with dots.
    """

    key: str
    value: Any


Activation = Literal["gelu", "gelu_tanh", "relu", "mish", "silu"]  # see `activate`
Norm = Literal["hidden", "input", "none"]  # what layer normalisation is applied to
Reduction = Literal["mean", "sum"]  # over an ensemble's members
