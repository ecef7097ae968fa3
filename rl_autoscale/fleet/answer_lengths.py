"""How many output tokens a request of each class takes, of which most are still being answered.

Finished requests alone mislead: for as long as an answer takes, only the short ones have ended. With answers of minutes
that is a fleet half as large as needed for the first half hour. So tokens are counted when they are generated, those
of unfinished answers included, and divided by the answers that ended: the maximum-likelihood mean of lifetimes that
are censored, where what is left of an answer does not depend on how long it is already (B. Epstein and M. Sobel, "Life
Testing", JASA 48, 1953). Under steady load the two agree whatever the lengths' distribution.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from rl_autoscale.fleet.profile import TYPICAL_OUTPUT_TOKENS
from rl_autoscale.fleet.state import FleetState, FloatArray

_PRIOR_REQUESTS = 10.0  # of typical length, counted before any data
_TIME_CONSTANT_S = 300.0  # in which what was counted fades; not while a class is idle


class AnswerLengths:
    """Tokens generated over requests finished, of the last minutes.

    Args:
        shape: (..., num_classes).

    Attributes:
        mean_tokens: output tokens of a request, of that shape; ``TYPICAL_OUTPUT_TOKENS`` before any data.
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.mean_tokens: FloatArray = np.full(shape, float(TYPICAL_OUTPUT_TOKENS))
        self._finished = np.full(shape, _PRIOR_REQUESTS)
        self._tokens = self._finished * self.mean_tokens

    def reset(self, which: npt.NDArray[np.bool_]) -> None:
        """Forget everything for the selected fleets, a boolean array over the leading dimensions."""
        self.mean_tokens[which] = TYPICAL_OUTPUT_TOKENS
        self._finished[which] = _PRIOR_REQUESTS
        self._tokens[which] = _PRIOR_REQUESTS * TYPICAL_OUTPUT_TOKENS

    def adopt(self, other: AnswerLengths, which: npt.NDArray[np.bool_]) -> None:
        """Take over what a counter of fewer fleets knows, for the selected ones."""
        self.mean_tokens[which] = other.mean_tokens
        self._finished[which] = other._finished
        self._tokens[which] = other._tokens

    def update(self, state: FleetState) -> None:
        """Count one window; of a class that cannot be read nothing is counted and nothing forgotten."""
        window_s = np.asarray(state.window_s)[..., None]
        classes = state.classes
        finished = classes.finished_per_s * window_s
        tokens = np.where(finished > 0, finished * classes.mean_output_tokens, finished)
        tokens = tokens + self._unfinished(state, finished, tokens)
        moves = np.isfinite(tokens) & ((finished > 0) | (tokens != 0))
        kept = np.exp(-window_s / _TIME_CONSTANT_S)
        self._finished = np.where(moves, self._finished * kept + finished, self._finished)
        self._tokens = np.where(moves, self._tokens * kept + tokens, self._tokens)
        self.mean_tokens = np.maximum(self._tokens / self._finished, 1.0)

    @staticmethod
    def _unfinished(state: FleetState, finished: FloatArray, tokens: FloatArray) -> FloatArray:
        """By how many tokens the answers under way grew, net of those that ended, shape (..., num_classes).

        Engines do not say whose tokens they generate. So each class gets its share of the requests that were under
        way, which is wrong by a little in a window and, since what answers grow by they take along when they end,
        by nothing in the mean. 0 where the engines' tokens or a class cannot be read.
        """
        window_s = np.asarray(state.window_s)[..., None]
        generated = state.pools.generation_tokens_per_s.sum(axis=-1, keepdims=True) * window_s
        of_finished = tokens.sum(axis=-1, keepdims=True)
        under_way = state.classes.in_flight + finished
        all_under_way = under_way.sum(axis=-1, keepdims=True)
        counted = np.isfinite(generated + of_finished) & (generated > 0) & (all_under_way > 0)
        share = under_way / np.where(counted, all_under_way, 1.0)
        return np.where(counted, (generated - of_finished) * share, 0.0)
