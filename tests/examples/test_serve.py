"""The server example answers OpenAI's own client, over a socket."""

import asyncio
import functools
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
import torch
from helpers import ROOT, TINY, tiny_reference
from tokenizer_helpers import byte_level_json, write_folder

from llama_flex import Engine, Llama, Sampling, Tokenizer
from llama_flex.model import run_eager

openai = pytest.importorskip("openai")
uvicorn = pytest.importorskip("uvicorn")
pytest.importorskip("starlette")
from examples import serve  # noqa: E402

TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>"
PROMPTS = ["The capital of France is", "Water boils at", "Ξεσκεπάζω", "hello"]
NAME = "tiny"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a tiny random model and a byte-level tokenizer with a chat template."""
    folder = tmp_path_factory.mktemp("served") / NAME
    tiny_reference(vocab_size=640, max_position_embeddings=2048, **TINY["gqa"], head_dim=16).save_pretrained(folder)
    config = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": TEMPLATE}
    return write_folder(folder, config, tokenizer__json=byte_level_json())


@pytest.fixture(scope="module")
def engine(folder):
    """The engine that is served."""
    model = Llama.from_pretrained(folder, device="cpu", dtype=torch.float32)
    return Engine(model, Tokenizer.from_pretrained(folder), compile="auto")


@pytest.fixture(scope="module")
def url(engine):
    """The address of the server, which runs in a thread."""
    server = serve.Uvicorn(serve.Server(engine, NAME), log_level="critical")
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def client(url):
    """OpenAI's client of the server."""
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=60) as client:
        yield client


def complete_with(client, prompt=PROMPTS[0], **options):
    """Complete a prompt."""
    return client.completions.create(model=NAME, prompt=prompt, **{"max_tokens": 6, "temperature": 0} | options)


@pytest.fixture
def complete(client):
    """`complete_with` the client."""
    return functools.partial(complete_with, client)


@pytest.fixture
def chat(client):
    """A function that answers a message."""

    def chat(content="Hi", **options):
        messages = [{"role": "user", "content": content}]
        return client.chat.completions.create(model=NAME, messages=messages, **{"max_tokens": 6} | options)

    return chat


@pytest.fixture
def cancelled(engine, monkeypatch):
    """The requests that are cancelled; steps take time, so that a client can leave between them."""
    found, cancel = [], engine.cancel
    monkeypatch.setattr(engine, "cancel", lambda request: (found.append(request), cancel(request)))
    step = engine.scheduler.step

    def slow():
        ended = step()
        time.sleep(0.02)
        return ended

    monkeypatch.setattr(engine.scheduler, "step", slow)
    return found


def expected(engine, prompt, *, new=6, **sampling):
    """What an engine generates for a text or for ids."""
    ids = engine.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
    alone = Engine(engine.model, engine.tokenizer, compile="auto")
    return alone.generate([ids], max_new_tokens=new, sampling=Sampling(**sampling))[0]


def chat_ids(engine, content="Hi"):
    """The ids of a conversation of one message."""
    return engine.tokenizer.encode(f"<|im_start|>user\n{content}<|im_end|>\n<|im_start|>", add_special_tokens=False)


def wait_until(condition):
    """Wait until a condition holds."""
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def is_free(engine):
    """Whether no request is left, and no page is in use."""
    manager = engine.scheduler.block_manager
    return engine.scheduler.idle and manager.available == manager.num_pages


# --- what is answered ---


def test_a_prompt_gets_what_the_engine_generates(engine, complete):
    for prompt in (*PROMPTS, [5, 6, 7]):
        done, alone = complete(prompt), expected(engine, prompt)
        (choice,) = done.choices
        assert (choice.text, choice.finish_reason, choice.index) == (alone.text, "length", 0)
        count = len(engine.tokenizer.encode(prompt)) if isinstance(prompt, str) else 3
        assert (done.usage.prompt_tokens, done.usage.completion_tokens) == (count, 6)
        assert done.usage.total_tokens == count + 6
        assert (done.model, done.object) == (NAME, "text_completion")
        assert "".join(each.choices[0].text for each in complete(prompt, stream=True)) == alone.text
    assert len({expected(engine, prompt).text for prompt in PROMPTS}) == len(PROMPTS)  # else nothing is compared


