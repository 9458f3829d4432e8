"""The engine on a real Ray on this machine."""

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray_work
from tiny_run import tiny_recipe
from tiny_study import write_study

from m2mkd.errors import RunError
from m2mkd.experiment import engines, runner
from m2mkd.experiment.engines.task import Task
from m2mkd.experiment.recipe import Resources
from m2mkd.experiment.study.results import collect_study
from m2mkd.experiment.study.runs import run_study
from m2mkd.experiment.study.spec import load_study


class TestWithoutRay:
    def test_ray_that_is_not_installed_is_asked_for(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "ray", None)
        monkeypatch.delitem(sys.modules, "m2mkd.experiment.engines.ray", raising=False)
        monkeypatch.delattr(engines, "ray", raising=False)
        with pytest.raises(RunError, match=r"Ray is not installed: pip install 'm2mkd\[ray\]'"):
            runner.run(tiny_recipe(tmp_path, engine="ray"))
        assert not list(tmp_path.rglob("*.lock"))


ray = pytest.importorskip("ray")
engine = pytest.importorskip("m2mkd.experiment.engines.ray")
CPU = Resources(gpus=0)


def part(name: str, folder: Path, after: tuple[str, ...] = (), resources: Resources = CPU) -> Task:
    return Task(name, (folder,), after, (name,), resources)


def test_parts_wait_for_all_parts_of_what_their_task_reads(tmp_path: Path) -> None:
    tasks = [Task("pairs", (1,), ("teacher",), ("pairs/0", "pairs/1")), Task("arm", (2,), ("pairs",), ("arms/kd",))]
    apart = [task for own in tasks for task in engine._apart(own, tasks)]
    assert [(task.name, task.arguments, task.after) for task in apart] == [
        ("pairs: pairs/0", (1, "pairs/0"), ()),
        ("pairs: pairs/1", (1, "pairs/1"), ()),
        ("arm", (2, "arms/kd"), ("pairs: pairs/0", "pairs: pairs/1")),
    ]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A cluster of one node, which says that it has two GPUs."""
    cluster_utils = pytest.importorskip("ray.cluster_utils")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        # processes of nodes find the work of this folder; by default, they are nice and wait for all others
        patch.setenv("PYTHONPATH", str(Path(__file__).parent))
        patch.setenv("RAY_worker_niceness", "0")
        cluster = cluster_utils.Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "num_gpus": 2})
        ray.init(address=cluster.address)
        yield cluster
        ray.shutdown()
        cluster.shutdown()


@pytest.mark.slow
class TestTasks:
    def test_they_keep_their_order_share_a_gpu_and_are_heard(
        self, cluster: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("HF_TOKEN", "hf_marked_token")
        half = Resources(gpus=0.5, cpus=0.5)
        tasks = [part("third", tmp_path, ("first", "second"), Resources(gpus=0, cpus=2))]
        tasks += [part("first", tmp_path, (), half), part("second", tmp_path, (), half)]
        engine.run_tasks(tasks, ray_work.meet, tmp_path)
        said = capsys.readouterr().out
        assert "first met second" in said and "second met first" in said and "third: on" in said
        assert (tmp_path / "third").read_text() == "2 threads, GPU , token None"
        assert {(tmp_path / name).read_text() for name in ("first", "second")} == {"1 threads, GPU 0, token None"}
        assert not list(tmp_path.glob(".probe*"))
        session = Path(cluster.head_node.get_session_dir_path())
        written = [path for path in session.rglob("*") if path.is_file()]
        assert written and not any(b"hf_marked_token" in path.read_bytes() for path in written)

    def test_several_gpus_make_several_processes_that_train_together(
        self, cluster: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        two = Resources(gpus=2)
        engine.run_tasks([part("sum", tmp_path, (), two)], ray_work.add, tmp_path)
        assert sorted((path.name, path.read_text()) for path in tmp_path.glob("sum-*")) == [
            ("sum-0", "3"),
            ("sum-1", "3"),
        ]
        said = capsys.readouterr().out
        assert "process 0 says 3" in said and "process 1 says" not in said
        with pytest.raises(RunError, match=r"rank 1 has no room \(in bad, on "):
            engine.run_tasks([part("bad", tmp_path, (), two)], ray_work.add, tmp_path)

    def test_an_error_ends_the_others_and_is_not_tried_again(self, cluster: Any, tmp_path: Path) -> None:
        tasks = [part("long", tmp_path), part("bad", tmp_path)]
        with pytest.raises(RunError, match=r"bad has no room \(in bad, on .+\)"):
            engine.run_tasks(tasks, ray_work.fail, tmp_path)
        assert (tmp_path / "bad.tries").read_text() == "x"
        process = int((tmp_path / "long").read_text())
        eventually(lambda: not psutil.pid_exists(process) or psutil.Process(process).status() == "zombie")

    def test_a_task_that_is_lost_again_and_again_is_given_up(
        self, cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(engine, "RESTARTS", 1)
        with pytest.raises(RunError, match="killed was lost 2 times, at last so"):
            engine.run_tasks([part("killed", tmp_path)], ray_work.fail, tmp_path)
        assert (tmp_path / "killed.tries").read_text() == "xx"

    def test_what_no_node_has_is_refused(self, cluster: Any, tmp_path: Path) -> None:
        with pytest.raises(
            RunError, match="arm needs 1 CPUs and 8 GPUs on one node, but the nodes have 2 CPUs and 2 G"
        ):
            engine.run_tasks([part("arm", tmp_path, (), Resources(gpus=8))], ray_work.meet, tmp_path)

    def test_a_folder_that_a_node_does_not_see_is_refused(
        self, cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A node for which the folder has another name."""
        see = engine._look
        monkeypatch.setattr(engine, "_look", lambda here, there, own: see(here, there.parent / "other" / "x", own))
        with pytest.raises(RunError, match=f"Node .*: it does not see {tmp_path}.* Mount it there"):
            engine.run_tasks([part("arm", tmp_path)], ray_work.meet, tmp_path)
        assert not list(tmp_path.iterdir())


def eventually(find: Callable[[], Any], seconds: float = 300) -> Any:
    """The first answer of `find` that is not empty."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := find():
            return found
        time.sleep(0.05)
    raise TimeoutError


@pytest.mark.slow
def test_a_study_goes_through_the_same_engine(cluster: Any, tmp_path: Path) -> None:
    spec, points = load_study(write_study(tmp_path, engine="ray"), {"seeds": [0]})
    run_study(points)
    assert {name: len(curve["points"]) for name, curve in collect_study(spec, points)["curves"].items()} == {
        "kd": 2,
        "after_modules": 2,
    }
