"""Which keys of a recipe an artifact depends on."""

from m2mkd.experiment.phases import Phase
from m2mkd.experiment.recipe import Recipe


# Keys that may change at any time: arms and seeds can be added, and phases or pairs distributed, without touching
# finished phases.
_FREE = ("name", "output_dir", "repeat_seeds", "equal_compute", "processes", "engine", "resources", "distill.pairs")
# Training arguments may change in the middle of a phase, e.g. after a loss that was not finite.
TRAINING = ("training", "incubation", "finetuning")
# Training arguments that affect neither weights nor results, so they may change at any time: how images are read (but
# not in which order), and what is shown, logged, kept and sent.
_OPERATIONAL = {
    *("dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers"),
    *("dataloader_prefetch_factor", "dataloader_multiprocessing_context", "torch_empty_cache_steps", "ddp_timeout"),
    *("logging_strategy", "logging_steps", "logging_first_step", "logging_nan_inf_filter", "log_level"),
    *("log_level_replica", "log_on_each_node", "disable_tqdm", "report_to", "run_name", "project"),
    *("trackio_space_id", "trackio_bucket_id", "trackio_static_space_id", "include_num_input_tokens_seen"),
    *("skip_memory_metrics", "save_total_limit", "save_on_each_node", "enable_jit_checkpoint", "do_train", "do_eval"),
    *("do_predict", "push_to_hub", "hub_token", "hub_private_repo", "hub_model_id", "hub_strategy", "hub_always_push"),
    "hub_revision",
}
# These may change as well, unless the best checkpoint becomes the result.
_CHECKPOINTS, _TAKES_BEST = {"save_strategy", "save_steps"}, "load_best_model_at_end"


def is_free(key: str, recipe: Recipe) -> bool:
    """Whether a key may change at any time."""
    return key.startswith(_FREE) or _is_whole_arm(key) or _is_operational(key, recipe)


def _is_operational(key: str, recipe: Recipe) -> bool:
    parts = key.split(".")
    inside = [index for index, part in enumerate(parts[:-1]) if part in TRAINING]
    if not inside:
        return False
    argument = parts[inside[0] + 1]
    takes_best = any(training.get(_TAKES_BEST) for training in recipe.all_training())
    return argument in _OPERATIONAL or (argument in _CHECKPOINTS and not takes_best)


def _is_whole_arm(key: str) -> bool:
    """Whether the key is a whole arm, which was added or left out."""
    section, _, rest = key.partition(".")
    return section == "arms" and "." not in rest


def depends(phase: Phase, key: str) -> bool:
    """Whether the artifact of a phase, apart from those that it reads, depends on a key of the recipe."""
    section, _, rest = key.partition(".")
    if section == "data":
        return rest.partition(".")[0] in phase.data
    if section in ("meta", "teacher", "student", "distill", "finetune", "kd", "upcycle", "evaluation", "arms"):
        return any(_is_inside(key, own) or _is_inside(own, key) for own in phase.sections)
    return True


def _is_inside(key: str, section: str) -> bool:
    return key == section or key.startswith(f"{section}.")
