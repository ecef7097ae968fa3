"""Wall-clock stamps: ``2023-11-16 18:17:03.9799600`` and ``2024-05-12 00:00:00+00:00``, to integer nanoseconds.

The Azure traces carry 7 digits (100 ns) in 2023, and 6, or none at all, with an offset in 2024.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta

import numpy as np
import numpy.typing as npt

from rl_autoscale.workload.trace import Int64Array

_PATTERN = re.compile(r"(\d{4}-\d\d-\d\d)[ T](\d\d):(\d\d):(\d\d)(?:\.(\d{1,9}))?(Z|[+-]\d\d:?\d\d)?")
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_YEARS = range(1970, 2262)
"""Nanoseconds since 1970 fit int64 until 2262."""

STAMP_BYTES = 40
"""Width of the byte strings `parse_stamps` takes; a longer stamp is not a stamp."""


def parse_stamp_ns(text: str) -> int:
    """Nanoseconds since 1970 of one stamp, without an offset taken as UTC; raises ValueError for anything else."""
    match = _PATTERN.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"'{text}' is not a time like 2023-11-16 18:17:03.9799600")
    date, hour, minute, second, fraction, offset = match.groups()
    moment = datetime.fromisoformat(f"{date}T{hour}:{minute}:{second}").replace(tzinfo=UTC)
    if offset and offset != "Z":
        digits = offset.replace(":", "")
        shift = timedelta(hours=int(digits[1:3]), minutes=int(digits[3:5]))
        moment -= shift if digits[0] == "+" else -shift
    if moment.year not in _YEARS:
        raise ValueError(f"the year of '{text}' is not within {_YEARS.start}..{_YEARS.stop - 1}")
    whole_s = (moment - _EPOCH) // timedelta(seconds=1)
    return whole_s * 1_000_000_000 + int((fraction or "").ljust(9, "0"))


def parse_stamps(text: npt.NDArray[np.bytes_]) -> Int64Array | None:
    """The same for an array of byte strings of `STAMP_BYTES` at once.

    Returns:
        Shape (N,), int64; None when any stamp has a form this fast path does not know (then ask `parse_stamp_ns` row
        by row).
    """
    chars = text.view(np.uint8).reshape(text.size, STAMP_BYTES)
    digits = chars.astype(np.int64) - ord("0")
    is_digit = (digits >= 0) & (digits <= 9)
    fixed = [place for place in range(19) if place not in (4, 7, 10, 13, 16)]
    separators = (chars[:, [4, 7, 13, 16]] == np.frombuffer(b"--::", np.uint8)).all()
    if not (is_digit[:, fixed].all() and separators and np.isin(chars[:, 10], (ord(" "), ord("T"))).all()):
        return None
    hour, minute, second = (digits[:, place] * 10 + digits[:, place + 1] for place in (11, 14, 17))
    if hour.max(initial=0) > 23 or minute.max(initial=0) > 59 or second.max(initial=0) > 59:
        return None
    fraction_ns, end = _fractions(chars, digits, is_digit)
    days = _days(text)
    if days is None or not _only_utc_follows(chars, end):
        return None
    whole_s = ((days * 24 + hour) * 60 + minute) * 60 + second
    return np.asarray(whole_s * 1_000_000_000 + fraction_ns, dtype=np.int64)


def _fractions(
    chars: npt.NDArray[np.uint8], digits: Int64Array, is_digit: npt.NDArray[np.bool_]
) -> tuple[Int64Array, Int64Array]:
    """Nanoseconds after the point, and the place where each stamp's number ends."""
    fraction_ns = np.zeros(chars.shape[0], dtype=np.int64)
    end = np.full(chars.shape[0], 19, dtype=np.int64)
    going = chars[:, 19] == ord(".")
    end[going] = 20
    for place in range(20, 29):
        going &= is_digit[:, place]
        fraction_ns += np.where(going, digits[:, place] * 10 ** (28 - place), 0)
        end[going] = place + 1
    return fraction_ns, end


def _days(text: npt.NDArray[np.bytes_]) -> Int64Array | None:
    """Days since 1970 of the leading dates; there are few different ones."""
    dates, inverse = np.unique(text.astype("S10"), return_inverse=True)
    try:
        days = dates.astype("U10").astype("datetime64[D]").astype(np.int64)
    except ValueError:
        return None
    if days.size and not (days.min() >= 0 and days.max() < np.datetime64(str(_YEARS.stop), "D").astype(np.int64)):
        return None
    return np.asarray(days[inverse], dtype=np.int64)


def _only_utc_follows(chars: npt.NDArray[np.uint8], end: Int64Array) -> bool:
    """Whether after its number each stamp has nothing, Z or +00:00."""
    rest = chars[np.arange(chars.shape[0])[:, None], end[:, None] + np.arange(7)]
    allowed = [np.frombuffer(ending.ljust(7, b"\0"), np.uint8) for ending in (b"", b"Z", b"+00:00")]
    return bool(np.any([(rest == ending).all(axis=1) for ending in allowed], axis=0).all())
