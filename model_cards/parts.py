"""Parts that all model cards share: facts, usage and citations."""

from importlib import resources
from typing import Any

from jinja2 import Template
from transformers import PreTrainedConfig


REPORT_FILE = "report.json"
CARD_FILE = "README.md"
ROUTING_FILE = "routing.png"
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
    "upcycling": """@misc{komatsuzaki2023upcycling,
    title={Sparse Upcycling: Training Mixture-of-Experts from Dense Checkpoints},
    author={Aran Komatsuzaki and Joan Puigcerver and James Lee-Thorp and Carlos Riquelme Ruiz and Basil Mustafa and
            Joshua Ainslie and Yi Tay and Mostafa Dehghani and Neil Houlsby},
    year={2022},
    eprint={2212.05055},
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


def model_facts(config: PreTrainedConfig, parameters: int) -> dict[str, Any]:
    """Facts about a model that both templates state."""
    return {
        "architecture": ARCHITECTURES.get(config.model_type, f"A {config.model_type}"),
        "parameters": f"{parameters:,}",
        "num_labels": config.num_labels,
        "image_size": config.image_size,
    }


def usage_section(source: str, with_code: bool) -> str:
    return Template(template("usage.md")).render(source=source, with_code=with_code).strip("\n")


def citation(model_type: str, method: str = "m2mkd") -> str:
    return "\n\n".join(CITATIONS[name] for name in (method, model_type) if name in CITATIONS)


def template(name: str) -> str:
    return resources.files("m2mkd.model_cards").joinpath(name).read_text(encoding="utf-8")
