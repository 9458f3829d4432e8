"""`.eval_results`: only what is the accuracy on a whole set of the Hub."""

from typing import Any

import pytest
import yaml
from huggingface_hub import parse_eval_result_entries

from m2mkd.hub.eval_results import eval_files


def report(n: int = 10_000, **iid: Any) -> dict[str, Any]:
    result = {"iid": {"accuracy": 0.9, "n": n}, "ood": {"accuracy": 0.5, "n": 30_000}}
    data = {
        "test": {"source": "cifar10:/data", "split": "test", **iid},
        "other": {"source": "mnist5k", "split": "test"},
    }
    recipe = {"data": data, "evaluation": {"iid": "test", "ood": "other"}}
    return {"recipe": recipe, "date": "2026-11-24T17:00:00+00:00", "seeds": {"0": {"arms": {"kd": result}}}}


def test_a_whole_set() -> None:
    (file,) = eval_files(report(), "kd", 0, "alice/vmoe").items()
    assert file[0] == ".eval_results/cifar10.yaml"
    (entry,) = parse_eval_result_entries(yaml.safe_load(file[1]))
    assert (entry.dataset_id, entry.value, entry.task_id) == ("uoft-cs/cifar10", 0.9, "default")
    assert entry.source_url.endswith("/alice/vmoe") and entry.notes == "accuracy, split test, 10000 images"
    (other,) = eval_files(report(source="user/set", config_name="large"), "kd", 0, "alice/vmoe")
    assert other == ".eval_results/set.yaml"


@pytest.mark.parametrize(
    "changes",
    [
        {"n": 9_999},
        {"source": "tiny-imagenet-r"},
        {"source": "imagefolder:/mine"},
        {"source": "user/set", "samples_per_class": 5},
    ],
)
def test_what_is_no_result_of_a_set(changes: dict[str, Any]) -> None:
    assert eval_files(report(**changes), "kd", 0, "alice/vmoe") == {}
