"""How far one latency profile is from another: the same iterations, both predictions."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rl_autoscale.fleet.profile import BLOCK_SIZE_TOKENS, LatencyProfile
from rl_autoscale.sim.fit import predict_s
from rl_autoscale.sim.fit_sources import GpuSystem, sample_iterations
from rl_autoscale.sim.iteration_table import REGIONS


@dataclass(frozen=True, slots=True)
class RegionError:
    """Of one kind of iteration, as fractions of the other profile's time.

    Attributes:
        mean: of the absolute error.
        p99: of the absolute error.
        bias: mean of the signed error; negative is predicted too fast.
    """

    mean: float
    p99: float
    bias: float


@dataclass(frozen=True, slots=True)
class _ProfileSource:
    """A profile as an `IterationSource`."""

    profile: LatencyProfile

    @property
    def system(self) -> GpuSystem:
        profile = self.profile
        return GpuSystem(profile.gpu, "", profile.max_num_batched_tokens, profile.max_num_seqs)

    @property
    def kv_tokens(self) -> int:
        return self.profile.kv_blocks * BLOCK_SIZE_TOKENS

    def iteration_s(
        self, chunks: int, chunk_tokens: int, chunk_context: int, num_decode: int, decode_context: int
    ) -> float:
        return self.profile.iteration_s(
            num_decode=num_decode,
            decode_context_tokens=num_decode * decode_context,
            chunks=((chunk_tokens, chunk_context),) * chunks,
        )


def profile_error(
    profile: LatencyProfile, measured: LatencyProfile, *, num_rows: int = 3_000, seed: int = 0
) -> dict[str, RegionError]:
    """Errors by kind of iteration (`REGIONS`) on iterations as `fit_sources.sample_iterations` draws them.

    Args:
        profile: to be judged.
        measured: taken for true; its engine limits and KV blocks bound the iterations.
        num_rows: iterations, a third of each kind.
        seed: of the sample.
    """
    table = sample_iterations(_ProfileSource(measured), np.random.default_rng(seed), num_rows)
    error = predict_s(profile, table) / table.iteration_s - 1.0
    found = {}
    for name in REGIONS:
        of_kind = error[table.region(name)]
        size = np.abs(of_kind)
        found[name] = RegionError(float(size.mean()), float(np.quantile(size, 0.99)), float(of_kind.mean()))
    return found
