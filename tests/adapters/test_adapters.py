"""Adapters compute what PEFT computes: unmerged and merged, over floats and quantised weights, and there and back.

The budget of logits is 1.25 times the mean error of PEFT's own in float32, against float64.
"""

import copy
import io
import itertools

import peft
import pytest
import torch
from adapter_helpers import CONFIGS, edit_config, edit_tensors, errors, peft_adapter, swap
from helpers import few, random_batch
from safetensors.torch import load_file
from training_helpers import relative

from llama_flex import Llama, edits
from llama_flex.kernels.lora import lora_in
from llama_flex.layers import Linear
from llama_flex.weights import named_weights

FIRST = ("q and v", "patterns", "saved modules", "vocabulary")


@pytest.fixture
def twins(tiny_pair):
    """A function from a TINY shape to transformers' model and a copy of ours, to load adapters onto."""

    def of(name: str = "gqa") -> tuple:
        reference, model = tiny_pair(name)
        return reference, copy.deepcopy(model)

    return of


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


def loras(model: Llama):
    return filter(None, map(lora_in, model.modules()))


def random_adapter(model: Llama, name: str, **options) -> None:
    """Give a model a new adapter, with second factors that are not 0."""
    model.adapters.add(name, **options)
    torch.manual_seed(0)
    for update in (update for lora in loras(model) for *_, update in lora.updates() if not update.up.any()):
        torch.nn.init.normal_(update.up, std=0.3)


@pytest.mark.parametrize("config", few(FIRST, [name for name in CONFIGS if name not in FIRST]))
def test_logits_are_pefts_and_switching_off_leaves_no_trace(twins, tmp_path, config):
    reference, model = twins()
    theirs, ids = peft_adapter(reference, tmp_path, **CONFIGS[config]), random_batch(model, 40)
    before = model(ids)
    name = model.adapters.load(tmp_path, "theirs")
    assert model.adapters.active is None
    assert model(ids).equal(before)
    model.adapters.activate(name)
    found, own = errors(model, theirs, ids)
    assert found <= 1.25 * own
    model.adapters.activate(None)
    assert model(ids).equal(before)
    # The mutation: another scale.
    edit_config(tmp_path, lora_alpha=8.1, alpha_pattern={})
    model.adapters.activate(model.adapters.load(tmp_path, "other scale"))
    assert errors(model, theirs, ids)[0] > 100 * own


@pytest.mark.parametrize("shape", few(["tied"], ["mha", "biases"]))
@pytest.mark.parametrize("pair", [("q_proj", "k_proj"), ("gate_proj", "up_proj")], ids=" and ".join)
def test_each_part_of_a_stacked_matrix_has_its_own_update(twins, tmp_path, shape, pair):
    reference, model = twins(shape)
    theirs, ids = peft_adapter(reference, tmp_path, target_modules=list(pair)), random_batch(model, 20)
    model.adapters.activate(model.adapters.load(tmp_path, "theirs"))
    found, own = errors(model, theirs, ids)
    assert found <= 1.25 * own
    if shape == "mha" or pair[0] == "gate_proj":  # else q and k have other shapes
        edit_tensors(tmp_path, swap(*pair))
        model.adapters.activate(model.adapters.load(tmp_path, "swapped"))
        assert errors(model, theirs, ids)[0] > 100 * own


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_a_vocabulary_that_is_tied_is_adapted_apart_and_never_merged(twins, tmp_path, target):
    reference, model = twins("tied")
    theirs, ids = peft_adapter(reference, tmp_path, target_modules=[target, "q_proj"]), random_batch(model, 20)
    model.adapters.activate(name := model.adapters.load(tmp_path, "theirs"))
    found, own = errors(model, theirs, ids)
    assert found <= 1.25 * own
    with pytest.raises(ValueError, match="embedding and output matrix are one"):
        model.adapters.merge(name)
    assert errors(model, theirs, ids)[0] == found
    edit_tensors(tmp_path, lambda tensors: {n: x + ("base_layer" in n) for n, x in tensors.items()})
    with pytest.raises(ValueError, match="differs from the model's weight"):
        model.adapters.load(tmp_path, "of another model")


