"""The local back end while its folder cannot be written: nothing is started that nobody would remember."""

from __future__ import annotations

import errno
import threading
from pathlib import Path

import pytest
from serving.local_bench import Bench

from rl_autoscale.serving.protocols import BackendError


class Disk:
    """Where the back end remembers; ``full`` refuses every write."""

    def __init__(self, monkeypatch):
        self.full, self.num_refused = False, 0
        self.refused_thrice = threading.Event()
        write_text = Path.write_text

        def write(path, text, **how):
            if not self.full:
                return write_text(path, text, **how)
            self.num_refused += 1
            if self.num_refused >= 3:
                self.refused_thrice.set()
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(Path, "write_text", write)


@pytest.fixture
def disk(monkeypatch):
    return Disk(monkeypatch)


def test_a_target_that_cannot_be_remembered_is_refused_and_changes_nothing(bench, disk, tmp_path):
    bench.backend.set_target(2)
    disk.full = True
    for target in (3, 1):
        with pytest.raises(BackendError, match=r"state\.json: No space left on device.*free space there") as refused:
            bench.backend.set_target(target)
        assert refused.value.retryable
        assert (bench.backend.observe().asked_for, bench.phases) == (2, ["starting", "starting"])
    disk.full = False
    bench.backend.set_target(3)
    assert len(bench.phases) == 3


def test_no_process_is_left_running_that_nobody_remembers(bench, disk):
    bench.backend.set_target(1)
    bench.processes.codes[100] = 1
    bench.step()  # the crash is remembered; the next start waits for a pause
    disk.full = True
    for _ in range(5):
        with pytest.raises(BackendError, match="No space left"):
            bench.step(10.0)
    assert all(code is not None for code in bench.processes.codes.values())
    assert len(bench.processes.codes) == 2  # no start and kill at each pass
    disk.full = False
    bench.step()
    assert bench.phases == ["failed", "starting"]


def test_closing_on_a_full_disk_releases_the_folder(bench, disk):
    bench.backend.set_target(1)
    bench.processes.codes[100] = 1
    disk.full = True
    with pytest.raises(BackendError):
        bench.step()
    bench.backend.close()
    disk.full = False
    bench.backend = bench.make()
    assert bench.backend.observe().asked_for == 1


def test_the_supervisor_survives_a_full_disk_and_goes_on_when_there_is_space(tmp_path, disk):
    started = threading.Event()
    bench = Bench(tmp_path, poll_s=0.001, backoff_s=0.001)
    bench.backend.close()
    bench.backend = bench.make(supervise=True)
    bench.backend.set_target(1)
    disk.full = True
    bench.processes.codes[100] = 1
    assert disk.refused_thrice.wait(30.0)
    start = bench.processes.start
    bench.processes.start = lambda *words: (started.set(), start(*words))[1]
    disk.full = False
    bench.clock.advance(10.0)
    assert started.wait(30.0)
    bench.backend.close()


def test_a_folder_that_cannot_be_made_is_told_with_its_place(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(BackendError, match=r"file/state: Not a directory.*allow this user"):
        Bench(tmp_path / "file" / "state")
