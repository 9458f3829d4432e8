import os

import pytest

from m2mkd.experiment.machine import default_workers


class TestDefaultWorkers:
    @pytest.fixture(autouse=True)
    def sixteen_cores(self, monkeypatch):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)), raising=False)
        monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)

    @pytest.mark.parametrize(
        ("image_size", "use_cpu", "processes", "workers"),
        [(224, False, 1, 16), (224, False, 4, 4), (224, False, 32, 1), (224, True, 1, 0), (32, False, 1, 0)],
    )
    def test_cores_of_a_process(self, monkeypatch, image_size, use_cpu, processes, workers):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
        assert default_workers(image_size, use_cpu) == workers

    def test_without_a_launcher(self):
        assert default_workers(64, use_cpu=False) == 16