def test_the_embedding_of_a_tied_model_is_not_replaced(twins, tmp_path):
    reference, model = twins("tied")
    peft_adapter(reference, tmp_path, target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    with pytest.raises(ValueError, match="which is this model's output matrix too"):
        model.adapters.load(tmp_path)


@pytest.mark.parametrize("config", few(["patterns"], ["saved modules", "vocabulary", "all-linear, rslora"]))
def test_a_merged_adapter_computes_the_same_and_is_part_of_the_model(twins, tmp_path, config):
    reference, model = twins()
    theirs, ids = peft_adapter(reference, tmp_path / "a", **CONFIGS[config]), random_batch(model, 40)
    name = model.adapters.load(tmp_path / "a")
    with pytest.raises(ValueError, match="adapters are loaded: save one by itself"):
        model.save_pretrained(tmp_path / "b")
    model.adapters.merge(name)
    assert len(model.adapters) == 0
    assert not list(loras(model))
    found, own = errors(model, theirs, ids)
    merged = (theirs.merge_and_unload()(ids).logits - model(ids)).abs().mean().item()
    assert max(found, merged) <= 2 * own  # of two models that are rounded
    model.save_pretrained(tmp_path / "b")
    assert Llama.from_pretrained(tmp_path / "b", device="cpu")(ids).equal(model(ids))


@pytest.mark.exhaustive
def test_factors_are_float32_beside_bfloat16_as_in_peft(twins, tmp_path):
    reference, model = twins()
    theirs, ids = peft_adapter(reference, tmp_path, **CONFIGS["all-linear, rslora"]), random_batch(model, 60, batch=4)
    exact = copy.deepcopy(theirs).double()
    rounded, ours = copy.deepcopy(reference).bfloat16(), model.bfloat16()
    rounded.model.rotary_emb.inv_freq = reference.model.rotary_emb.inv_freq
    rounded = peft.PeftModel.from_pretrained(rounded, tmp_path).eval()
    for key, parameter in exact.named_parameters():
        if "lora" not in key:
            parameter.copy_(parameter.bfloat16())
    exact = exact(ids).logits
    ours.adapters.activate(ours.adapters.load(tmp_path, "theirs"))
    assert lora_in(ours.layers[0].attention.qkv).down.dtype == torch.float32
    error, budget = ((each - exact).abs().mean().item() for each in (ours(ids), rounded(ids).logits))
    assert error <= budget * 1.05
    for lora in loras(ours):
        lora.scale.fill_(0)
    assert (ours(ids) - exact).abs().mean().item() > 10 * budget


@pytest.mark.parametrize("form", few(["int8"], ["int4", "int8-dynamic"]))
def test_updates_go_over_quantised_weights_which_are_never_merged(twins, tmp_path, form):
    reference, model = twins()
    reference.save_pretrained(tmp_path / "model")
    few_bits = Llama.from_pretrained(tmp_path / "model", device="cpu", quantize=form)
    for path, module in few_bits.named_modules():  # the floats that they stand for
        if isinstance(module, Linear):
            model.get_submodule(path).weight.copy_(module.matrix.floats())
    peft_adapter(reference, tmp_path / "a", **CONFIGS["all-linear, rslora"])
    ids, spread = random_batch(model, 20), {}
    for active in (None, "a"):
        for each in (model, few_bits):
            if active is not None:
                each.adapters.activate(each.adapters.load(tmp_path / "a"))
        spread[active] = (model(ids) - few_bits(ids)).abs().max().item()
    assert spread["a"] <= 10 * spread[None]
    assert (few_bits(ids) - Llama.from_pretrained(tmp_path / "model", device="cpu")(ids)).abs().max() > 1
    with pytest.raises(ValueError, match="is quantised, so adapter 'a' cannot be merged"):
        few_bits.adapters.merge("a")
    edit_config(tmp_path / "a", modules_to_save=["k_proj"])
    with pytest.raises(ValueError, match="does not fit the model"):
        few_bits.adapters.load(tmp_path / "a", "b")


@pytest.mark.parametrize("config", few(["patterns"], sorted(CONFIGS.keys() - {"patterns"})))
def test_a_saved_adapter_is_the_one_that_was_loaded_here_and_in_peft(twins, tmp_path, config):
    reference, model = twins()
    theirs, ids = peft_adapter(reference, tmp_path / "a", **CONFIGS[config]), random_batch(model, 20)
    peft_adapter(reference, tmp_path / "other", seed=2, **CONFIGS["all-linear, rslora"])
    for name in ("other", "a"):
        model.adapters.load(tmp_path / name)
    model.adapters.save("a", tmp_path / "b")
    model.adapters.activate(model.adapters.load(tmp_path / "b"))
    with_ours = model(ids)
    model.adapters.activate("a")
    assert model(ids).equal(with_ours)
    again = peft.PeftModel.from_pretrained(copy.deepcopy(reference), tmp_path / "b").eval()
    assert again(ids).logits.equal(theirs(ids).logits)


def test_a_new_adapter_changes_nothing_until_it_is_trained(twins, tmp_path):
    reference, model = twins()
    ids = random_batch(model, 30)
    before = model(ids)
    name = model.adapters.add("mine", rank=3, alpha=5, targets=["q_proj", "down_proj"], rslora=True)
    with torch.enable_grad():
        parameters = model.adapters.train(name)
        assert [p for p in model.parameters() if p.requires_grad] == parameters
        assert (model(ids, backend="dense") - before).abs().max() < 1e-4
        optimizer = torch.optim.SGD(parameters, lr=0.5)
        for _ in range(2):
            model(ids, backend="dense", recompute=True).logsumexp(-1).mean().backward()
            optimizer.step()
    model.requires_grad_(False)
    assert (model(ids) - before).abs().max() > 1e-2
    model.adapters.save(name, tmp_path)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(reference), tmp_path).eval()
    found, own = errors(model, theirs, ids)
    assert found <= 1.25 * own
    model.adapters.add("another")
    with pytest.raises(ValueError, match="adapters are trained alone; remove 'another' first"):
        model.adapters.train(name)


