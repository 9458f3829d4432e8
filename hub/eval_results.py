"""Results of an arm in the form of `.eval_results` (https://huggingface.co/docs/hub/eval-results)."""

from typing import Any

import yaml
from huggingface_hub import EvalResultEntry, constants, eval_result_entries_to_yaml

from m2mkd.data.known_sets import known_set
from m2mkd.model_cards.run_card import hub_id


def eval_files(report: dict[str, Any], arm: str, seed: int, repo_id: str) -> dict[str, bytes]:
    """
    The accuracy of an arm on test sets that are on the Hub, one file a set, which the page of the set can list. The
    accuracy on a part of a set, or on a set that was made from another one, is left out.

    Args:
        report (`dict[str, Any]`): Of the run.
        arm (`str`), seed (`int`): The arm.
        repo_id (`str`): Where its card will be.

    Returns:
        `dict[str, bytes]`: YAML by path in the repository.
    """
    recipe, result = report["recipe"], report["seeds"][str(seed)]["arms"][arm]
    entries: dict[str, list[EvalResultEntry]] = {}
    for split in ("iid", "ood"):
        section = recipe["data"].get(recipe["evaluation"].get(split))
        if section is None or result[split] is None or not _is_whole(section, result[split]["n"]):
            continue
        dataset = hub_id(section["source"])
        if dataset is not None:
            entry = EvalResultEntry(
                dataset,
                section.get("config_name") or "default",
                result[split]["accuracy"],
                date=report["date"],
                source_url=f"{constants.ENDPOINT}/{repo_id}",
                source_name="Model card",
                notes=f"accuracy, split {section['split']}, {result[split]['n']} images",
            )
            entries.setdefault(f".eval_results/{dataset.rpartition('/')[2]}.yaml", []).append(entry)
    return {
        name: yaml.safe_dump(eval_result_entries_to_yaml(own), sort_keys=False, allow_unicode=True).encode()
        for name, own in entries.items()
    }


def _is_whole(section: dict[str, Any], images: int) -> bool:
    """Whether all `images` of a published split were tested; of an unknown set, whether the recipe asks for all."""
    known = known_set(section["source"])
    if known is not None:
        return images == known.splits[section["split"]][1]
    return section.get("samples_per_class") is None
