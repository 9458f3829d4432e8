"""
A demo of a V-MoE or NAC: a picture's classes, what the model does with it, and a dial for its compute. In a Space this
file is `app.py`; the model and its code are in `model/`, its teacher, if it has one, in `teacher/`.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification, PreTrainedModel

from m2mkd.evaluation.overlay import overlays, paint


SHOWN_CLASSES = 5
Classes = dict[str, float]
Pictures = list[tuple[Image.Image, str]]


class Demo:
    """
    What the page computes.

    Args:
        folder (`Path`): With `settings.json` (`title`, `about`, and `teacher`: a folder in it, a Hub id, or null) and
            `model/`.
    """

    def __init__(self, folder: Path):
        self.folder, self.settings = folder, json.loads((folder / "settings.json").read_text(encoding="utf-8"))
        self.processor = AutoImageProcessor.from_pretrained(folder / "model")
        # the code lies beside this file, and was pushed with it
        self.model = _load(folder / "model", trust_remote_code=True)
        name = self.settings["teacher"]
        source = folder / name if name and (folder / name).is_dir() else name
        self.teacher = None if source is None else (_load(source), AutoImageProcessor.from_pretrained(source))
        self.sliders, self._adjusted = _DIALS[self.model.config.model_type](self.model)

    def classify(self, image: Image.Image, *dial: float) -> tuple[Classes, Classes | None, Pictures]:
        """
        Classify an image.

        Args:
            image (`PIL.Image`)
            dial (`float`): A value for each of `sliders`.

        Returns:
            Probabilities of the most probable classes, those of the teacher (`None` without one), and pictures with
            captions of what the model does.
        """
        image, model = image.convert("RGB"), self._adjusted(*dial)
        pixel_values = self.processor(image, return_tensors="pt")["pixel_values"]
        taught = (
            None if self.teacher is None else _classes(self.teacher[0], self.teacher[1](image, return_tensors="pt"))
        )
        picture = _seen(pixel_values[0], self.processor)
        shown = [(paint(picture, own, side=280), own.text) for own in overlays(model, pixel_values)]
        return _classes(model, {"pixel_values": pixel_values}), taught, shown

    def app(self) -> Any:
        """The page, a `gradio.Blocks`."""
        import gradio

        with gradio.Blocks(title=self.settings["title"]) as page:
            gradio.Markdown(f"# {self.settings['title']}\n\n{self.settings['about']}")
            with gradio.Row():
                with gradio.Column():
                    image = gradio.Image(type="pil", label="Picture")
                    dial = [gradio.Slider(**own) for own in self.sliders]
                    button = gradio.Button("Classify", variant="primary")
                with gradio.Column():
                    classes = gradio.Label(label="Model")
                    taught = gradio.Label(label="Teacher", visible=self.teacher is not None)
            gallery = gradio.Gallery(label="What the model does with each part of the picture", columns=4)
            outputs = [classes, taught, gallery]
            examples = sorted(map(str, self.folder.glob("examples/*.png")))
            if examples:
                gradio.Examples(examples, image)
            button.click(self.classify, [image, *dial], outputs, api_name="classify")
            for slider in dial:
                slider.release(self.classify, [image, *dial], outputs, api_visibility="private")
        return page


def _load(source: str | Path, **options: Any) -> PreTrainedModel:
    return AutoModelForImageClassification.from_pretrained(source, **options).eval()


@torch.no_grad()
def _classes(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> Classes:
    best = model(**inputs).logits[0].softmax(dim=-1).topk(min(SHOWN_CLASSES, model.config.num_labels))
    names = [model.config.id2label[label] for label in best.indices.tolist()]
    return dict(zip(names, best.values.tolist(), strict=True))


def _seen(pixel_values: torch.Tensor, processor: Any) -> Image.Image:
    """The image as the model sees it, cut and scaled."""
    pixels = pixel_values.numpy().transpose(1, 2, 0)
    if processor.do_normalize:
        pixels = pixels * processor.image_std + processor.image_mean
    return Image.fromarray((255 * np.clip(pixels, 0, 1)).round().astype(np.uint8))


def _router_dial(model: PreTrainedModel) -> tuple[list[dict[str, Any]], Callable[..., PreTrainedModel]]:
    """Experts per token, and the room of the experts."""
    config, sliders = model.config, {}
    is_token_choice, prioritized = config.router_type == "token_choice", config.batch_prioritized_routing
    if is_token_choice:
        number = {"minimum": 1, "maximum": config.num_experts, "step": 1, "value": config.num_experts_per_tok}
        sliders["num_experts_per_tok"] = {"label": "Experts per token", **number}
    if config.router_type != "soft" and config.expert_capacity is None:
        label, least = ("Capacity factor (0: no limit)", 0.0) if is_token_choice else ("Capacity factor", 0.05)
        room = {"minimum": least, "maximum": 2.0, "step": 0.05, "value": config.capacity_factor or 0.0}
        sliders["capacity_factor"] = {"label": label, **room}

    def adjusted(*values: float) -> PreTrainedModel:
        chosen = dict(zip(sliders, values, strict=True))
        if "num_experts_per_tok" in chosen:
            chosen["num_experts_per_tok"] = int(chosen["num_experts_per_tok"])
        if "capacity_factor" in chosen:
            chosen["capacity_factor"] = chosen["capacity_factor"] or None
            # without a limit there is nothing to have priority for
            chosen["batch_prioritized_routing"] = prioritized and chosen["capacity_factor"] is not None
        model.set_router(**chosen)
        return model

    return list(sliders.values()), adjusted


def _latent_dial(model: PreTrainedModel) -> tuple[list[dict[str, Any]], Callable[[float], PreTrainedModel]]:
    """Mediator latents that are kept."""
    most = model.config.num_mediator_latents
    slider = {"label": "Mediator latents kept", "minimum": 1, "maximum": most, "step": 1, "value": most}
    return [slider], lambda keep: model if keep == most else model.prune_latents(keep=int(keep))


_DIALS: dict[str, Callable[[PreTrainedModel], tuple[list[dict[str, Any]], Callable[..., PreTrainedModel]]]] = {
    "vmoe": _router_dial,
    "nac": _latent_dial,
}


if __name__ == "__main__":
    Demo(Path(__file__).parent).app().launch()
