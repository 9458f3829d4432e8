"""Where everything of a run lies."""

from pathlib import Path

from m2mkd.experiment.run_folder import RunFolder, work_folder


class TestRunFolder:
    def test_the_first_seed_lies_in_the_folder_itself_and_the_others_in_seeds(self) -> None:
        folder = RunFolder("runs/digits", seed=3)
        assert folder.meta == Path("runs/digits/meta") and folder.teacher == Path("runs/digits/teacher")
        assert folder.pair(1, 3) == Path("runs/digits/pairs/1")
        assert folder.arm("kd", 4) == Path("runs/digits/seeds/4/arms/kd")
        assert folder.report("md") == Path("runs/digits/report.md")

    def test_what_is_there_is_found(self, tmp_path: Path) -> None:
        for name in ("arms/kd", "arms/e2e", "arms/.m2mkd.work", "pairs/0", "pairs/2", "seeds/7/arms/kd", "seeds/x"):
            (tmp_path / name).mkdir(parents=True)
        folder = RunFolder(tmp_path, seed=0)
        assert folder.seeds() == [0, 7]
        assert folder.arm_names(0) == ["e2e", "kd"] and folder.arm_names(7) == ["kd"]
        assert folder.num_pairs(0) == 3 and folder.num_pairs(7) == 0
        assert list(folder.work_folders()) == [tmp_path / "arms" / ".m2mkd.work"]

    def test_checkpoints_lie_beside_the_artifact(self) -> None:
        assert work_folder(Path("run/arms/kd")) == Path("run/arms/.kd.work")
