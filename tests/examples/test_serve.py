"""The server example answers OpenAI's own client, over a socket."""

import asyncio
import json
import re
from typing import Literal

import pydantic
import pytest
import torch
from serve_helpers import NAME, PROMPTS, chat_ids, expected, is_free, openai, serve

from llama_flex import Engine


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


def test_a_conversation_takes_as_many_tokens_as_fit_unless_told(engine, chat, client):
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


class Number(pydantic.BaseModel):
    """A number of two."""

    n: Literal[12, 345]


def test_texts_conform_to_what_the_client_asks_for(client, chat, complete):
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
    asked = {"model": NAME, "messages": [{"role": "user", "content": "Hi"}], "response_format": Number}
    assert client.chat.completions.parse(**asked, **options).choices[0].message.parsed.n in (12, 345)
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
