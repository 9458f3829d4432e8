"""Our routers and models against google-research/vmoe's own numbers; `vmoe_jax_cases.py` lists the cases."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from vmoe_jax_cases import (
    BFLOAT16_TOLERANCE,
    FORWARD_TOLERANCE,
    GRADIENT_TOLERANCE,
    Case,
    assert_close,
    assert_gradients_close,
    given_noise,
    member_noise,
    model_config,
    names,
    our_layout,
    our_parameters,
    router_fields,
)

from m2mkd import VMoEConfig, VMoEForImageClassification
from m2mkd.modeling.modeling_vmoe import VMoESparseMLP
from m2mkd.modeling.router_losses import balance_losses, gshard_loss, importance_loss, load_loss
from m2mkd.modeling.vmoe_outputs import mean_of_members
from m2mkd.modeling.vmoe_routers import ROUTERS, VMoETokenChoiceRouter, compute_capacity


def small_config(hidden_size: int, **overrides: Any) -> VMoEConfig:
    sizes = {"hidden_size": hidden_size, "num_attention_heads": 1, "num_hidden_layers": 1, "moe_layers": [0]}
    return VMoEConfig(**{**sizes, "hidden_act": "gelu_pytorch_tanh", **overrides})


def combine_weights(position: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, like: torch.Tensor):
    """The weights by (group, token, expert, position)."""
    capacity = like.shape[-1]
    flat = torch.zeros(*like.shape[:2], like.shape[2] * capacity)
    kept = position < capacity
    flat.scatter_add_(-1, torch.where(kept, index * capacity + position, 0), weights.detach() * kept)
    return flat.view_as(like)


def check_decisions(
    router: VMoETokenChoiceRouter, choice: tuple[torch.Tensor, ...], outputs: dict[str, torch.Tensor]
) -> None:
    _, noisy, weights, index = choice
    assert torch.equal(index, outputs["topk_indices"].long())
    assert_close(weights, outputs["topk_weights"], "weights")
    position = router.positions(index, noisy)
    assert torch.equal(position, outputs["position"].long())
    capacity = router.capacity(index.shape[1] * index.shape[2])
    assert capacity == outputs["capacity"].item()
    assert torch.equal(position < capacity, outputs["kept"].bool())
    # the other dispatcher of that code has them by index
    if outputs["combine_weights"].ndim == 4:
        ours = combine_weights(position, index, weights, outputs["combine_weights"])
        assert_close(ours, outputs["combine_weights"], "combine weights")


class TestTokenChoice:
    @pytest.mark.parametrize("name", names("router_token_choice"))
    def test_logits_choices_and_losses(self, name: str) -> None:
        case = Case(name)
        options, x = case.config["router"], case.inputs["x"].requires_grad_()
        config = small_config(x.shape[-1], num_experts=options["num_experts"], **router_fields(options))
        router = ROUTERS[config.router_type](config).train(not options.get("deterministic", False))
        kernel = case.params["dense/kernel"]
        router.load_state_dict({"weight": kernel.T})
        with given_noise(*([case.inputs["noise"]] if router.training else [])):
            choice = router(x)
        clean, noisy = choice[:2]
        assert_close(clean, case.outputs["logits"], "logits")
        assert_close(noisy.softmax(dim=-1), case.outputs["gates"], "gates")
        check_decisions(router, choice, case.outputs)

        losses = {
            "importance_loss": lambda clean, noisy: importance_loss(clean),
            "gshard_loss": lambda clean, noisy: gshard_loss(noisy),
            "load_loss": lambda clean, noisy: load_loss(clean, noisy, router.noise_std, config.num_experts_per_tok),
        }
        for loss_name, loss in losses.items():
            if loss_name == "load_loss" and not router.training:
                continue
            by_group = torch.stack([loss(c, n) for c, n in zip(clean, noisy, strict=True)])
            assert_close(by_group, case.outputs[f"metrics/{loss_name}"], loss_name)
            self.check_gradients(case, loss_name, loss(clean, noisy), x, router)
        if router.training:
            aux_loss = balance_losses((clean,), (noisy,), config)["aux_loss"]
            assert_close(aux_loss, case.outputs["metrics/auxiliary_loss"].mean(), "auxiliary loss")
            self.check_gradients(case, "auxiliary_loss", aux_loss, x, router)

    def check_gradients(
        self, case: Case, name: str, loss: torch.Tensor, x: torch.Tensor, router: VMoETokenChoiceRouter
    ) -> None:
        x.grad = router.weight.grad = None
        loss.backward(retain_graph=True)
        theirs = case.gradients(f"grad/{name}/")
        expected = {"x": theirs["inputs/x"], "weight": theirs["params/dense/kernel"].T}
        assert_gradients_close({"x": x, "weight": router.weight}, expected)

    def test_ensembles_see_only_their_own_experts(self) -> None:
        case = Case("ensemble_router_noisy")
        options, x = case.config["router"], case.inputs["x"].requires_grad_()
        config = small_config(x.shape[-1], num_experts=options["num_experts"], **router_fields(options))
        router = VMoETokenChoiceRouter(config).train()
        router.load_state_dict({"weight": our_layout("Router/dense/kernel", case.params["dense/kernel"])})
        with given_noise(member_noise(case.inputs["noise"])):
            choice = router(x)
        clean, noisy = choice[:2]
        check_decisions(router, choice, case.outputs)
        blocks = torch.zeros(*x.shape[:2], 2, 3)
        blocks[:, 0::2, 0], blocks[:, 1::2, 1] = (noisy.softmax(-1)[:, member::2] for member in (0, 1))
        assert_close(blocks.flatten(-2), case.outputs["gates"], "gates")
        losses = balance_losses((clean,), (noisy,), config)
        for name in ("importance_loss", "load_loss"):
            assert_close(losses[name], case.outputs[f"metrics/{name}"].mean(), name)
        for member in (0, 1):
            parts = [torch.stack([gshard_loss(group[member::2]) for group in noisy])]
            assert_close(parts[0], case.outputs["metrics/gshard_loss"][:, member], "gshard_loss")
        self.check_gradients_of_ensemble(case, losses["aux_loss"], x, router)

    def check_gradients_of_ensemble(
        self, case: Case, loss: torch.Tensor, x: torch.Tensor, router: VMoETokenChoiceRouter
    ) -> None:
        assert_close(loss, case.outputs["metrics/auxiliary_loss"].mean(), "auxiliary loss")
        loss.backward()
        theirs = case.gradients("grad/auxiliary_loss/")
        kernel = our_layout("Router/dense/kernel", theirs["params/dense/kernel"])
        assert_gradients_close({"x": x, "weight": router.weight}, {"x": theirs["inputs/x"], "weight": kernel})


class ScaleAndShift(nn.Module):
    """Experts of the dispatch cases: expert `e` is `rows * scale[e] + shift[e]`."""

    def __init__(self, scale: torch.Tensor, shift: torch.Tensor):
        super().__init__()
        self.scale, self.shift = nn.Parameter(scale), nn.Parameter(shift)

    def forward_rows(self, rows: torch.Tensor) -> torch.Tensor:
        experts = rows.unflatten(1, (len(self.scale), -1))
        return (experts * self.scale[:, None, None] + self.shift[:, None]).flatten(1, 2)


DISPATCH = [(name, variant) for name in names("dispatch") for variant in Case(name).config["variants"]]


class TestDispatch:
    @pytest.mark.parametrize(("name", "variant"), DISPATCH)
    def test_rows_positions_and_gradients(self, name: str, variant: str) -> None:
        case = Case(name)
        options, inputs = case.config["variants"][variant], case.inputs
        data, gates = inputs["data"].requires_grad_(), inputs["gates"].requires_grad_()
        router = {"num_selected_experts": options["num_selected_experts"], "dispatcher": options}
        config = small_config(data.shape[-1], num_experts=gates.shape[-1], **router_fields(router))
        router = VMoETokenChoiceRouter(config)
        experts = ScaleAndShift(inputs["expert_scale"], inputs["expert_shift"])
        logits = gates.detach().log()
        _, index = router.choose(logits)
        choice = (logits, logits, gates.gather(-1, index), index)
        outputs, rounds = case.gradients(f"{variant}/"), options.get("bfloat16", False)
        check_decisions(router, choice, outputs)
        combined, dropped = router.dispatch(experts, data, choice)
        assert torch.equal(~dropped, outputs["kept"].bool())
        assert_close(combined, outputs["combined"], "combined", BFLOAT16_TOLERANCE if rounds else FORWARD_TOLERANCE)
        (combined * inputs["probe"]).sum().backward()
        leaves = {"data": data, "gates": gates, "expert_scale": experts.scale, "expert_shift": experts.shift}
        expected = {key: outputs[f"grad/{key}"] for key in leaves}
        assert_gradients_close(leaves, expected, BFLOAT16_TOLERANCE if rounds else GRADIENT_TOLERANCE)

    def test_capacities(self) -> None:
        table = Case("dispatch_token_choice_k2").config["compute_capacity_table"]
        assert table["columns"][-1] == "capacity" and len(table["rows"]) >= 20
        for *arguments, capacity in table["rows"]:
            assert compute_capacity(*arguments) == capacity, arguments


def block_of(case: Case) -> VMoESparseMLP:
    module, params = case.config["module"], case.params
    experts, width, mlp_dim = params["Mlp/Dense_0/kernel"].shape
    config = small_config(
        width,
        num_experts=experts,
        intermediate_size=mlp_dim,
        router_group_size=module["group_size"],
        num_slots=params["Router/mu"].shape[-1] if "Router/mu" in params else 1,
        **router_fields(module["router"]),
    )
    block = VMoESparseMLP(config).train(not module["deterministic"])
    block.load_state_dict(our_block(params), strict=True)
    return block


def our_block(arrays: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The arrays of one MoE block by our names."""
    prefix = "Encoder/encoderblock_0/Moe/"
    ours = our_parameters({f"{prefix}{name}": array for name, array in arrays.items()})
    return {name.removeprefix("vmoe.layers.0.mlp."): array for name, array in ours.items()}


