"""How many output tokens a request of each class takes, of which most are still being answered.

The mean over finished requests is too low at first: for as long as an answer takes, only the short ones have ended.
Tokens generated over requests finished is too high then, unless what is left of an answer does not depend on how long
it is already: the maximum-likelihood mean of censored lifetimes (B. Epstein and M. Sobel, "Life Testing", JASA 48,
1953), where answers have few short ones among them. Under steady load both are right whatever the distribution. So
they are mixed by the share of the requests begun that have ended, and are soon the same.

Answers that are broken off count with their tokens and not with themselves: where one in ten is left half-way, the mean
is about a twentieth too high. Where none ends any more it stays within `MOST` times what those took that did.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from rl_autoscale.fleet.profile import TYPICAL_OUTPUT_TOKENS
from rl_autoscale.fleet.state import FleetState, FloatArray

MOST = 10.0
"""The mean is at most so many times that of finished requests, or of typical ones where that is more."""

_PRIOR_REQUESTS = 10.0  # of typical length, counted before any data
_LEAST_REQUESTS = 1e-6  # below that nothing fades any more: a mean of nothing is no number
_TIME_CONSTANT_S = 300.0  # in which what was counted fades; not while a class is idle


class AnswerLengths:
    """Mean output length of each class, over the last minutes.

    Args:
        shape: (..., num_classes).

    Attributes:
        mean_tokens: output tokens of a request, of that shape; ``TYPICAL_OUTPUT_TOKENS`` before any data.
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.mean_tokens: FloatArray = np.full(shape, float(TYPICAL_OUTPUT_TOKENS))
        # Of the last minutes: requests finished, their tokens, tokens generated; and all that ever finished.
        self._finished, self._of_finished, self._generated, self._ever_finished = (np.empty(shape) for _ in range(4))
        self.reset(np.ones(shape[:-1], dtype=np.bool_))

    def reset(self, which: npt.NDArray[np.bool_]) -> None:
        """Forget everything for the selected fleets, a boolean array over the leading dimensions."""
        self.mean_tokens[which] = TYPICAL_OUTPUT_TOKENS
        for count in (self._finished, self._ever_finished):
            count[which] = _PRIOR_REQUESTS
        for tokens in (self._of_finished, self._generated):
            tokens[which] = _PRIOR_REQUESTS * TYPICAL_OUTPUT_TOKENS

    def adopt(self, other: AnswerLengths, which: npt.NDArray[np.bool_]) -> None:
        """Take over what a counter of fewer fleets knows, for the selected ones."""
        for name in ("mean_tokens", "_finished", "_of_finished", "_generated", "_ever_finished"):
            getattr(self, name)[which] = getattr(other, name)

    def update(self, state: FleetState) -> None:
        """Count one window; of a class that cannot be read nothing is counted and nothing forgotten."""
        window_s = np.asarray(state.window_s)[..., None]
        classes = state.classes
        finished = classes.finished_per_s * window_s
        of_finished = np.where(finished > 0, finished * classes.mean_output_tokens, finished)
        generated = of_finished + self._unfinished(state, finished, of_finished)
        counts = np.isfinite(generated) & ((finished > 0) | (generated != 0))
        kept = np.where(counts & (self._finished > _LEAST_REQUESTS), np.exp(-window_s / _TIME_CONSTANT_S), 1.0)
        for total, more in (
            (self._finished, finished),
            (self._of_finished, of_finished),
            (self._generated, generated),
        ):
            total[...] = total * kept + np.where(counts, more, 0.0)
        self._ever_finished += np.where(counts, finished, 0.0)
        ended = self._ever_finished / (self._ever_finished + np.nan_to_num(classes.in_flight))
        mean_of_finished = self._of_finished / self._finished
        mean = ended * self._generated / self._finished + (1.0 - ended) * mean_of_finished
        most = MOST * np.maximum(mean_of_finished, TYPICAL_OUTPUT_TOKENS)
        self.mean_tokens = np.where(counts, np.clip(mean, 1.0, most), self.mean_tokens)

    @staticmethod
    def _unfinished(state: FleetState, finished: FloatArray, of_finished: FloatArray) -> FloatArray:
        """By how many tokens the answers under way grew, net of those that ended, shape (..., num_classes).

        Engines do not say whose tokens they generate. So each class gets its share of the requests that were under
        way, which is wrong by a little in a window and, since what answers grow by they take along when they end,
        by nothing in the mean. 0 where the engines' tokens or a class cannot be read.
        """
        window_s = np.asarray(state.window_s)[..., None]
        generated = state.pools.generation_tokens_per_s.sum(axis=-1, keepdims=True) * window_s
        ended = of_finished.sum(axis=-1, keepdims=True)
        under_way = state.classes.in_flight + finished
        all_under_way = under_way.sum(axis=-1, keepdims=True)
        counted = np.isfinite(generated + ended) & (generated > 0) & (all_under_way > 0)
        share = under_way / np.where(counted, all_under_way, 1.0)
        return np.where(counted, (generated - ended) * share, 0.0)
