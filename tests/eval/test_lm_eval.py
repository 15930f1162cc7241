"""lm-eval's own tasks and evaluation on a model of this package: it gets what the reference would say."""

import copy
import dataclasses
import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import datasets
import lm_eval
import pytest
import torch
import transformers
from helpers import DEMO
from lm_eval.api.task import ConfigurableTask
from scoring_helpers import reference_logprobs

from llama_flex import Engine, GenerationConfig, Sampling, Tokenizer, masks
from llama_flex.eval.lm_eval import LlamaFlex

DOCUMENTS = [
    {"question": "The capital of France is", "choices": ["Paris", "London", "Rome"], "answer": 0},
    {"question": "Water is made of hydrogen and", "choices": ["gold", "oxygen"], "answer": 1},
]
pytestmark = pytest.mark.weights


def task(name: str, **config) -> ConfigurableTask:
    """Make a task of DOCUMENTS."""

    def data(**_):
        return {"test": datasets.Dataset.from_list(DOCUMENTS)}

    common = {"task": name, "custom_dataset": data, "test_split": "test"}
    return ConfigurableTask(config=common | config)


@pytest.fixture(scope="module")
def engine(demo) -> Engine:
    """An engine of the demo weights."""
    return Engine(demo, Tokenizer.from_pretrained(DEMO))


def results(lm, *tasks) -> tuple[dict, dict]:
    """Evaluate the tasks; return the results, and what was asked and answered."""
    found = lm_eval.simple_evaluate(lm, tasks=list(tasks), log_samples=True, bootstrap_iters=0)
    return found["results"], found["samples"]