def test_several_prompts_have_n_choices_each_and_sample_i_has_seed_i(engine, complete):
    options = {"temperature": 1.0, "seed": 7, "n": 3}
    done = complete(PROMPTS[:2], **options)
    texts = [expected(engine, p, temperature=1.0, seed=7 + i).text for p in PROMPTS[:2] for i in range(3)]
    assert [choice.text for choice in done.choices] == texts
    assert [choice.index for choice in done.choices] == list(range(6))
    assert len(set(texts)) == 6
    assert done.usage.prompt_tokens == sum(len(engine.tokenizer.encode(p)) for p in PROMPTS[:2])
    assert done.usage.completion_tokens == 36
    streamed = [""] * 6
    for chunk in complete(PROMPTS[:2], stream=True, **options):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == texts
    ids = [engine.tokenizer.encode(p) for p in PROMPTS[:2]]
    assert [choice.text for choice in complete(ids, **options).choices] == texts


def test_a_seed_repeats_a_text_and_no_seed_does_not(complete):
    texts = [complete(temperature=1.0, **seed).choices[0].text for seed in ({"seed": 1}, {"seed": 1}, {}, {})]
    assert texts[0] == texts[1]
    assert len(set(texts)) == 3


def test_the_fields_of_sampling_arrive(engine, complete):
    sampling = {"top_k": 5, "min_p": 0.01, "repetition_penalty": 1.3}
    common = {"temperature": 1.5, "top_p": 0.9, "seed": 3}
    text = complete(extra_body=sampling, **common).choices[0].text
    assert text == expected(engine, PROMPTS[0], **sampling, **common).text
    assert text != expected(engine, PROMPTS[0], **common).text


def test_a_text_ends_before_a_stop_string(engine, complete):
    whole = expected(engine, PROMPTS[0], new=24).text
    stop = whole[len(whole) // 2 :][:2]
    for stops in (stop, ["nowhere to be found", stop]):
        done = complete(max_tokens=24, stop=stops)
        assert (done.choices[0].text, done.choices[0].finish_reason) == (whole.partition(stop)[0], "stop")
        chunks = list(complete(max_tokens=24, stop=stops, stream=True))
        assert "".join(chunk.choices[0].text for chunk in chunks) == whole.partition(stop)[0]
        assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]


def test_a_conversation_is_rendered_by_the_template(engine, chat):
    for content in ("Hi", [{"type": "text", "text": "Hi"}]):
        done = chat(content, temperature=0)
        alone = expected(engine, chat_ids(engine))
        message = done.choices[0].message
        assert (message.role, message.content, message.tool_calls) == ("assistant", alone.text, None)
        assert done.usage.prompt_tokens == len(chat_ids(engine))
    two = chat([{"type": "text", "text": "Hi"}, {"type": "text", "text": "there"}], temperature=0)
    assert two.choices[0].message.content == expected(engine, chat_ids(engine, "Hi\nthere")).text
    assert two.choices[0].message.content != alone.text


def test_a_conversation_takes_as_many_tokens_as_fit_unless_told(folder, engine, chat, client):
    assert chat(max_tokens=None, max_completion_tokens=9).usage.completion_tokens == 9
    small = Engine(engine.model, engine.tokenizer, compile="auto", max_length=128)
    call = serve.Call(
        serve.Server(small, NAME), {"messages": [{"role": "user", "content": "Hi"}], "temperature": 0}, True
    )
    small.run()
    (request,) = call.requests
    assert len(request.steps) == 128 - len(chat_ids(engine))
    assert request.completion.text == expected(engine, chat_ids(engine), new=len(request.steps)).text


