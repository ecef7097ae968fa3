from __future__ import annotations

import numpy as np
import pytest

from rl_autoscale.agents.holt_winters import HoltWinters


def test_by_hand() -> None:
    series = HoltWinters(alpha=0.5, beta=0.5, phi=0.8)
    assert np.isnan(series.forecast(1)).all()
    series.update(10.0)
    series.update(14.0)  # level 12, trend 0.5 x 2
    assert (series.level, series.trend) == (12.0, 1.0)
    series.update(np.nan)  # a gap moves nothing
    series.update(12.0)  # level 0.5 x 12 + 0.5 x 12.8 = 12.4; trend 0.5 x 0.4 + 0.5 x 0.8
    assert (series.level, series.trend) == pytest.approx((12.4, 0.6))
    assert series.forecast(2) == pytest.approx([12.4 + 0.8 * 0.6, 12.4 + (0.8 + 0.64) * 0.6])


def test_a_straight_line_is_continued() -> None:
    series = HoltWinters(alpha=0.4, beta=0.4)
    for k in range(200):
        series.update(3.0 + 2.0 * k)
    assert series.forecast(3) == pytest.approx([403.0, 405.0, 407.0], rel=1e-6)


def test_a_season_is_learnt() -> None:
    season = np.array([0.0, 5.0, -5.0, 2.0])
    series = HoltWinters(alpha=0.1, beta=0.02, gamma=0.4, num_slots=4, steps_per_slot=2)
    plain = HoltWinters(alpha=0.1, beta=0.02)
    for k in range(800):
        for item in (series, plain):
            item.update(20.0 + season[(k // 2) % 4])
    ahead = 20.0 + season[(np.arange(800, 808) // 2) % 4]
    assert series.forecast(8) == pytest.approx(ahead, abs=0.5)
    assert np.abs(plain.forecast(8) - ahead).max() > 3.0