@pytest.mark.exhaustive
def test_multiple_choice(engine, demo_reference):
    choice = task(
        "choices",
        output_type="multiple_choice",
        doc_to_text="{{question}}",
        doc_to_choice="{{choices}}",
        doc_to_target="answer",
        metric_list=[{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    )
    found, samples = results(LlamaFlex(engine), choice)
    assert found["choices"]["acc,none"] == 1.0
    encode = engine.tokenizer.encode
    for sample, document in zip(samples["choices"], DOCUMENTS, strict=True):
        prefix = encode(document["question"])
        for ((total, greedy),), word in zip(sample["resps"], document["choices"], strict=True):
            ids = encode(f"{document['question']} {word}")
            expected = reference_logprobs(demo_reference, ids)[len(prefix) - 1 :]
            assert total == pytest.approx(expected.sum().item(), abs=1e-3)
            with torch.no_grad():
                best = demo_reference(torch.tensor([ids])).logits[0, len(prefix) - 1 : -1].argmax(-1)
            assert greedy == (best.tolist() == ids[len(prefix) :])


@pytest.mark.exhaustive
def test_perplexity_and_generation(engine, demo_reference):
    rolling = task(
        "rolling",
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="{{question}} {{choices[answer]}}",
        metric_list=[{"metric": "word_perplexity"}],
    )
    generation = task(
        "generation",
        output_type="generate_until",
        doc_to_text="{{question}}",
        doc_to_target="Paris",
        generation_kwargs={"until": [".", ","], "max_gen_toks": 6},
        metric_list=[{"metric": "exact_match", "ignore_punctuation": True}],
    )
    _, samples = results(LlamaFlex(engine), rolling, generation)
    encode = engine.tokenizer.encode
    for sample, document in zip(samples["rolling"], DOCUMENTS, strict=True):
        ids = encode(f"{document['question']} {document['choices'][document['answer']]}")
        bos = engine.tokenizer.bos_token_id
        assert sample["resps"][0][0] == pytest.approx(
            reference_logprobs(demo_reference, [bos, *ids]).sum().item(), abs=1e-3
        )
    for sample, document in zip(samples["generation"], DOCUMENTS, strict=True):
        alone = engine.generate([encode(document["question"])], max_new_tokens=6, stop=[".", ","])[0].text
        assert sample["resps"] == [[alone]]


@pytest.mark.exhaustive
def test_a_mask_holds_in_all_that_is_asked(engine):
    prompt, mask = "One two three four five six", masks.sliding_window(2)
    instances = [SimpleNamespace(args=(prompt, " seven"))]
    until = [SimpleNamespace(args=(prompt, {"until": ["."], "max_gen_toks": 6}))]
    plain, masked = LlamaFlex(engine), LlamaFlex(engine, mask=mask)
    for ask in (lambda lm: lm.loglikelihood(instances, disable_tqdm=True), lambda lm: lm.generate_until(until, True)):
        assert ask(plain) != ask(masked)
    ids = engine.tokenizer.encode(prompt)
    (expected,) = engine.generate([ids], max_new_tokens=6, stop=["."], mask=mask)
    assert masked.generate_until(until, True) == [expected.text]
    (seven,) = engine.tokenizer.encode(" seven", add_special_tokens=False)
    with torch.no_grad():
        logits = engine.model(torch.tensor([ids]), mask=mask)[0, -1]
    ((found, _),) = masked.loglikelihood(instances, disable_tqdm=True)
    assert found == pytest.approx(logits.log_softmax(-1)[seven].item(), abs=1e-3)


def test_a_model_that_attends_both_ways_needs_a_causal_mask(tiny_pair, demo_folder):
    model = copy.copy(tiny_pair("gqa")[1])
    model.config = dataclasses.replace(model.config, is_causal=False)
    engine = Engine(model, Tokenizer.from_pretrained(demo_folder))
    requests = [(None, [5, 6], [7])]
    with pytest.raises(ValueError, match="both directions"):
        LlamaFlex(engine)._loglikelihood_tokens(requests, disable_tqdm=True)
    ((total, _),) = LlamaFlex(engine, mask=masks.causal())._loglikelihood_tokens(requests, disable_tqdm=True)
    assert total < 0


@pytest.mark.exhaustive
def test_a_failure_or_interrupt_leaves_no_request(engine, monkeypatch):
    lm = LlamaFlex(engine)

    def ask(*options: dict):
        return [SimpleNamespace(args=("One two three", {"until": [], "max_gen_toks": 4} | o)) for o in options]

    with pytest.raises(ValueError, match="num_beams"):
        lm.generate_until(ask({}, {"num_beams": 4}), True)
    with pytest.raises(ValueError, match="max_gen_toks 9000 leaves no room for a prompt in the context of 8192"):
        lm.generate_until(ask({}, {"max_gen_toks": 9000}), True)
    step, calls = engine.scheduler.step, []

    def interrupted():
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return step()

    monkeypatch.setattr(engine.scheduler, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        lm.generate_until(ask({}, {}), True)
    assert not engine.scheduler.waiting
    ours = engine.submit([5, 6], max_new_tokens=30, stop_token_ids=())  # somebody else's, which goes on by itself
    assert len(lm.generate_until(ask({}), True)) == 1
    assert ours.finish_reason is None
    engine.run()
    assert len(ours.steps) == 30


@pytest.mark.exhaustive
def test_a_choice_is_scored_the_same_whatever_its_neighbours(tiny_pair, demo_folder):
    lm = LlamaFlex(Engine(tiny_pair("gqa")[1], Tokenizer.from_pretrained(demo_folder)))
    ids = torch.randint(3, 500, (1200,), generator=torch.Generator().manual_seed(0)).tolist()
    alone, *_ = lm._loglikelihood_tokens([(None, ids, [7])], disable_tqdm=True)
    found, _ = lm._loglikelihood_tokens([(None, ids, [7]), (None, ids, [8] * 300)], disable_tqdm=True)
    assert found[0] == pytest.approx(alone[0], abs=1e-4)


def test_the_tokenizer_and_its_template_have_a_name(engine, demo_folder):
    lm, other = (LlamaFlex(Engine(engine.model, Tokenizer.from_pretrained(demo_folder))) for _ in range(2))
    assert lm.tokenizer_name == other.tokenizer_name
    other.text.token = lambda id: "the same"
    assert lm.tokenizer_name != other.tokenizer_name
    assert "<|im_start|>" in lm.chat_template(True)


def test_a_text_that_begins_with_the_beginning_of_text_gets_no_other(engine):
    lm, bos = LlamaFlex(engine), engine.tokenizer.bos_token
    adding = SimpleNamespace(
        bos_token=bos, encode=lambda text, add_special_tokens: [1] * add_special_tokens + [len(text)]
    )
    lm.text = adding
    assert lm.tok_encode("a") == [1, 1]
    assert lm.tok_encode(f"{bos}a") == [len(bos) + 1]
    assert lm.tok_encode(f"{bos}a", add_special_tokens=True)[0] == 1


@pytest.mark.exhaustive
def test_long_contexts_keep_their_end_and_long_texts_are_cut_as_lm_eval_cuts_them(tiny_pair, demo_folder):
    reference, model = tiny_pair("gqa")  # a context of 1,024, and ids below 512
    lm = LlamaFlex(Engine(model, Tokenizer.from_pretrained(demo_folder)))
    ids = torch.randint(3, 500, (2300,), generator=torch.Generator().manual_seed(0)).tolist()
    ((total, _),) = lm._loglikelihood_tokens([(None, ids, [7, 8, 9])], disable_tqdm=True)
    assert total == pytest.approx(reference_logprobs(reference, [*ids[-1022:], 7, 8, 9])[-3:].sum().item(), abs=1e-2)
    lm.text = SimpleNamespace(encode=lambda text, add_special_tokens: ids, bos_token_id=1, bos_token=None)
    (rolled,) = lm.loglikelihood_rolling([SimpleNamespace(args=("text",))], disable_tqdm=True)
    parts = [([1], ids[:1024]), (ids[1023:1024], ids[1024:2048]), (ids[1275:2048], ids[2048:])]
    expected = sum(reference_logprobs(reference, a + b)[len(a) - 1 :].sum().item() for a, b in parts)
    assert rolled == pytest.approx(expected, abs=0.1)
    assert abs(rolled - expected + reference_logprobs(reference, parts[2][1]).sum().item()) > 1  # all of them count


def test_a_conversation_is_opened_or_its_last_message_goes_on(engine):
    said = [{"role": "user", "content": "Capital of France?"}, {"role": "assistant", "content": " The answer is "}]
    lm = LlamaFlex(engine)
    assert lm.apply_chat_template(said[:1]).endswith("<|im_start|>assistant\n")
    assert lm.apply_chat_template(said, add_generation_prompt=False).endswith("The answer is ")


@pytest.mark.parametrize("content", ["The answer is ", "im_end", "<|im_end|>", "", " \n", "Paris"])
def test_a_prefill_is_transformers(engine, demo_folder, content):
    said = [{"role": "user", "content": "Capital of France?"}, {"role": "assistant", "content": content}]
    reference = transformers.AutoTokenizer.from_pretrained(demo_folder)
    expected = reference.apply_chat_template(said, tokenize=False, continue_final_message=True)
    assert LlamaFlex(engine).apply_chat_template(said, add_generation_prompt=False) == expected
    ids = engine.tokenizer.encode(expected, add_special_tokens=False)
    assert LlamaFlex(engine).tok_encode(expected, add_special_tokens=False) == ids


@pytest.mark.exhaustive
def test_special_tokens_stop(engine):
    """Check stop strings as gsm8k gives them: the model ends with <|im_end|>, which is no stop token here."""
    lm, prompt = LlamaFlex(engine), "<|im_start|>user\nSay hi.<|im_end|>\n<|im_start|>assistant\n"
    ask = [SimpleNamespace(args=(prompt, {"until": ["Question:", "</s>", "<|im_end|>"], "max_gen_toks": 40}))]
    ends, engine.model.generation_config = engine.model.generation_config, GenerationConfig(eos_token_id=7)
    try:
        (text,) = lm.generate_until(ask, True)
    finally:
        engine.model.generation_config = ends
    (expected,) = lm.generate_until(ask, True)
    assert text == expected
    assert "\n" not in text


@pytest.mark.exhaustive
def test_settings_that_change_nothing_are_taken(engine):
    def texts(**options) -> list[str]:
        ask = [SimpleNamespace(args=("One two", {"until": ["."], "max_gen_toks": 3} | options))]
        return LlamaFlex(engine).generate_until(ask, True)

    assert texts(num_beams=1, no_repeat_ngram_size=0, do_sample=False, temperature=0) == texts()
    beams = {"early_stopping": False, "length_penalty": 1.0, "renormalize_logits": False}
    assert texts(use_cache=True, pad_token_id=2, temperature=None, **beams) == texts(use_cache=False)
    for name, value in (("early_stopping", True), ("length_penalty", 1.5), ("renormalize_logits", True)):
        with pytest.raises(ValueError, match=rf"generation options \['{name}'\] are not known"):
            texts(**{name: value})


@pytest.mark.exhaustive
def test_no_stop_string_may_be_none(engine):
    ask = [SimpleNamespace(args=("One, two,", {"until": until, "max_gen_toks": 3})) for until in (None, [])]
    assert len(set(LlamaFlex(engine).generate_until(ask, True))) == 1


def test_sampling_options_mean_what_they_mean_to_transformers(engine, monkeypatch):
    """Check the options that a task leaves open: those of generation_config.json, else temperature 1 and top_k 50."""
    found, submit = [], engine.submit

    def spy(*args, sampling, **options):
        found.append(sampling)
        return submit(*args, sampling=sampling, **options)

    def asked(**options) -> Sampling:
        LlamaFlex(engine).generate_until([SimpleNamespace(args=("a", {"max_gen_toks": 1} | options))], True)
        return found.pop()

    monkeypatch.setattr(engine, "submit", spy)
    assert asked(do_sample=True) == Sampling(temperature=1.0, top_k=50)
    assert asked(temperature=0.7) == Sampling(temperature=0.7, top_k=50)
    assert asked(do_sample=True, temperature=0.7, top_k=0, top_p=0.9) == Sampling(temperature=0.7, top_p=0.9)
    assert asked() == asked(do_sample=False) == asked(temperature=0.0) == Sampling()
    recommends = GenerationConfig(temperature=0.6, top_p=0.9, repetition_penalty=1.2, eos_token_id=2)
    monkeypatch.setattr(engine.model, "generation_config", recommends)
    assert asked(do_sample=True) == Sampling(temperature=0.6, top_k=50, top_p=0.9, repetition_penalty=1.2)
    assert asked() == Sampling(repetition_penalty=1.2)


def test_a_model_that_names_no_end_uses_the_tokenizers_or_says_so(demo, demo_folder):
    model, tokenizer = copy.copy(demo), Tokenizer.from_pretrained(demo_folder)
    model.config, model.generation_config = dataclasses.replace(demo.config, eos_token_id=()), GenerationConfig()
    lm = LlamaFlex(Engine(model, tokenizer))
    assert (lm.eot_token_id, lm.prefix_token_id) == (tokenizer.eos_token_id, tokenizer.bos_token_id)
    tokenizer.bos_token_id = None
    assert lm.prefix_token_id == tokenizer.eos_token_id
    ((total, _),) = lm.loglikelihood([SimpleNamespace(args=("", " Paris"))], disable_tqdm=True)
    assert total < 0
    tokenizer.eos_token_id = None
    with pytest.raises(ValueError, match="neither the model nor the tokenizer names an end-of-text id"):
        lm.loglikelihood([SimpleNamespace(args=("", " Paris"))], disable_tqdm=True)


@pytest.mark.exhaustive
def test_without_lm_eval_the_way_out_is_one_line(tmp_path):
    """Check the error where lm-eval is not installed: an empty module of that name stands in for it."""
    (tmp_path / "lm_eval").mkdir()
    (tmp_path / "lm_eval" / "__init__.py").write_text("")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-m", "llama_flex.eval.lm_eval", "--tasks", "x"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert re.fullmatch(
        r"error: llama_flex.eval.lm_eval needs lm-eval \(.*\): pip install 'llama_flex\[eval\]'\n", done.stderr
    )
    code = "import llama_flex.eval.lm_eval"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert "ImportError: llama_flex.eval.lm_eval needs lm-eval" in done.stderr.splitlines()[-1]


def test_wrong_arguments_are_named(engine):
    with pytest.raises(ValueError, match="the engine needs a tokenizer"):
        LlamaFlex(Engine(engine.model))
    with pytest.raises(ValueError, match="batch_size must be a whole number"):
        LlamaFlex(engine, batch_size="auto")
    with pytest.raises(ValueError, match="batch_size must be at least 1, not 0"):
        LlamaFlex(engine, batch_size="0")
    with pytest.raises(ValueError, match=r"dtype must be one of torch.float64, .* found 'float17'"):
        LlamaFlex("/nope", dtype="float17")
    context = engine.model.context
    with pytest.raises(ValueError, match=f"a continuation of {context + 1} tokens exceeds the context of {context}"):
        LlamaFlex(engine)._loglikelihood_tokens([(None, [5] * 9, [7] * (context + 1))], disable_tqdm=True)
    ask = [SimpleNamespace(args=("a", {"until": [], "num_beams": 4}))]
    with pytest.raises(ValueError, match="num_beams"):
        LlamaFlex(engine).generate_until(ask, True)


@pytest.fixture
def command_line(tmp_path):
    """A function that runs lm-eval's command line on a task of one question."""
    config = {
        "task": "local",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "data.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{q}}",
        "doc_to_choice": "{{c}}",
        "doc_to_target": 0,
        "metric_list": [{"metric": "acc"}],
    }
    (tmp_path / "task.yaml").write_text(json.dumps(config))
    (tmp_path / "data.jsonl").write_text('{"q": "The capital of France is", "c": ["Paris", "London"]}\n')

    def run(model_args: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "llama_flex.eval.lm_eval", "--model", "llama_flex", "--tasks", "local"]
        command += ["--device", "cpu", "--model_args", model_args, "--include_path", str(tmp_path)]
        environment = os.environ | {"HF_HOME": str(tmp_path)}
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)

    return run


@pytest.mark.exhaustive
def test_the_command_line_is_lm_evals(demo_folder, command_line):
    done = command_line(f"pretrained={demo_folder},dtype=auto")
    assert done.returncode == 0, done.stderr
    assert re.search(r"\|local\|.*\|acc *\|.*\| *1(\.0)?\|", done.stdout), done.stdout


@pytest.mark.exhaustive
def test_a_wrong_model_ends_the_command_line_with_one_line(command_line):
    done = command_line("pretrained=/nope")
    assert done.returncode == 1
    assert done.stderr.endswith("\nerror: /nope: no such folder (and not a hub repository name, owner/model)\n")
    assert "Traceback" not in done.stderr