def test_a_streamed_conversation_begins_with_the_role_and_ends_with_the_usage(engine, chat, client):
    chunks = list(chat(n=2, seed=5, stream=True, stream_options={"include_usage": True}))
    *others, last = chunks
    assert last.choices == []
    assert last.usage.completion_tokens == 12
    assert all(chunk.usage is None and chunk.object == "chat.completion.chunk" for chunk in others)
    assert len({chunk.id for chunk in chunks}) == 1
    for n in range(2):
        deltas = [chunk.choices[0].delta for chunk in others if chunk.choices[0].index == n]
        assert [delta.role for delta in deltas] == ["assistant"] + [None] * (len(deltas) - 1)
        text = expected(engine, chat_ids(engine), temperature=1.0, seed=5 + n).text
        assert "".join(delta.content for delta in deltas) == text
    assert all("usage" not in chunk.model_dump(exclude_unset=True) for chunk in chat(stream=True))
    text = expected(engine, chat_ids(engine), new=20).text
    asked = {"messages": [{"role": "user", "content": "Hi"}], "temperature": 0, "stop": text[6:8]}
    with client.chat.completions.stream(model=NAME, **asked) as stream:  # joins the pieces itself
        final = stream.get_final_completion()
    assert final.choices[0].message.content == text.partition(text[6:8])[0]


def test_an_answer_of_the_client_can_be_sent_back(client, chat):
    message = chat(temperature=0).choices[0].message
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}, message]
    done = client.chat.completions.create(model=NAME, messages=messages, max_tokens=2)
    assert done.usage.completion_tokens == 2


def test_completions_carry_log_probabilities(engine, complete):
    ids = engine.tokenizer.encode(PROMPTS[0])
    alone = expected(engine, PROMPTS[0])
    logits = engine.model(torch.tensor([[*ids, *alone.tokens]]))[0, len(ids) - 1 : -1].double()
    likely = logits.log_softmax(-1).topk(3)
    found = complete(logprobs=3).choices[0].logprobs
    assert "".join(found.tokens) == alone.text
    assert found.token_logprobs == pytest.approx([likely.values[n, 0].item() for n in range(6)], abs=1e-5)
    assert found.text_offset == [len("".join(found.tokens[:n])) for n in range(6)]
    texts = engine.tokenizer.token_bytes()
    for n, top in enumerate(found.top_logprobs):
        names = [texts[id].decode(errors="replace") for id in likely.indices[n]]
        assert top == pytest.approx(dict(zip(names, likely.values[n].tolist(), strict=True)), abs=1e-5)
    streamed = [chunk.choices[0].logprobs for chunk in complete(logprobs=3, stream=True)]
    for name in ("tokens", "token_logprobs", "text_offset", "top_logprobs"):
        joined = [each for logprobs in streamed for each in getattr(logprobs, name)]
        for one, other in zip(joined, getattr(found, name), strict=True):
            assert one == (other if isinstance(other, str) else pytest.approx(other, abs=1e-5))
    assert complete(logprobs=0).choices[0].logprobs.top_logprobs is None
    assert complete().choices[0].logprobs is None


def test_answers_carry_log_probabilities(engine, chat):
    options = {"temperature": 0, "logprobs": True, "top_logprobs": 2}
    whole = chat(**options).choices[0]
    streamed = [chunk.choices[0] for chunk in chat(**options, stream=True)]
    alone = expected(engine, chat_ids(engine), top_logprobs=2)
    texts = engine.tokenizer.token_bytes()
    content = [each for choice in streamed for each in choice.logprobs.content]
    for tokens in (whole.logprobs.content, content):
        assert [bytes(token.bytes) for token in tokens] == [texts[id] for id in alone.tokens]
        assert [token.logprob for token in tokens] == pytest.approx(alone.logprobs, abs=1e-5)
        for token, top in zip(tokens, alone.top_logprobs, strict=True):
            assert [bytes(each.bytes) for each in token.top_logprobs] == [texts[id] for id, _ in top]
            assert [each.logprob for each in token.top_logprobs] == pytest.approx([x for _, x in top], abs=1e-5)
    assert all(not token.top_logprobs for token in chat(temperature=0, logprobs=True).choices[0].logprobs.content)
    assert chat().choices[0].logprobs is None


def test_biases_and_penalties_arrive(engine, complete):
    likely = expected(engine, PROMPTS[0]).tokens[0]
    text = complete(logit_bias={str(likely): -100}).choices[0].text
    assert text == expected(engine, PROMPTS[0], logit_bias={likely: -100}).text
    assert text != expected(engine, PROMPTS[0]).text
    penalties = {"presence_penalty": 1.5, "frequency_penalty": 2}
    text = complete(max_tokens=30, **penalties).choices[0].text
    assert text == expected(engine, PROMPTS[0], new=30, **penalties).text
    assert text != expected(engine, PROMPTS[0], new=30).text