def test_gradients_of_an_adapter_are_pefts(twins, tmp_path):
    reference, model = twins()
    theirs, ids = peft_adapter(reference, tmp_path, **CONFIGS["patterns"]), random_batch(model, 30)
    each = {}
    with torch.enable_grad():
        for kind in ("eager", "sdpa"):
            theirs.base_model.model.set_attn_implementation(kind)
            theirs.zero_grad()
            theirs(ids).logits.logsumexp(-1).mean().backward()
            each[kind] = {name: p.grad.clone() for name, p in theirs.named_parameters() if p.grad is not None}
        model.adapters.train(model.adapters.load(tmp_path, "theirs"))
        model(ids, backend="dense").logsumexp(-1).mean().backward()
    with_gradients = copy.deepcopy(model)
    for lora, grads in zip(loras(with_gradients), loras(model), strict=True):
        for parameter, other in zip(lora.parameters(), grads.parameters(), strict=True):
            parameter.copy_(other.grad)
    with_gradients.adapters.save("theirs", tmp_path / "gradients")
    found = load_file(tmp_path / "gradients" / "adapter_model.safetensors")
    expected, other = ({n.replace(".default", ""): x for n, x in each[kind].items()} for kind in ("eager", "sdpa"))
    assert found.keys() == expected.keys()
    budget = 2 * max(relative(other[key], expected[key]) for key in expected)
    assert max(relative(found[key], expected[key]) for key in expected) <= budget
    edit_config(tmp_path, lora_alpha=8.1)  # the mutation
    model.adapters.remove("theirs")
    with torch.enable_grad():
        model.adapters.train(model.adapters.load(tmp_path, "theirs"))
        model(ids, backend="dense").logsumexp(-1).mean().backward()
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    part = next(loras(model)).down.grad[: len(expected[key])]
    assert relative(part, expected[key]) > 100 * budget


def test_several_are_switched_removed_and_copied_with_the_model(twins, tmp_path):
    reference, model = twins()
    names, ids = ["q and v", "vocabulary", "saved modules"], random_batch(model, 20)
    before = model(ids)
    each = {name: peft_adapter(reference, tmp_path / name, seed, **CONFIGS[name]) for seed, name in enumerate(names)}
    for name in names:
        model.adapters.load(tmp_path / name)
    assert list(model.adapters) == names
    for first, second in itertools.permutations(names, 2):
        for name in (first, second):
            model.adapters.activate(name)
            found, own = errors(model, each[name], ids)
            assert found <= 1.25 * own, (first, second)
    twin = copy.deepcopy(model)
    model.adapters.remove(second)
    assert model.adapters.active is None
    assert model(ids).equal(before)
    assert second not in model.adapters
    assert twin.adapters.active == second
    assert errors(twin, each[second], ids)[0] <= 1.25 * own
    for before, after in zip(loras(model), loras(copy.deepcopy(model).bfloat16()), strict=True):
        assert after.scale.equal(before.scale)
        assert after.down.dtype == torch.bfloat16
    for name in names:
        if name in model.adapters:
            model.adapters.remove(name)
    assert model.state_dict().keys() == {k for k in twin.state_dict() if ".adapter." not in k}
    assert named_weights(model, model.config).keys()


