"""The model card of a V-MoE that was made from a dense model and not trained since."""

from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData
from transformers import PreTrainedConfig

from m2mkd.model_cards.parts import citation, model_facts, template, usage_section


def upcycled_card(config: PreTrainedConfig, parameters: int, source: str, name: str, difference: str) -> ModelCard:
    """
    The model card of an upcycled V-MoE.

    Args:
        config (`PreTrainedConfig`)
        parameters (`int`)
        source (`str`): Hub id or folder of the dense model; of a folder, only the name is shown.
        name (`str`): Name of the V-MoE.
        difference (`str`): How far its logits are from the dense model's, in a sentence.
    """
    is_folder = Path(source).exists()
    data = ModelCardData(
        model_name=name,
        base_model=None if is_folder else source,
        library_name="transformers",
        pipeline_tag="image-classification",
        tags=["m2mkd", config.model_type, "sparse-upcycling", "image-classification"],
    )
    return ModelCard.from_template(
        data,
        template_str=template("upcycled.md"),
        title=name,
        **model_facts(config, parameters),
        config=config,
        source=Path(source).resolve().name if is_folder else source,
        difference=difference,
        usage=usage_section(name, with_code=False),
        citation=citation(config.model_type, method="upcycling"),
    )