def test_texts_conform_to_what_the_client_asks_for(engine, chat, complete):
    schema = {
        "type": "object",
        "properties": {"n": {"enum": [12, 345]}},
        "required": ["n"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "number", "strict": True, "schema": schema}}
    options = {"max_tokens": 60, "seed": 2}
    done = chat(response_format=form, logprobs=True, **options).choices[0]
    assert "".join(token.token for token in done.logprobs.content) == done.message.content
    assert json.loads(done.message.content)["n"] in (12, 345)
    assert done.finish_reason == "stop"
    streamed = chat(response_format=form, stream=True, **options)
    assert "".join(chunk.choices[0].delta.content for chunk in streamed) == done.message.content
    text = chat(response_format={"type": "json_object"}, **options).choices[0].message.content
    assert text.lstrip()[0] == "{"
    free = {"response_format": {"type": "text"}}
    assert chat(**free, **options).choices[0].message.content == chat(**options).choices[0].message.content
    for grammar in ({"regex": "[ab]{3}c"}, {"grammar": 'start: /[ab]/ /[ab]/ /[ab]/ "c"'}, {"json": {"const": "abbc"}}):
        done = complete(extra_body={"structured_outputs": grammar}, max_tokens=9, temperature=1).choices[0]
        assert re.fullmatch("[ab]{3}c", done.text.strip('"'))
        assert done.finish_reason == "stop"


def test_the_usage_tells_how_much_of_a_prompt_was_cached(engine, complete):
    ids = torch.randint(3, 600, (300,), generator=torch.Generator().manual_seed(0)).tolist()
    cached = [
        complete(prompt, n=2).usage.prompt_tokens_details.cached_tokens for prompt in (ids, [*ids[:200], 5], [ids, ids])
    ]
    assert cached[0] == 0
    assert 128 <= cached[1] <= 200  # a page, and what is copied of the next
    assert cached[2] >= 512


def test_concurrent_calls_run_in_one_batch_and_get_what_each_gets_alone(engine, url, monkeypatch):
    counts = []
    step = engine.scheduler.step

    def counted():
        ended = step()
        counts.append(engine.scheduler.num_running)
        return ended

    monkeypatch.setattr(engine.scheduler, "step", counted)

    async def ask():
        async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:

            async def streamed(prompt):
                options = {"max_tokens": 12, "temperature": 0, "stream": True}
                return [
                    c.choices[0].text
                    async for c in await client.completions.create(model=NAME, prompt=prompt, **options)
                ]

            async def whole(prompt):
                done = await client.completions.create(model=NAME, prompt=prompt, max_tokens=12, temperature=0)
                return [done.choices[0].text]

            return await asyncio.gather(*(ask(prompt) for prompt in PROMPTS for ask in (whole, streamed)))

    texts = ["".join(text) for text in asyncio.run(ask())]
    assert texts == [expected(engine, prompt, new=12).text for prompt in PROMPTS for _ in range(2)]
    assert max(counts) > 2
    assert is_free(engine)


def test_the_model_is_listed(client):
    (model,) = client.models.list().data
    assert (model.id, model.object) == (NAME, "model")
    assert client.models.retrieve(NAME) == model
    with pytest.raises(openai.NotFoundError, match="'gpt-4' is not served; use 'tiny'"):
        client.models.retrieve("gpt-4")


# --- what is refused ---