def test_edits_and_hooks_see_what_an_adapter_makes(twins, tmp_path):
    reference, model = twins()
    theirs, ids = peft_adapter(reference, tmp_path, **CONFIGS["patterns"]), random_batch(model, 20)
    model.adapters.activate(model.adapters.load(tmp_path, "theirs"))
    found, own = errors(model, theirs, ids)
    edited = model(ids, edit=edits.scale("mlp_post", 1.0))
    assert (edited - model(ids)).abs().mean() <= 1.25 * own
    assert found <= 1.25 * own
    merged = copy.deepcopy(model)
    merged.adapters.merge("theirs")
    seen = []
    for each in (model, merged):  # what enters a product is doubled, and halved as it leaves another
        each.layers[0].mlp.down.register_forward_pre_hook(lambda module, inputs: (2 * inputs[0],))
        each.layers[0].attention.qkv.register_forward_hook(
            lambda module, inputs, output: seen.append(output / 2) or seen[-1]
        )
    first, second = model(ids), model(ids, edit=edits.scale("resid_post", 1.0))
    assert (first - merged(ids)).abs().mean() <= 2 * own
    assert (second - first).abs().mean() <= 1.25 * own
    assert len(seen) == 3
    assert (seen[0] - seen[2]).abs().max() < 1e-4
    assert (first - edited).abs().mean() > 100 * own


@pytest.mark.parametrize("way", ["instance", "class"])
def test_a_forward_of_the_users_own_takes_no_adapters_and_gets_their_updates(twins, way):
    model = twins()[1]
    random_adapter(model, "mine")
    model.adapters.activate("mine")
    ids, down = random_batch(model, 20), model.layers[0].mlp.down
    expected = model(ids)

    class Own(Linear):
        def forward(self, x):
            return super().forward(x)

    if way == "class":
        down.__class__ = Own
    else:
        forward = down.forward
        down.forward = lambda x: forward(x)
    assert model(ids).equal(expected)


def test_adapters_of_a_model_that_was_cast_are_joined_by_others(twins):
    model = twins()[1]
    random_adapter(model, "first")
    model.bfloat16().adapters.activate("first")
    ids = random_batch(model, 20)
    before = model(ids)
    random_adapter(model, "second", targets=["k_proj", "down_proj"])
    assert (model(ids) - before).abs().mean() < 0.1 * before.abs().mean()
    model.adapters.activate("second")
    assert (model(ids) - before).abs().mean() > 0.1 * before.abs().mean()


def test_adapters_of_a_model_from_another_process_are_not_taken_for_new_ones(twins, monkeypatch):
    model = twins()[1]
    random_adapter(model, "theirs")
    model.adapters.activate("theirs")
    (number,) = model.adapters.number.flatten().tolist()
    torch.save(model, file := io.BytesIO())
    file.seek(0)
    again, ids = torch.load(file, weights_only=False), random_batch(model, 20)
    monkeypatch.setattr("llama_flex.adapters.adapters._numbers", itertools.count(number))
    random_adapter(again, "new")
    assert (again(ids) - model(ids)).abs().max() < 1e-3


def test_names_are_checked(twins, tmp_path):
    reference, model = twins()
    peft_adapter(reference, tmp_path / "a", **CONFIGS["q and v"])
    with pytest.raises(ValueError, match="no adapter 'a'; load it first"):
        model.adapters.activate("a")
    model.adapters.load(tmp_path / "a")
    with pytest.raises(ValueError, match="there is an adapter 'a' already"):
        model.adapters.load(tmp_path / "a")
    for name in ("", "__base__", "a\nb"):
        with pytest.raises(ValueError, match="cannot be an adapter's name"):
            model.adapters.load(tmp_path / "a", name)
    with pytest.raises(ValueError, match="no adapter 'b'; loaded: a"):
        model.adapters.merge("b")
    with pytest.raises(ValueError, match="name no matrix; choose from down_proj, embed_tokens, gate_proj"):
        model.adapters.add("c", targets=["c_attn"])
    for targets in ("q_proj", None):
        with pytest.raises(ValueError, match=f"targets must be 'all-linear' or a list of names.*, not {targets!r}"):
            model.adapters.add("c", targets=targets)
    model.adapters.load(tmp_path / "a", "b")
    model.adapters.activate("b")
    with pytest.raises(ValueError, match="adapter 'b' is active"):
        model.adapters.merge("a")
    assert repr(model.adapters) == "Adapters(a, b; active: b)"
    with torch.device("meta"):
        empty = Llama(model.config)
    with pytest.raises(ValueError, match="meta device"):
        empty.adapters.load(tmp_path / "a")
