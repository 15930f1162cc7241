"""Finding the tensors of a checkpoint: which files are read, and whether their headers fit config.json."""

import json
import shutil

import pytest
import torch
import transformers
from checkpoint_helpers import (
    INDEX,
    assert_same_tensors,
    load_quietly,
    refusal,
    rewrite,
    shard,
    state_of,
    tensors_of,
    write_index,
)
from safetensors.torch import load_file, save_file

# ---- which files


@pytest.mark.parametrize("name", ["gqa", "tied", "biases"])
def test_shards_written_by_transformers_load_as_the_single_file(name, tiny_pair, tmp_path):
    reference, _ = tiny_pair(name)
    reference.save_pretrained(tmp_path, max_shard_size="200KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert_same_tensors(tensors_of(load_quietly(tmp_path)), state_of(reference))


def test_shards_need_no_order_and_no_metadata(folder):
    source = load_file(folder / "model.safetensors")
    weight_map = shard(folder, 5)
    (folder / INDEX).write_text(json.dumps({"weight_map": dict(reversed(weight_map.items()))}))
    assert_same_tensors(tensors_of(load_quietly(folder)), source)


def test_a_folder_without_weights(folder):
    (folder / "model.safetensors").unlink()
    refusal(folder, str(folder), "model.safetensors", INDEX)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_pickled_weights_are_never_opened(name, folder):
    (folder / "model.safetensors").rename(folder / name)
    refusal(folder, name, "pickled", "save_pretrained")


def test_a_missing_shard_is_named(folder):
    weight_map = shard(folder)
    gone = sorted(set(weight_map.values()))[1]
    (folder / gone).unlink()
    refusal(folder, str(folder), gone, "3")


@pytest.mark.parametrize(
    "target",
    [
        *("../outside.safetensors", "sub/inside.safetensors", "./here.safetensors", "a/../b.safetensors"),
        *("ABSOLUTE", "weights.bin", "x\0.safetensors", "new\nline.safetensors"),
        *("..", ".", "", 5, None, ["a"], {"a": 1}),
    ],
    ids=repr,
)
def test_an_index_leads_nowhere_but_to_safetensors_beside_it(target, folder):
    weight_map = shard(folder)
    outside = folder.parent / "outside.safetensors"
    (folder / "sub").mkdir()
    first = folder / next(iter(weight_map.values()))
    for copied in (outside, folder / "sub" / "inside.safetensors", folder / "here.safetensors", folder / "weights.bin"):
        shutil.copy(first, copied)
    if target == "ABSOLUTE":
        target = str(outside)
    write_index(folder, weight_map | {next(iter(weight_map)): target})
    refusal(folder, str(folder))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": {}}', '{"weight_map": []}', '{"weight_map": "x"}'])
def test_an_index_without_a_weight_map(text, folder):
    shard(folder)
    (folder / INDEX).write_text(text)
    refusal(folder, str(folder / INDEX))


# ---- which tensors


def test_missing_unexpected_and_misshapen_tensors_are_listed_together(folder):
    def change(tensors):
        del tensors["model.layers.1.mlp.up_proj.weight"]
        tensors["model.layers.7.mlp.up_proj.weight"] = torch.zeros(2)
        tensors["model.norm.weight"] = torch.zeros(33)
        return tensors

    rewrite(folder, change)
    refusal(
        folder,
        str(folder),
        "missing: model.layers.1.mlp.up_proj.weight",
        "unexpected: model.layers.7.mlp.up_proj.weight",
        "shape: model.norm.weight is [33], config.json says [32]",
    )


@pytest.mark.parametrize(
    ("configured", "needle"),
    [
        ({"num_hidden_layers": 1}, "unexpected: model.layers.1."),
        ({"num_hidden_layers": 3}, "missing: model.layers.2."),
        ({"num_key_value_heads": 4}, "shape: model.layers.0.self_attn.k_proj.weight"),
        ({"vocab_size": 49}, "shape: model.embed_tokens.weight"),
        ({"intermediate_size": 23}, "shape: model.layers.0.mlp.down_proj.weight"),
        ({"head_dim": 8}, "shape: model.layers.0.self_attn.q_proj.weight"),
        ({"attention_bias": True}, "missing: model.layers.0.self_attn.k_proj.bias"),
        ({"mlp_bias": True}, "missing: model.layers.0.mlp.down_proj.bias"),
    ],
    ids=str,
)
def test_weights_that_are_not_those_of_the_config(configured, needle, folder):
    rewrite(folder, **configured)
    refusal(folder, str(folder), needle)


def test_biases_that_the_config_does_not_know_are_refused(folder):
    rewrite(folder, lambda t: t | {"model.layers.0.self_attn.q_proj.bias": torch.zeros(32)})
    refusal(folder, "unexpected: model.layers.0.self_attn.q_proj.bias")


def test_a_long_list_of_problems_is_cut(folder):
    rewrite(folder, num_hidden_layers=50)
    assert len(refusal(folder, "more")) < 2000


def test_buffers_of_old_checkpoints_are_ignored(folder):
    names = ["model.layers.0.self_attn.rotary_emb.inv_freq", "model.layers.1.self_attn.rotary_emb.inv_freq"]
    source = load_file(folder / "model.safetensors")
    rewrite(folder, lambda t: t | {name: torch.ones(2) for name in names})
    assert_same_tensors(tensors_of(load_quietly(folder)), source)


@pytest.mark.parametrize("tied", [False, True])
def test_names_without_model_are_those_of_a_base_model(folder, tied):
    expected = load_file(folder / "model.safetensors")
    rewrite(folder, lambda t: {k.removeprefix("model."): v for k, v in t.items() if k != "lm_head.weight"})
    if tied:
        rewrite(folder, tie_word_embeddings=True)
        del expected["lm_head.weight"]
        assert_same_tensors(tensors_of(load_quietly(folder)), expected)
    else:
        refusal(folder, "missing: lm_head.weight", "a base model without an output matrix", "tie_word_embeddings")


def test_a_tied_checkpoint_may_hold_its_embedding_under_the_name_of_the_head(folder):
    expected = {k: v for k, v in load_file(folder / "model.safetensors").items() if k != "lm_head.weight"}
    embedding = "model.embed_tokens.weight"
    rewrite(folder, lambda t: {k: v for k, v in t.items() if k != embedding} | {"lm_head.weight": t[embedding]})
    refusal(folder, f"missing: {embedding}")
    rewrite(folder, tie_word_embeddings=True)
    assert_same_tensors(tensors_of(load_quietly(folder)), expected)
    reference = transformers.LlamaForCausalLM.from_pretrained(folder)
    assert torch.equal(reference.get_input_embeddings().weight, expected[embedding])


# ---- tensors found twice


def test_a_tensor_in_two_shards_with_the_same_bits_is_loaded(folder):
    expected = load_file(folder / "model.safetensors")
    files = sorted(set(shard(folder).values()))
    first, second = load_file(folder / files[0]), load_file(folder / files[1])
    name = sorted(first)[0]
    save_file(second | {name: first[name]}, folder / files[1])
    assert_same_tensors(tensors_of(load_quietly(folder)), expected)
    save_file(second | {name: first[name].double()}, folder / files[1])
    refusal(folder, f"twice, as float32 and float64: {name} ({name} in {files[0]} and {name} in {files[1]})")


def test_a_tensor_in_two_shards_is_refused(folder):
    weight_map = shard(folder)
    files = sorted(set(weight_map.values()))
    first, second = load_file(folder / files[0]), load_file(folder / files[1])
    name = sorted(first)[0]
    save_file(second | {name: first[name] + 1}, folder / files[1])
    refusal(folder, f"twice, with other values: {name}", files[0], files[1])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t + 1, "with other values"),
        (lambda t: t.double(), "as float32 and float64"),
        (lambda t: t[:5].clone(), "in shapes [32] and [5]"),
    ],
)
def test_a_tensor_under_two_names_is_named_with_both_and_what_differs(folder, change, said):
    name, file = "model.norm.weight", "model.safetensors"
    rewrite(folder, lambda t: t | {"norm.weight": t[name].clone()})
    load_quietly(folder)
    rewrite(folder, lambda t: t | {"norm.weight": change(t[name])})
    refusal(folder, f"twice, {said}: {name} ({name} in {file} and norm.weight in {file})")