REFUSED = [
    ({"foo": 3}, "foo", "foo = 3 is not served"),
    ({"suffix": "x"}, "suffix", "not served"),
    ({"echo": True}, "echo", "not served"),
    ({"best_of": 2}, "best_of", "not served"),
    ({"tools": [{"type": "function"}]}, "tools", "not served"),
    ({"messages": []}, "messages", "not served"),
    ({"top_p": 3}, "top_p", "top_p must be from 0 to 1, not 3"),
    ({"temperature": "3"}, "temperature", "temperature must be 0"),
    ({"temperature": -1}, "temperature", "temperature must be 0"),
    ({"seed": 0.5}, "seed", "seed must be a 64-bit whole number"),
    ({"min_p": 2}, "min_p", "min_p must be from 0 to 1"),
    ({"max_tokens": "3"}, "max_tokens", "max_tokens must be a whole number"),
    ({"max_tokens": 0}, "max_tokens", "max_tokens must be at least 1"),
    ({"n": 0}, "n", "n must be at least 1"),
    ({"n": True}, "n", "n must be a whole number"),
    ({"n": 10**6}, "n", "the limit is 1024"),
    ({"stop": 5}, "stop", "stop must be a text or a list"),
    ({"stop": [5]}, "stop", "stop strings"),
    ({"stop": ""}, None, "may not be empty"),
    ({"stop": list("abcde")}, "stop", "the limit is 4"),
    ({"logprobs": 21}, "logprobs", "at most 20"),
    ({"logprobs": True}, "logprobs", "must be a whole number"),
    ({"top_logprobs": 2}, "top_logprobs", "not served"),
    ({"logit_bias": {"x": 1}}, "logit_bias", "by token id"),
    ({"logit_bias": {"5": "x"}}, "logit_bias", "by token id"),
    ({"logit_bias": {"9999": 1}}, "logit_bias", "9999"),
    ({"presence_penalty": 3}, "presence_penalty", "from -2 to 2"),
    ({"grammar": "x"}, "grammar", "not served"),
    ({"processors": []}, "processors", "not served"),
    ({"response_format": {"type": "text"}}, "response_format", "not served"),
    ({"structured_outputs": {"choice": ["a"]}}, "structured_outputs.choice", "not served"),
    ({"structured_outputs": {"regex": "("}}, None, "the regular expression cannot be used"),
    ({"structured_outputs": {"regex": "a", "json": {}}}, "structured_outputs", "one grammar"),
    ({"stream": "yes"}, "stream", "true or false"),
    (
        {"stream": True, "stream_options": {"include_obfuscation": True}},
        "stream_options.include_obfuscation",
        "not served",
    ),
    ({"stream_options": {"include_usage": True}}, "stream_options", "needs stream"),
    ({"prompt": 5}, "prompt", "must be a text or a list"),
    ({"prompt": ["x", 5]}, "prompt", "a list of such"),
    ({"prompt": []}, "prompt", "a list of such"),
    ({"prompt": [10**6]}, "prompt", "outside the vocabulary"),
    ({"prompt": [1, "x"]}, None, "token ids"),
]
CHAT_REFUSED = [
    ({"prompt": "x"}, "prompt", "not served"),
    ({"tool_choice": "auto"}, "tool_choice", "not served"),
    ({"messages": []}, None, "non-empty list"),
    ({"messages": None}, None, "non-empty list"),
    ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens", "not both"),
    ({"logprobs": 3}, "logprobs", "true or false"),
    ({"top_logprobs": 3}, "top_logprobs", "needs logprobs"),
    ({"top_logprobs": 21, "logprobs": True}, "top_logprobs", "at most 20"),
    ({"response_format": {"type": "xml"}}, "response_format", "json_object or json_schema"),
    ({"response_format": {"type": "text", "x": 1}}, "response_format", "json_object or json_schema"),
    ({"response_format": {"type": "json_schema"}}, "response_format", "json_object or json_schema"),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "x"}}}}, None, "the JSON schema"),
    (
        {"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}},
        "structured_outputs",
        "one grammar",
    ),
    ({"messages": "Hi"}, "messages", "must be a list"),
    ({"messages": ["Hi"]}, "messages[0]", "must be an object"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0]", "a role of"),
    ({"messages": [{"role": "user"}]}, "messages[0]", "needs a content"),
    ({"messages": [{"role": "user", "content": "x", "name": "Jo"}]}, "messages[0].name", "not served"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "a text or a list"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        "messages[0].content[0].image_url",
        "not served",
    ),
    ({"messages": [{"role": "user", "content": [{"type": "x", "text": "x"}]}]}, "messages[0].content", "type 'text'"),
]