@pytest.mark.parametrize("name", names("moe_block"))
def test_moe_block(name: str) -> None:
    case = Case(name)
    block, x = block_of(case), case.inputs["x"].requires_grad_()
    rounds = case.config["module"]["router"].get("dispatcher", {}).get("bfloat16", False)
    rounds = rounds or case.config.get("soft_bfloat16_wrapper", False)
    choices = []
    block.router.register_forward_hook(lambda _module, _inputs, outputs: choices.append(outputs))
    noise = [case.inputs["noise"]] if block.training else []
    with given_noise(*noise):
        out = block(x)
    assert_close(out, case.outputs["out"], "out", BFLOAT16_TOLERANCE if rounds else FORWARD_TOLERANCE)
    (choice,) = choices
    clean, noisy, weights, index = choice
    config, loss = block.router.config, (out * case.inputs["probe"]).sum()
    if config.router_type == "token_choice":
        check_decisions(block.router, choice, case.outputs)
        losses = balance_losses((clean,), (noisy,), config)
        # there is no load loss without noise
        aux_loss = losses["aux_loss"] if block.training else 0.005 * losses["importance_loss"]
        assert_close(aux_loss, case.outputs["metrics/auxiliary_loss"].mean(), "auxiliary loss")
        loss = loss + aux_loss
    elif config.router_type == "expert_choice":
        assert torch.equal(index, case.outputs["top_items_index"].long())
        assert_close(weights, case.outputs["top_items_gates"], "gates")
    else:
        assert_close(weights.view_as(case.outputs["combine_weights"]), case.outputs["combine_weights"], "combine")
        assert_close(index.view_as(case.outputs["dispatch_weights"]), case.outputs["dispatch_weights"], "dispatch")
    if not rounds:
        # a sum in which much cancels; rounded outputs are compared above
        assert_close(loss, case.outputs["loss"], "loss")
    loss.backward()
    theirs = {"x": case.outputs["grad/inputs/x"], **our_block(case.gradients("grad/params/"))}
    ours = {"x": x, **dict(block.named_parameters())}
    assert_gradients_close(ours, theirs, BFLOAT16_TOLERANCE if rounds else GRADIENT_TOLERANCE)


