"""What the server example does not serve is refused by name, in the shape of OpenAI's errors."""

import contextlib
import itertools

import pytest
from serve_helpers import NAME, PROMPTS, expected, is_free, openai, serve, wait_until

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
        {"response_format": {"type": "json_object"}, "structured_outputs": {"json": {"type": "string"}}},
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


ODD = [0, -1, 2.5, 10**30, True, "x", "", [], ["x"], [5], [[1], "x"], {}, {"x": 1}, {"type": "json_schema"}, "\ud800"]


@pytest.mark.parametrize("chat", [False, True])
def test_odd_values_are_answered_or_refused_and_never_the_servers_error(engine, chat):
    server = serve.Server(engine, NAME)
    common = {"messages": [{"role": "user", "content": "Hi"}]} if chat else {"prompt": "x"}
    asked = [{name: value} for name, value in itertools.product(serve.CHAT if chat else serve.COMPLETION, ODD)]
    asked += [{"structured_outputs": {name: value}} for name, value in itertools.product(serve.GRAMMARS, ODD)]
    for fields in asked:
        with contextlib.suppress(ValueError):
            serve.Call(server, {**common, "max_tokens": 1, **fields}, chat).leave()
    for messages in ([value] for value in ODD):
        with pytest.raises(serve.Refusal):
            serve.Call(server, {"messages": messages}, True)
    assert is_free(engine)


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


def test_parameters_that_leave_no_token_are_the_callers_error(engine, complete):
    options = {"structured_outputs": {"regex": "[ab]"}, "min_new_tokens": 3}
    with pytest.raises(openai.BadRequestError, match="ruled out by grammar with min_new_tokens") as caught:
        complete(n=2, extra_body=options)
    assert caught.value.body["type"] == "invalid_request_error"
    with pytest.raises(openai.APIError, match="ruled out by grammar") as caught:
        list(complete(n=2, stream=True, extra_body=options))
    assert caught.value.body["type"] == "invalid_request_error"
    wait_until(lambda: is_free(engine))