@pytest.mark.parametrize(
    ("path", "body", "param", "words"),
    [
        *(("completions", *each) for each in REFUSED),
        *(("chat/completions", *each) for each in CHAT_REFUSED),
    ],
)
def test_what_is_not_served_is_refused_by_name(client, engine, path, body, param, words):
    common = {"messages": [{"role": "user", "content": "Hi"}]} if "chat" in path else {"prompt": "x"}
    with pytest.raises(openai.BadRequestError) as caught:
        client.post(f"/{path}", body=common | body, cast_to=object)
    error = caught.value.body
    assert error["param"] == param
    assert words in error["message"]
    assert error["type"] == "invalid_request_error"
    assert engine.scheduler.idle


def test_null_and_neutral_values_are_as_good_as_none(engine, complete):
    neutral = {"best_of": 1, "echo": False, "suffix": "", "stop": [], "seed": None, "user": "me", "logprobs": None}
    assert complete(**neutral).choices[0].text == expected(engine, PROMPTS[0]).text


def test_another_model_is_not_found(client):
    with pytest.raises(openai.NotFoundError) as caught:
        client.completions.create(model="gpt-4", prompt="x")
    assert caught.value.body["code"] == "model_not_found"
    assert caught.value.body["param"] == "model"


@pytest.mark.parametrize(
    "body", [{"max_tokens": 2047}, {"prompt": [5] * 2048}, {"prompt": [5] * 9999, "max_tokens": 1}]
)
def test_too_many_tokens_say_how_many_fit(client, body):
    with pytest.raises(openai.BadRequestError, match="exceed the context of 2048") as caught:
        client.completions.create(model=NAME, **{"prompt": "hello"} | body)
    assert caught.value.code == "context_length_exceeded"


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff", b"[" * 100_000, b"[]", b"5", b'{"prompt": "x", "n": 1' + b"0" * 9999 + b"}"]
)
def test_a_body_that_is_no_json_object_is_refused(client, content):
    with pytest.raises(openai.BadRequestError) as caught:
        client.post("/completions", content=content, cast_to=object)
    assert caught.value.body["type"] == "invalid_request_error"


def test_a_lone_surrogate_is_refused_wherever_it_stands(client):
    for content in (b'{"prompt": "\\ud800"}', b'{"\\ud800": 1}', b'{"prompt": "x", "model": "\\ud800"}'):
        with pytest.raises(openai.APIStatusError) as caught:
            client.post("/completions", content=content, cast_to=object)
        assert caught.value.status_code in (400, 404)


def test_a_body_may_not_be_too_large(client):
    with pytest.raises(openai.APIStatusError, match="the limit is 8388608") as caught:
        client.completions.create(model=NAME, prompt="x" * serve.MAX_BODY)
    assert caught.value.status_code == 413


def test_unknown_routes_and_methods_are_refused_in_the_same_shape(client):
    with pytest.raises(openai.NotFoundError, match="Not Found"):
        client.embeddings.create(model=NAME, input="x")
    with pytest.raises(openai.APIStatusError, match="Method Not Allowed") as caught:
        client.get("/completions", cast_to=object)
    assert caught.value.status_code == 405


# --- what ends early ---


@pytest.mark.parametrize("reads", [0, 3])
def test_a_client_that_leaves_a_stream_frees_its_pages(engine, complete, cancelled, reads):
    stream = complete(PROMPTS, n=2, max_tokens=1000, stream=True)
    for _ in range(reads):
        next(stream)
    wait_until(lambda: engine.scheduler.num_running)
    stream.close()
    wait_until(lambda: cancelled and is_free(engine))
    assert [request.finish_reason for request in cancelled] == ["cancelled"] * 8
    assert max(len(request.steps) for request in cancelled) < 1000


def test_a_client_that_leaves_before_its_answer_frees_its_pages(engine, complete, cancelled):
    with pytest.raises(openai.APITimeoutError):
        complete(PROMPTS, n=2, max_tokens=1000, timeout=0.3)
    wait_until(lambda: cancelled and is_free(engine))
    assert [request.finish_reason for request in cancelled] == ["cancelled"] * 8
    assert max(len(request.steps) for request in cancelled) < 1000