# ---- checkpoints of another kind


def test_a_classifier_is_named(folder):
    rewrite(
        folder, lambda t: {k: v for k, v in t.items() if k != "lm_head.weight"} | {"score.weight": torch.zeros(2, 32)}
    )
    refusal(folder, "unexpected: score.weight", "another head than the one that predicts tokens")
    config = folder / "config.json"
    config.write_text(config.read_text().replace("LlamaForCausalLM", "LlamaForQuestionAnswering"))
    refusal(folder, "another head than the one that predicts tokens; give the model that it was made of")


@pytest.mark.parametrize("extra", ["fc.weight", "midlayer.self_attn.q_proj.weight", "d2t"])
def test_a_draft_model_is_named(folder, extra):
    rewrite(folder, lambda t: t | {extra: torch.zeros(3, dtype=torch.int64 if extra == "d2t" else torch.float32)})
    message = refusal(folder, f"unexpected: {extra}; a draft model (EAGLE)", "give the model that it drafts for")
    assert "quantised" not in message


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int64, torch.float8_e4m3fn, torch.float8_e5m2])
def test_quantised_tensors_are_refused_by_name(dtype, folder):
    name = "model.layers.0.mlp.down_proj.weight"
    rewrite(folder, lambda t: t | {name: t[name].to(dtype)})
    refusal(folder, str(folder), name, "quantised")


@pytest.mark.parametrize("name", ["lm_head.weight", "model.layers.0.mlp.up_proj.qweight"])
def test_a_quantised_tensor_that_the_config_does_not_list_is_named(folder, name):
    rewrite(folder, lambda t: t | {name: torch.zeros(48, 32, dtype=torch.int8)}, tie_word_embeddings=True)
    refusal(folder, f"stored as I8: {name} (quantised")
