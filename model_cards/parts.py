"""Parts that all model cards share: facts, usage and citations."""

from collections.abc import Iterable
from importlib import resources
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from jinja2 import Template
from transformers import PreTrainedConfig


REPORT_FILE = "report.json"
CARD_FILE = "README.md"
ARCHITECTURES = {"nac": "A Neural Attentive Circuit", "vmoe": "A vision mixture of experts (V-MoE)"}
CITATIONS = {
    "m2mkd": """@misc{lo2024m2mkd,
    title={m2mKD: Module-to-Module Knowledge Distillation for Modular Transformers},
    author={Ka Man Lo and Yiming Liang and Wenyu Du and Yuantao Fan and
            Zili Wang and Wenhao Huang and Lei Ma and Jie Fu},
    year={2024},
    eprint={2402.16918},
    archivePrefix={arXiv}
}""",
    "nac": """@misc{weiss2022nac,
    title={Neural Attentive Circuits},
    author={Martin Weiss and Nasim Rahaman and Francesco Locatello and Chris Pal and Yoshua Bengio and
            Bernhard Schölkopf and Li Erran Li and Nicolas Ballas},
    year={2022},
    eprint={2210.08031},
    archivePrefix={arXiv}
}""",
    "vmoe": """@misc{riquelme2021vmoe,
    title={Scaling Vision with Sparse Mixture of Experts},
    author={Carlos Riquelme and Joan Puigcerver and Basil Mustafa and Maxim Neumann and Rodolphe Jenatton and
            André Susano Pinto and Daniel Keysers and Neil Houlsby},
    year={2021},
    eprint={2106.05974},
    archivePrefix={arXiv}
}""",
}


def card_data(model_type: str, name: str, license: str | None, tags: Iterable[str], **more: Any) -> ModelCardData:
    """The metadata of a student's card. `tags` are added to those of every student."""
    return ModelCardData(
        model_name=name,
        license=license,
        library_name="transformers",
        pipeline_tag="image-classification",
        tags=list(dict.fromkeys(["m2mkd", model_type, *tags])),
        **more,
    )


def student_card(
    name: str,
    metadata: ModelCardData,
    config: PreTrainedConfig,
    parameters: int,
    source: str,
    with_code: bool,
    **own: Any,
) -> ModelCard:
    """
    Fill in a template.

    Args:
        name (`str`): File of the template.
        metadata (`ModelCardData`): From [`card_data`].
        config (`PreTrainedConfig`), parameters (`int`): Of the student.
        source (`str`): What a reader gives to `from_pretrained`.
        with_code (`bool`): Whether the model's code lies beside the weights.
        own: What only this template states.
    """
    usage = Template(_template("usage.md")).render(source=source, with_code=with_code).strip("\n")
    return ModelCard.from_template(
        metadata,
        template_str=_template(name),
        title=metadata.model_name,
        architecture=ARCHITECTURES.get(config.model_type, f"A {config.model_type}"),
        parameters=f"{parameters:,}",
        num_labels=config.num_labels,
        image_size=config.image_size,
        source=source,
        usage=usage,
        license=metadata.license,
        citation="\n\n".join(CITATIONS[name] for name in ("m2mkd", config.model_type) if name in CITATIONS),
        **own,
    )


def _template(name: str) -> str:
    return resources.files("m2mkd.model_cards").joinpath(name).read_text(encoding="utf-8")
