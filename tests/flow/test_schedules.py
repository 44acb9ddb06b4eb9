"""Schedules of diffusion and consistency models against their closed forms."""

from __future__ import annotations

import math

import pytest
import torch

from deflow.flow.schedules import growing_count, karras_times, vp_betas, vp_levels


def test_the_discrete_process_adds_up_to_the_continuous_one() -> None:
    # Over all steps the exponents of the betas are 0.1 and half of 9.9, whatever the number of steps.
    for steps in (1, 5, 100):
        assert (1 - vp_betas(steps)).prod().item() == pytest.approx(math.exp(-0.1 - 9.9 / 2))


def test_the_continuous_process_keeps_the_variance() -> None:
    signal, sigma = vp_levels(torch.linspace(0, 1, 11))
    torch.testing.assert_close(signal.square() + sigma.square(), torch.ones(11))
    assert (signal[0], sigma[0]) == (1, 0)
    assert signal[-1].item() == pytest.approx(math.exp(-0.25 * 19.9 - 0.05), rel=1e-5)
    assert (signal.diff() < 0).all()


def test_karras_boundaries() -> None:
    boundaries = karras_times(torch.arange(20), 20, low=0.002, high=80.0, rho=7.0)
    torch.testing.assert_close(boundaries[[0, -1]], torch.tensor([0.002, 80.0]))
    steps = (boundaries ** (1 / 7)).diff()
    torch.testing.assert_close(steps, steps[0].expand(19), rtol=1e-4, atol=0)


def test_the_number_of_boundaries_grows_from_the_first_to_the_last() -> None:
    counts = [growing_count(step, 1000, 2, 150) for step in range(1001)]
    assert (counts[0], counts[-1]) == (2, 150)
    assert counts == sorted(counts)
    assert counts[250] == pytest.approx(75, abs=2)  # a square root: a quarter of the way, half of the number
