"""Everything in a NAC that is faster or leaner than its definition, against that definition: values and gradients."""

import copy
import weakref
from collections.abc import Callable
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
from testing_utils import assert_close, gradients, images, nac, randomized

from m2mkd import NACForImageClassification
from m2mkd.modeling import nac_layers
from m2mkd.modeling.nac_layers import ModulatedLinear, NACReadInAttention, modulate


QUIET = {
    "stochastic_kernel": False,
    "code_noise_scale": 0.0,
    "use_state_noise": False,
    "drop_path_rate": 0.0,
    "pooling": "softmax",
}


def training_step(model: NACForImageClassification, seed: int = 7) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits and gradients of one step in train mode, with the noise of a seed."""
    model.train()
    torch.manual_seed(seed)
    logits = model(images()).logits
    direction = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    return logits.detach(), gradients(model, (logits.float() * direction).sum())


def assert_same_step(
    ours: tuple[torch.Tensor, dict[str, torch.Tensor]], expected: tuple[torch.Tensor, dict[str, torch.Tensor]]
) -> None:
    torch.testing.assert_close(ours[0], expected[0], atol=1e-5, rtol=1e-5)
    assert_close(ours[1], expected[1], atol=1e-5)


def read_in_by_definition(
    attention: NACReadInAttention, states: torch.Tensor, tokens: torch.Tensor, codes: torch.Tensor
) -> torch.Tensor:
    """Keys and values of every latent: two tensors of shape (batch, latents, tokens, width)."""
    batch_size, num_latents, _ = states.shape
    tokens = attention.sender_layernorm(tokens)[:, None]
    heads = (batch_size, num_latents, -1, attention.num_heads, attention.head_dim)
    queries = attention.q_proj(attention.receiver_layernorm(states), codes).view(heads)

    def project(linear: torch.nn.Module) -> torch.Tensor:
        scale = linear.code_scale(codes)[:, None].expand(num_latents, 1, -1)
        return F.linear(tokens * scale, linear.weight, linear.bias).view(heads)

    scores = (queries * project(attention.k_proj)).sum(-1) * attention.scaling
    messages = (scores.softmax(dim=2)[..., None] * project(attention.v_proj)).sum(2).flatten(2)
    output = attention.layer_scale * attention.o_proj(messages, codes)
    return states + output if attention.has_residual else output


class TestReadIn:
    @pytest.mark.parametrize("backend", ["eager", "sdpa"])
    @pytest.mark.parametrize(
        "options",
        [{}, {"qkv_bias": True}, {"read_in_residual": False}, {"add_one_to_code_scale": False}],
        ids=["default", "bias", "no_residual", "no_one"],
    )
    @pytest.mark.parametrize("num_codes", [1, 3])
    def test_equals_its_definition(self, backend: str, options: dict[str, bool], num_codes: int):
        model = randomized(nac(**options), seed=3)
        model.set_attn_implementation(backend)
        attention = model.nac.read_in.attention
        states, tokens, codes = torch.randn(2, 3, 8), torch.randn(2, 7, 8), torch.randn(num_codes, 6)
        inputs = [tensor.requires_grad_() for tensor in (states, tokens, codes)]
        results = []
        for forward in (attention, lambda *args: read_in_by_definition(attention, *args)):
            output = forward(*inputs)
            leaves = [*inputs, *attention.parameters()]
            results.append([output, *torch.autograd.grad((output * torch.arange(8)).sum(), leaves)])
        for ours, expected in zip(*results, strict=True):
            torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)


class TestModulatedLinear:
    @pytest.mark.parametrize("activation_fn", [None, F.gelu], ids=["plain", "gated"])
    @pytest.mark.parametrize("has_bias", [True, False])
    def test_first_and_second_derivatives(self, activation_fn: Callable | None, has_bias: bool):
        shapes = [(2, 3, 8 if activation_fn else 4), (3, 4), (5, 4), (5,)]
        tensors = [torch.randn(shape, dtype=torch.double, requires_grad=True) for shape in shapes]
        tensors = tensors if has_bias else tensors[:3]

        def ours(*args: torch.Tensor) -> torch.Tensor:
            return ModulatedLinear.apply(*args, *([] if has_bias else [None]), activation_fn)

        hidden_states, scale, *linear = tensors
        torch.testing.assert_close(ours(*tensors), F.linear(modulate(hidden_states, scale, activation_fn), *linear))
        assert torch.autograd.gradcheck(ours, tensors)
        assert torch.autograd.gradgradcheck(ours, tensors)

    def test_second_derivatives_where_the_scale_depends_on_the_inputs(self):
        hidden_states = torch.randn(2, 3, 4, dtype=torch.double, requires_grad=True)
        weight = torch.randn(5, 4, dtype=torch.double)
        assert torch.autograd.gradgradcheck(
            lambda x: ModulatedLinear.apply(x, x[0].sin(), weight, None, None), hidden_states
        )

    def test_frozen_inputs_and_weights(self):
        hidden_states, scale, weight = torch.randn(2, 3, 4), torch.randn(3, 4), torch.randn(5, 4, requires_grad=True)
        ModulatedLinear.apply(hidden_states, scale, weight, None, None).sum().backward()
        torch.testing.assert_close(weight.grad, (hidden_states * scale).sum((0, 1)).expand(5, 4))
        assert not hidden_states.requires_grad and not scale.requires_grad
        hidden_states.requires_grad_()
        ModulatedLinear.apply(hidden_states, scale, weight.detach(), None, None).sum().backward()
        torch.testing.assert_close(hidden_states.grad, (weight.detach().sum(0) * scale).expand(2, 3, 4))

    def test_a_step_keeps_no_modulated_copy(self):
        model = nac(hidden_size=32, intermediate_size=64, num_mediator_latents=40, num_attention_heads=2)
        sizes: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
            kept.append(tensor)
            return tensor

        totals = []
        for is_plain in (False, True):
            kept: list[torch.Tensor] = []
            sizes.clear()
            with pytest.MonkeyPatch.context() as patch, torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
                if is_plain:
                    patch.setattr(ModulatedLinear, "apply", plain_modulated_linear)
                model.train()(images(16))
            totals.append(sum(sizes.values()))
        assert totals[0] < 0.75 * totals[1]

    def test_a_step_equals_that_of_plain_layers(self, monkeypatch: pytest.MonkeyPatch):
        model = randomized(nac(qkv_bias=True), seed=2)
        ours = training_step(model)
        monkeypatch.setattr(ModulatedLinear, "apply", plain_modulated_linear)
        assert_same_step(ours, training_step(model))


def plain_modulated_linear(
    hidden_states: torch.Tensor,
    scale: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation_fn: Callable | None,
) -> torch.Tensor:
    return F.linear(modulate(hidden_states, scale, activation_fn), weight, bias)


class TestBackends:
    @pytest.mark.parametrize("options", [{}, {"stochastic_kernel": False}, {"input_to_mediator": "none"}])
    def test_sdpa_equals_eager(self, options: dict[str, bool | str]):
        model = randomized(nac(**options), seed=1)
        steps = []
        for backend in ("eager", "sdpa"):
            model.set_attn_implementation(backend)
            steps.append(training_step(model))
        assert_same_step(*steps)
        model.eval()
        with torch.no_grad():
            sdpa = model(images()).logits
            model.set_attn_implementation("eager")
            torch.testing.assert_close(sdpa, model(images()).logits)

    @pytest.mark.parametrize("options", [{}, {"stochastic_kernel": False}, {"kernel_truncation_type": "masked"}])
    def test_attention_in_parts(self, monkeypatch: pytest.MonkeyPatch, options: dict[str, bool | str]):
        model = randomized(nac(drop_path_rate=0.0, **options), seed=1)
        whole = training_step(model)
        parts = Mock(wraps=nac_layers.checkpoint)
        monkeypatch.setattr(nac_layers, "checkpoint", parts)
        monkeypatch.setattr(nac_layers, "PART_BYTES", 0)
        assert_same_step(training_step(model), whole)
        # each of three images, in two rounds of messages and the read-out
        assert parts.call_count == 9
        model.set_attn_implementation("eager")
        assert_same_step(training_step(model), whole)

    def test_dropped_images_are_not_computed(self, monkeypatch: pytest.MonkeyPatch):
        model = randomized(nac(drop_path_rate=0.5), seed=1)
        rows: list[int] = []
        for layer in model.nac.layers:
            layer.ffn.fc1.register_forward_hook(lambda module, args, output: rows.append(len(args[0])))
            layer.attention.q_proj.register_forward_hook(lambda module, args, output: rows.append(len(args[0])))
        seen = set()
        for seed in range(8):
            model.set_attn_implementation("eager")
            plain = training_step(model, seed)
            assert rows == [3] * 4
            rows.clear()
            model.set_attn_implementation("sdpa")
            assert_same_step(training_step(model, seed), plain)
            seen.update(rows)
            rows.clear()
        # where all are dropped, all are computed
        assert seen == {1, 2, 3}

    @pytest.mark.parametrize("use_reentrant", [True, False])
    def test_gradient_checkpointing(self, use_reentrant: bool):
        model = randomized(nac(drop_path_rate=0.5), seed=1)
        expected = training_step(model)
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        assert_same_step(training_step(model), expected)

    @pytest.mark.parametrize("backend", ["eager", "sdpa"])
    def test_bf16_autocast(self, backend: str):
        # without noise: in another dtype another one is drawn
        model = randomized(nac(**QUIET), seed=1)
        model.set_attn_implementation(backend)
        logits, expected = training_step(model)
        with torch.autocast("cpu", torch.bfloat16):
            half_logits, grads = training_step(model)
        torch.testing.assert_close(half_logits.float(), logits, atol=0.05 * logits.abs().max().item(), rtol=0)
        total = sum(grad.norm() ** 2 for grad in expected.values()) ** 0.5
        for name, grad in grads.items():
            assert grad.dtype == torch.float32
            assert (grad - expected[name]).norm() < 0.1 * (expected[name].norm() + 0.1 * total), name

    @pytest.mark.slow
    @pytest.mark.parametrize("backend", ["eager", "sdpa"])
    def test_compiled(self, backend: str):
        model = randomized(nac(**QUIET), seed=1)
        model.set_attn_implementation(backend)
        compiled = copy.deepcopy(model)
        compiled.compile(fullgraph=True)
        assert_same_step(training_step(compiled), training_step(model))
        with torch.no_grad():
            torch.testing.assert_close(compiled.eval()(images()).logits, model.eval()(images()).logits)


class TestCachedAffinities:
    @pytest.fixture
    def model(self) -> NACForImageClassification:
        model = randomized(nac(), seed=1).eval()
        with torch.no_grad():
            model(images())
        return model

    def fresh_logits(self, model: NACForImageClassification) -> torch.Tensor:
        """The affinities of a model without a cache."""
        fresh = nac().to(next(model.parameters()).dtype).eval()
        fresh.load_state_dict(model.state_dict())
        with torch.no_grad():
            return fresh(images()).logits

    def test_kept_from_one_forward_to_the_next(self, model: NACForImageClassification):
        with torch.no_grad():
            first, second = model.nac.log_affinities(), model.nac.log_affinities()
        assert all(ours is theirs for ours, theirs in zip(first, second, strict=True))

    def test_rounds_of_one_bandwidth_share_one(self):
        with torch.no_grad():
            affinities = nac().eval().nac.log_affinities()
        assert affinities[0] is affinities[1] is not affinities[2]

    @pytest.mark.parametrize("part", ["input_latents.signatures", "mediator_latents.signatures", "bandwidth"])
    def test_forgotten_after_a_change_in_place(self, model: NACForImageClassification, part: str):
        path = "layers.1.kernel.bandwidth" if part == "bandwidth" else part
        with torch.no_grad():
            before = model(images()).logits
            model.nac.get_parameter(path).mul_(0.3).add_(0.5)
            after = model(images()).logits
        assert not torch.allclose(before, after)
        torch.testing.assert_close(after, self.fresh_logits(model))

    def test_forgotten_after_loading(self, model: NACForImageClassification):
        model.load_state_dict(randomized(nac(), seed=5).state_dict())
        with torch.no_grad():
            torch.testing.assert_close(model(images()).logits, self.fresh_logits(model))

    def test_forgotten_after_a_change_of_dtype_and_back(self, model: NACForImageClassification):
        for dtypes in ([torch.bfloat16], [torch.float32], [torch.bfloat16, torch.float32]):
            for dtype in dtypes:
                model.to(dtype)
            with torch.no_grad():
                torch.testing.assert_close(model(images()).logits, self.fresh_logits(model))

    def test_the_same_in_inference_mode(self, model: NACForImageClassification):
        with torch.no_grad():
            expected = model(images()).logits
        with torch.inference_mode():
            torch.testing.assert_close(model(images()).logits, expected, atol=0, rtol=0)
            loaded = randomized(nac(), seed=1).eval()
            torch.testing.assert_close(loaded(images()).logits, expected)
            loaded.nac.mediator_latents.signatures.mul_(0.3).add_(0.5)
            assert not torch.allclose(loaded(images()).logits, expected)

    def test_no_graph_outlives_training(self, model: NACForImageClassification):
        affinity = weakref.ref(model.train().nac.log_affinities()[0])
        assert affinity() is None
        assert not any(tensor.requires_grad for tensor in model.nac._eval_affinities[2])
