"""One seed per run, one named stream of random numbers per consumer."""

from __future__ import annotations

import zlib

import numpy as np


def stream(seed: int, name: str) -> np.random.Generator:
    """The generator of a named consumer (``arrivals``, ``lengths``, ``startup``, ``routing``, ``policy``, ...).

    Streams of different names are independent, so drawing more from one changes no other: with the same seed every
    policy meets the same arrivals, lengths, start-up times and routing numbers (common random numbers).
    """
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, zlib.crc32(name.encode())])))