def test_a_client_that_leaves_does_not_disturb_the_others(engine, complete, cancelled):
    staying = complete(PROMPTS[1], max_tokens=20, stream=True)
    first = next(staying).choices[0].text
    leaving = complete(max_tokens=1000, stream=True)
    next(leaving)
    leaving.close()
    assert first + "".join(chunk.choices[0].text for chunk in staying) == expected(engine, PROMPTS[1], new=20).text
    wait_until(lambda: is_free(engine))
    assert len(cancelled) == 1


def test_an_error_ends_a_stream_with_an_event_and_an_answer_with_500(engine, complete, monkeypatch):
    step, count = engine.scheduler.step, 0

    def failing():
        nonlocal count
        count += 1
        if count % 4 == 3:
            raise RuntimeError("out of memory, say")
        return step()

    monkeypatch.setattr(engine.scheduler, "step", failing)
    texts = []
    with pytest.raises(openai.APIError, match="out of memory, say") as caught:
        texts.extend(chunk.choices[0].text for chunk in complete(max_tokens=20, stream=True))
    assert texts
    assert caught.value.type == "server_error"
    with pytest.raises(openai.InternalServerError, match="out of memory, say"):
        complete(max_tokens=20)
    monkeypatch.undo()
    wait_until(lambda: is_free(engine) or engine.step() is None)
    assert complete().choices[0].text == expected(engine, PROMPTS[0]).text


def test_logits_that_are_not_finite_are_the_servers_error(engine, complete):
    weight = engine.model.norm.weight
    kept = weight.clone()
    try:
        with torch.no_grad():
            weight.fill_(float("nan"))
        with pytest.raises(openai.InternalServerError, match="NaN or infinite"):
            complete()
        with pytest.raises(openai.APIError, match="NaN or infinite"):
            list(complete(stream=True))
    finally:
        with torch.no_grad():
            weight.copy_(kept)
    assert complete().choices[0].text == expected(engine, PROMPTS[0]).text


# --- the command ---


def test_nothing_is_left_to_compile_after_the_warm_up(engine, monkeypatch):
    sizes = {"max_batch_size": 9, "max_length": 256, "prefill_tokens": 128}
    warm = Engine(engine.model, engine.tokenizer, compile=True, **sizes)
    keys = set()
    # Compiling all of it takes minutes; whatever would be compiled is asked for here.
    monkeypatch.setattr(warm.runner, "run_for", lambda *key: keys.add(key) or run_eager)
    monkeypatch.setattr(warm.runner, "replays", lambda *_: False)
    serve.warm_up(warm)
    compiled = set(keys)
    assert len(warm.runner.shapes) == 5  # prompts of 64 and 128 tokens; 1, 8 and 9 rows
    for count in (1, 12):
        for n in range(count):
            sampling = Sampling(temperature=n % 2, seed=n)
            warm.submit([5 + n] * (1 + 20 * n), max_new_tokens=4 + n, sampling=sampling)
        warm.run()
    assert keys == compiled
    warm.submit([5], max_new_tokens=4, sampling=Sampling(temperature=1, top_p=0.5))
    warm.run()
    assert keys > compiled


@pytest.fixture
def command(folder):
    """The server as a command, once it is ready: its process and its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = "from examples import serve; serve.GRACE = 1; serve.main()"  # 1 second: calls end before they are answered
    arguments = [sys.executable, "-c", code, "--model", str(folder), "--port", str(port)]
    process = subprocess.Popen(arguments, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    for line in process.stderr:
        if "running on" in line:
            break
    yield process, f"http://127.0.0.1:{port}/v1"
    process.kill()
    process.wait()
    process.stderr.close()


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_ends_the_command_and_what_it_answers(command, name):
    process, url = command
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
        assert complete_with(client, max_tokens=4).usage.completion_tokens == 4
        streams = [complete_with(client, max_tokens=2000, stream=True) for _ in range(2)]
        for stream in streams:
            next(stream)
        process.send_signal(getattr(signal, name))
        assert process.wait(15) in (0, -getattr(signal, name))
        for stream in streams:
            with pytest.raises(openai.APIError, match="the server is shutting down"):
                list(stream)
    log = process.stderr.read()
    assert "Finished server process" in log
    assert "Traceback" not in log
