"""Features that every model of transformers has, for both of ours; those of only one are in the tests of its file."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from testing_utils import NUM_LABELS, assert_close, assert_equal, gradients, images, nac, randomized, vmoe
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification, PreTrainedModel


def randomized_nac(**overrides: object) -> PreTrainedModel:
    return randomized(nac(stochastic_kernel=False, **overrides), seed=0)


MODELS = pytest.mark.parametrize("build", [vmoe, randomized_nac], ids=["vmoe", "nac"])
Build = Callable[..., PreTrainedModel]
Load = AutoModelForImageClassification.from_pretrained


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(images().to(model.dtype)).logits


@MODELS
class TestSaveAndLoad:
    @pytest.mark.parametrize("max_shard_size", ["5GB", "4KB"], ids=["one_file", "sharded"])
    def test_a_folder_gives_the_same_bits_back(self, build: Build, tmp_path: Path, max_shard_size: str) -> None:
        model = build()
        model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
        assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (max_shard_size == "4KB")
        loaded, info = Load(tmp_path, output_loading_info=True)
        assert type(loaded) is type(model) and not any(info.values()), info
        assert_equal(loaded.state_dict(), model.state_dict())
        torch.testing.assert_close(logits(loaded), logits(model))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, "auto"], ids=str)
    def test_the_dtype_is_that_asked_for(self, build: Build, tmp_path: Path, dtype: torch.dtype | str) -> None:
        model = build()
        model.save_pretrained(tmp_path)
        loaded = Load(tmp_path, dtype=dtype)
        assert {p.dtype for p in loaded.parameters()} == {torch.float32 if dtype == "auto" else dtype}
        ours, expected = logits(loaded).float(), logits(model)
        assert (ours - expected).norm() / expected.norm() < 0.05

    def test_a_half_precision_folder_stays_so(self, build: Build, tmp_path: Path) -> None:
        build().to(torch.bfloat16).save_pretrained(tmp_path)
        assert AutoConfig.from_pretrained(tmp_path).dtype == torch.bfloat16
        assert Load(tmp_path, dtype="auto").dtype == torch.bfloat16

    def test_device_map_auto(self, build: Build, tmp_path: Path) -> None:
        model = build()
        model.save_pretrained(tmp_path)
        loaded = Load(tmp_path, device_map="auto")
        assert {p.device.type for p in loaded.parameters()} <= {"cpu", "cuda"}
        torch.testing.assert_close(logits(loaded).cpu(), logits(model))

    def test_weights_left_on_disk(self, build: Build, tmp_path: Path) -> None:
        model = build()
        model.save_pretrained(tmp_path)
        children = [name for name, _ in model.base_model.named_children()]
        device_map = {f"{model.base_model_prefix}.{name}": "disk" for name in children}
        device_map |= {name: "cpu" for name, _ in model.named_children() if name != model.base_model_prefix}
        loaded = Load(tmp_path, device_map=device_map, offload_folder=tmp_path / "offload")
        assert next(loaded.base_model.layers.parameters()).is_meta
        torch.testing.assert_close(logits(loaded), logits(model))

    def test_a_model_without_memory_takes_a_checkpoint(self, build: Build, tmp_path: Path) -> None:
        model = build()
        model.save_pretrained(tmp_path)
        with torch.device("meta"):
            empty = AutoModelForImageClassification.from_config(model.config)
        assert all(parameter.is_meta for parameter in empty.parameters())
        empty.load_state_dict(model.state_dict(), assign=True)
        assert torch.equal(logits(empty), logits(model))
        torch.testing.assert_close(logits(Load(tmp_path, low_cpu_mem_usage=True)), logits(model))

    def test_the_bare_model_and_the_classifier_load_each_other(self, build: Build, tmp_path: Path) -> None:
        model = build()
        model.save_pretrained(tmp_path / "classifier")
        body = AutoModel.from_pretrained(tmp_path / "classifier")
        assert_equal(body.state_dict(), model.base_model.state_dict())
        body.save_pretrained(tmp_path / "body")
        assert_equal(Load(tmp_path / "body").base_model.state_dict(), body.state_dict())


@MODELS
class TestAnotherNumberOfClasses:
    def test_is_an_error(self, build: Build, tmp_path: Path) -> None:
        build().save_pretrained(tmp_path)
        with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
            Load(tmp_path, num_labels=NUM_LABELS + 2)

    def test_gives_a_new_head_on_demand_and_only_that(self, build: Build, tmp_path: Path) -> None:
        model = build()
        model.save_pretrained(tmp_path)
        loaded, info = Load(
            tmp_path, num_labels=NUM_LABELS + 2, ignore_mismatched_sizes=True, output_loading_info=True
        )
        assert {name for name, *_ in info["mismatched_keys"]} == {"classifier.weight", "classifier.bias"}
        assert logits(loaded).shape == (3, NUM_LABELS + 2) and logits(loaded).isfinite().all()
        assert_equal(loaded.base_model.state_dict(), model.base_model.state_dict())
        assert loaded.classifier.bias.abs().max() == 0 and loaded.classifier.weight.std() > 0


@MODELS
class TestForward:
    def test_a_tuple_holds_what_the_output_holds(self, build: Build) -> None:
        model = build()
        model.set_attn_implementation("eager")
        wanted = {"output_hidden_states": True, "output_attentions": True, "labels": torch.tensor([0, 3, 1])}
        outputs, values = model(images(), **wanted), model(images(), **wanted, return_dict=False)
        assert isinstance(values, tuple) and len(values) == len(outputs.to_tuple())
        for name, ours, theirs in zip(outputs.keys(), values, outputs.to_tuple(), strict=True):
            torch.testing.assert_close(ours, theirs, msg=name, atol=0, rtol=0)
        assert len(outputs.hidden_states) == model.config.num_hidden_layers + 1
        assert len(outputs.attentions) == model.config.num_hidden_layers

    @pytest.mark.parametrize("use_reentrant", [True, False])
    def test_activation_checkpointing_gives_the_same_gradients(self, build: Build, use_reentrant: bool) -> None:
        model = build().train()
        steps = []
        for _ in range(2):
            torch.manual_seed(1)
            outputs = model(images(), labels=torch.tensor([0, 3, 1]))
            steps.append(gradients(model, outputs.loss))
            model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
        assert_close(steps[1], steps[0], atol=1e-5)

    def test_attention_backends_agree(self, build: Build) -> None:
        model = build()
        results = []
        for backend in ("eager", "sdpa"):
            model.set_attn_implementation(backend)
            assert model.config._attn_implementation == backend
            results.append(logits(model))
        torch.testing.assert_close(*results, atol=1e-5, rtol=1e-4)

    @pytest.mark.slow
    def test_compiled_as_one_graph_it_gives_the_same_numbers(self, build: Build) -> None:
        model = build()
        compiled = torch.compile(model, fullgraph=True)
        with torch.no_grad():
            torch.testing.assert_close(compiled(images()).logits, logits(model), atol=1e-5, rtol=1e-4)