def model_of(case: Case) -> VMoEForImageClassification:
    height, width = case.inputs["images"].shape[1:3]
    model = VMoEForImageClassification(model_config(case.config["model"], case.params, [height, width]))
    model.load_state_dict(our_parameters(case.params), strict=True)
    return model.eval()


def dial(model: VMoEForImageClassification, variant: dict[str, Any]) -> None:
    """What `evaluate.model_overrides` of that code changes."""
    router = variant.get("encoder", {}).get("moe", {}).get("router", {})
    names = {"capacity_factor": "capacity_factor", "batch_priority": "batch_prioritized_routing"}
    options = {names[name]: value for name, value in router.get("dispatcher", {}).items()}
    if "num_selected_experts" in router:
        options["num_experts_per_tok"] = router["num_selected_experts"]
    model.set_router(**options)


MODELS = [(name, variant) for name in names("model") for variant in Case(name).config["eval_variants"]]


class TestModels:
    @pytest.mark.parametrize(("name", "variant"), MODELS)
    @torch.no_grad()
    def test_evaluation(self, name: str, variant: str) -> None:
        case = Case(name)
        model, outputs = model_of(case), case.gradients(f"{variant}/")
        tolerance = BFLOAT16_TOLERANCE if name.endswith("_bf16") else FORWARD_TOLERANCE
        dial(model, case.config["eval_variants"][variant])
        images = case.inputs["images"].permute(0, 3, 1, 2)
        ours = model(images, output_hidden_states=True, output_router_logits=True)
        if "posembed_input" in outputs:
            assert_close(ours.hidden_states[0], outputs["posembed_input"], "position embeddings")
        for layer, hidden_states in enumerate(ours.hidden_states[1:]):
            assert_close(hidden_states, outputs[f"block.{layer}"], f"layer {layer}", tolerance)
        logits = ours.logits if ours.member_logits is None else ours.member_logits
        assert_close(logits.flatten(0, -2), outputs["logits"], "logits", tolerance)
        if ours.member_logits is not None:
            assert_close(ours.logits, outputs["ensemble_log_mean_softmax"], "mean of the members")
        for place, layer in enumerate(model.config.moe_layers):
            if f"moe.{layer}.kept" in outputs:
                dropped = 1 - outputs[f"moe.{layer}.kept"].float().mean()
                assert_close(ours.dropped[place], dropped, "dropped")
                assert outputs[f"moe.{layer}.kept"].float().mean() == 1 or ours.dropped[place] > 0

    @pytest.mark.parametrize("name", names("model"))
    def test_a_training_step(self, name: str) -> None:
        case = Case(name)
        model, outputs = model_of(case).train(), case.gradients("train/")
        loose = name.endswith("_bf16")
        noise = [case.inputs[key] for key in case.config.get("noise_order", [])]
        members = model.config.num_ensemble_members
        with given_noise(*(map(member_noise, noise) if members > 1 else noise)):
            ours = model(case.inputs["images"].permute(0, 3, 1, 2))
        logits = ours.logits if ours.member_logits is None else ours.member_logits.flatten(0, 1)
        assert_close(logits, outputs["logits"], "logits", BFLOAT16_TOLERANCE if loose else FORWARD_TOLERANCE)
        labels = case.inputs["labels"].float().repeat_interleave(members, dim=0)
        if "softmax" in case.config["train"]["loss"]["name"]:
            loss = F.cross_entropy(logits, labels)
        else:
            loss = F.binary_cross_entropy_with_logits(logits, labels, reduction="none").sum(-1).mean()
        assert_close(loss, outputs["main_loss"], "loss", BFLOAT16_TOLERANCE if loose else FORWARD_TOLERANCE)
        if ours.aux_loss is not None:
            assert_close(ours.aux_loss, outputs["auxiliary_loss"], "auxiliary loss")
            loss = loss + ours.aux_loss
        loss.backward()
        theirs = our_parameters(case.gradients("train/grad/"))
        tolerance = BFLOAT16_TOLERANCE if loose else GRADIENT_TOLERANCE
        assert_gradients_close(dict(model.named_parameters()), theirs, tolerance)

    def test_an_ensemble_is_evaluated_by_its_mean_and_trained_by_its_members(self) -> None:
        case = Case("model_ensemble")
        model, labels = model_of(case), case.inputs["labels"].argmax(dim=-1)
        images = case.inputs["images"].permute(0, 3, 1, 2)
        with torch.no_grad():
            ours = model(images, labels=labels)
            assert_close(ours.loss, F.cross_entropy(ours.logits, labels) + ours.aux_loss)
            assert_close(ours.logits.exp(), ours.member_logits.softmax(-1).mean(1))
            ours = model.train()(images, labels=labels)
            by_member = [F.cross_entropy(logits, labels) for logits in ours.member_logits.unbind(1)]
            assert_close(ours.loss, sum(by_member) / 2 + ours.aux_loss)
        mean = mean_of_members(case.outputs["eval/logits"].unflatten(0, (-1, 2)))
        assert_close(mean, case.outputs["eval/ensemble_log_mean_softmax"])
