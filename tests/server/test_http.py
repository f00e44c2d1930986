"""A server of OpenAI's API: its answers are those of `generate` and `score`."""

import concurrent.futures
import json

import numpy as np
import pytest
from server.http_served import Running, wait_until

import jaxkv
from jaxkv import Categorical
from jaxkv.text.chat import encode_chat

openai = pytest.importorskip("openai")
for package in ("starlette", "uvicorn", "prometheus_client"):
    pytest.importorskip(package)

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "What is that?"}]},
]
SPOKEN = [MESSAGES[0], {"role": "user", "content": "What is that?"}]


@pytest.fixture(scope="module")
def served(wide_lm):
    with Running(wide_lm, engine={"top_logprobs": 2}, top_logprobs=2, queue=6) as it:
        yield it


@pytest.fixture(scope="module")
def client(served):
    with openai.OpenAI(base_url=served.url, api_key="any", max_retries=0) as made:
        yield made


def generated(lm, prompts, seed=0, tokens=32, **options):
    """Return what `generate` gives each prompt alone, by the API's usual sampler."""
    options = {"sampler": Categorical(), **options}
    seeds = [seed] * len(prompts) if isinstance(seed, int) else seed
    return jaxkv.generate(lm, prompts, seed=seeds, max_new_tokens=tokens, **options)


def test_a_chat_is_that_of_generate(client, wide_lm):
    answer = client.chat.completions.create(
        model="tiny", messages=MESSAGES, seed=5, n=2, max_completion_tokens=20
    )
    ids = encode_chat(wide_lm, SPOKEN)
    out = generated(wide_lm, [ids, ids], seed=[5, 6], tokens=20)
    assert [c.message.content for c in answer.choices] == list(out.text)
    assert [c.index for c in answer.choices] == [0, 1]
    assert [c.finish_reason for c in answer.choices] == list(out.finish_reason)
    assert answer.usage.prompt_tokens == len(ids)
    assert answer.usage.completion_tokens == sum(out.lengths)
    assert answer.model == "tiny" and answer.object == "chat.completion"


def test_completions_take_texts_and_ids(client, wide_lm):
    text = "one two three"
    ids = wide_lm.tokenizer(text)["input_ids"]
    greedy = dict(model="tiny", temperature=0, max_tokens=9)
    out = generated(wide_lm, [ids, [7, 8]], tokens=9, sampler=jaxkv.Greedy())
    of_ids = client.completions.create(prompt=[ids, [7, 8]], **greedy)
    assert [choice.text for choice in of_ids.choices] == list(out.text)
    for prompt in (text, [text], ids):
        one = client.completions.create(prompt=prompt, echo=True, **greedy)
        assert one.choices[0].text == text + out.text[0]
    drawn = client.completions.create(model="tiny", prompt=text, seed=2**63 - 1)
    assert drawn.usage.completion_tokens == 16  # as the API has it
    given = client.completions.create(
        prompt=text, echo=True, **greedy | {"max_tokens": 0}
    )
    assert given.choices[0].text == text
    assert given.usage.completion_tokens == 0


@pytest.mark.parametrize("chat", [True, False])
def test_a_stream_is_the_whole_in_pieces(client, chat):
    create = (client.chat.completions if chat else client.completions).create
    said = {"messages": MESSAGES} if chat else {"prompt": ["a", "b c"]}
    asked = dict(model="tiny", seed=3, n=2, max_tokens=20, **said)
    whole = create(**asked)
    chunks = list(create(stream=True, stream_options={"include_usage": True}, **asked))
    texts = [""] * len(whole.choices)
    reasons = {}
    for chunk in chunks[:-1]:
        (choice,) = chunk.choices
        texts[choice.index] += (choice.delta.content or "") if chat else choice.text
        if choice.finish_reason:
            reasons[choice.index] = choice.finish_reason
    wanted = [c.message.content if chat else c.text for c in whole.choices]
    assert texts == wanted
    assert len(set(wanted)) == len(wanted)
    assert reasons == {c.index: c.finish_reason for c in whole.choices}
    assert chunks[-1].usage == whole.usage and chunks[-1].choices == []
    assert len({chunk.id for chunk in chunks}) == 1
    assert len(chunks) > 2 * len(wanted)  # it came in pieces


def test_a_stop_string_ends_an_answer_where_it_begins(client, served):
    asked = dict(model="tiny", prompt="x", seed=1, max_tokens=32)
    (whole,) = client.completions.create(**asked).choices
    stop = whole.text[20:24]  # across tokens, wherever they end
    at = whole.text.index(stop)
    for stops in (stop, ["never there", stop]):
        cut = client.completions.create(stop=stops, **asked)
        assert cut.choices[0].text == whole.text[:at]
        assert cut.choices[0].finish_reason == "stop"
        assert 0 < cut.usage.completion_tokens < 32
        parts = client.completions.create(stop=stops, stream=True, **asked)
        assert "".join(c.choices[0].text for c in parts) == whole.text[:at]
    never = client.completions.create(stop=["never there"], **asked)
    assert never.choices[0] == whole
    wait_until(lambda: served.service.worker.taken == 0)


def test_logprobs_are_those_of_generate_and_score(client, wide_lm):
    ids = [5, 6, 7, 9, 11, 300]
    asked = dict(model="tiny", prompt=ids, temperature=0, max_tokens=7)
    answer = client.completions.create(logprobs=2, echo=True, **asked)
    noted = answer.choices[0].logprobs
    out = generated(wide_lm, [ids], tokens=7, sampler=jaxkv.Greedy(), top_logprobs=2)
    scores = jaxkv.score(wide_lm, [ids[:1]], [ids[1:]])
    own, top = noted.token_logprobs, noted.top_logprobs
    assert own[0] is None and top[0] is None
    close = dict(atol=1e-4, rtol=1e-5)
    np.testing.assert_allclose(own[1 : len(ids)], scores.logprobs[0], **close)
    np.testing.assert_allclose(own[len(ids) :], out.logprobs[0], **close)
    best = [max(row.values()) for row in top[1:]]
    assert (np.array(best) >= np.array(own[1:]) - 1e-6).all()
    np.testing.assert_allclose(best[len(ids) - 1 :], out.logprobs[0], **close)  # greedy
    assert len(noted.tokens) == len(noted.text_offset) == len(own) == 13
    parts = client.completions.create(logprobs=2, echo=True, stream=True, **asked)
    rows = [c.choices[0].logprobs for c in parts if c.choices[0].logprobs]
    assert [x for row in rows for x in row.token_logprobs] == own
    assert [x for row in rows for x in row.text_offset] == noted.text_offset


def test_logprobs_of_chats(client, wide_lm):
    answer = client.chat.completions.create(
        model="tiny", messages=MESSAGES, temperature=0, max_tokens=5,
        logprobs=True, top_logprobs=1,
    )  # fmt: skip
    out = generated(
        wide_lm, [encode_chat(wide_lm, SPOKEN)], tokens=5, sampler=jaxkv.Greedy(),
        logprobs=True,
    )  # fmt: skip
    content = answer.choices[0].logprobs.content
    assert [row.logprob for row in content] == pytest.approx(out.logprobs[0], abs=1e-4)
    assert all(row.top_logprobs[0].token == row.token for row in content)
    assert all(bytes(row.bytes).decode() == row.token for row in content)


CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "x"}]}
TEXT = {"model": "tiny", "prompt": "x"}
REFUSED = {  # status, what is told, its field, and the request
    "model": (404, "no model of this name", "model", TEXT | {"model": "else"}),
    "no model": (400, "model: Field required", "model", {"prompt": "x"}),
    "no prompt": (400, "prompt: Field required", "prompt", {"model": "tiny"}),
    "empty": (400, "prompt 0 is empty", "prompt", TEXT | {"prompt": ""}),
    "none": (400, "between 1 and 8", "prompt", TEXT | {"prompt": []}),
    "ids": (400, "token ids outside", "prompt", TEXT | {"prompt": [10**6]}),
    "long": (400, "have 128 tokens", "prompt", TEXT | {"prompt": [5] * 129}),
    "output": (400, "at most 32", "max_tokens", TEXT | {"max_tokens": 33}),
    "nothing": (400, "goes with echo", "max_tokens", TEXT | {"max_tokens": 0}),
    "many": (400, "between 1 and 8", "prompt", TEXT | {"n": 9}),
    "many chats": (400, "between 1 and 8", "n", CHAT | {"n": 9}),
    "best": (400, "best_of must be n", "best_of", TEXT | {"best_of": 2}),
    "alternatives": (400, "notes 2 alternatives", "logprobs", TEXT | {"logprobs": 3}),
    "alone": (400, "nothing without", "top_logprobs", CHAT | {"top_logprobs": 1}),
    "penalty": (
        *(400, "--repetition-penalties", "repetition_penalty"),
        TEXT | {"repetition_penalty": 2},
    ),
    "budget": (400, "has no budget", "budget", TEXT | {"budget": 9}),
    "tools": (400, "tools is not supported", "tools", CHAT | {"tools": [{}]}),
    "format": (
        *(400, "response_format.type", "response_format"),
        CHAT | {"response_format": {"type": "json_object"}},
    ),
    "role": (400, "messages.0.role", "messages", CHAT | {"messages": [{"role": "me"}]}),
    "image": (
        *(400, "messages.0.content", "messages"),
        CHAT | {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
    ),
    "call": (
        *(400, "tool_calls is not supported", "tool_calls"),
        CHAT | {"messages": [{"role": "user", "content": "", "tool_calls": [1]}]},
    ),
    "no messages": (400, "at least 1 item", "messages", CHAT | {"messages": []}),
    "hot": (400, "temperature", "temperature", TEXT | {"temperature": -1}),
    "stops": (400, "stop", "stop", TEXT | {"stop": ["a", ""]}),
}


@pytest.mark.parametrize(
    ("status", "said", "param", "body"), REFUSED.values(), ids=REFUSED
)
def test_refusals_name_what_is_wrong(served, status, said, param, body):
    path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    got, answer = served.ask(path, body)
    error = json.loads(answer)["error"]
    assert (got, error["param"]) == (status, param), error
    assert said in error["message"]
    assert error["type"] == "invalid_request_error"


def test_a_model_without_template_has_no_chats(served):
    tokenizer = served.service._lm.tokenizer
    template, tokenizer.chat_template = tokenizer.chat_template, None
    status, answer = served.ask("/v1/chat/completions", CHAT)
    tokenizer.chat_template = template
    assert status == 400 and b"no chat template; ask /v1/completions" in answer


def test_what_asks_for_nothing_is_taken(served):
    spoken = {"role": "assistant", "content": "y", "refusal": None, "tool_calls": None}
    body = CHAT | {
        "messages": [spoken, *CHAT["messages"]],
        **{"tools": [], "logit_bias": {}, "frequency_penalty": 0, "user": "me"},
        **{"n": None, "stop": None, "stream_options": {"include_usage": None}},
        **{"response_format": {"type": "text"}, "max_tokens": 1},
    }
    assert served.ask("/v1/chat/completions", body)[0] == 200


def test_errors_are_those_of_the_client(client):
    with pytest.raises(openai.NotFoundError, match="no model of this name") as missing:
        client.chat.completions.create(**CHAT | {"model": "else"})
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="128 tokens") as long:
        client.completions.create(model="tiny", prompt=[5] * 200)
    assert long.value.code == "context_length_exceeded"


def test_a_full_server_says_so_and_goes_on(client, served):
    with served.slowly():
        stream = client.completions.create(**TEXT, n=8, max_tokens=32, stream=True)
        with pytest.raises(openai.RateLimitError, match="full") as full:
            client.completions.create(**TEXT)
        assert full.value.response.headers["retry-after"]
        # Echoes take a place, too.
        with pytest.raises(openai.RateLimitError):
            client.completions.create(**TEXT, echo=True, logprobs=1, max_tokens=0)
        stream.close()  # and the rows of a client that has gone are free
    wait_until(lambda: served.service.worker.taken == 0)
    assert client.completions.create(**TEXT).usage.completion_tokens == 16


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_row_within_a_block(served, stream):
    ended = []
    step = served.engine.step
    with served.slowly(0.02):
        slow = served.engine.step

        def watched():
            events = slow()
            ended.extend(e.result for e in events if e.result is not None)
            return events

        served.engine.step = watched
        body = json.dumps(TEXT | {"max_tokens": 32, "stream": stream}).encode()
        head = (
            "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        connection = served.connect()
        connection.sendall(head.encode() + body)
        wait_until(lambda: served.engine.running == 1)
        ((_, before),) = served.engine._places.live()
        connection.close()
        wait_until(lambda: ended)
    assert served.engine.step.__func__ is step.__func__
    (result,) = ended
    assert result.finish_reason == "cancelled"
    assert len(before.tokens) <= 4 * 4 < 32
    wait_until(lambda: served.service.worker.taken == 0)


def test_many_clients_get_each_their_own(served, wide_lm):
    """The short form of `benchmarks/serve_stress.py`."""
    prompts = [[5 + number, 6, 7 + number % 3] for number in range(24)]
    out = generated(wide_lm, prompts, seed=list(range(24)), tokens=12)

    def one(number):
        body = TEXT | {"prompt": prompts[number], "seed": number, "max_tokens": 12}
        for _ in range(400):
            status, answer = served.ask("/v1/completions", body)
            if status != 429:
                assert status == 200
                return json.loads(answer)["choices"][0]["text"]
        raise AssertionError("full for ever")

    with concurrent.futures.ThreadPoolExecutor(12) as clients:
        texts = list(clients.map(one, range(24)))
    assert texts == list(out.text)
    assert len(set(texts)) == 24
    wait_until(lambda: served.service.worker.taken == 0)
    assert served.service.worker._groups == {} and served.engine.idle


def test_models_health_and_metrics(served, client):
    (model,) = client.models.list()
    assert model.id == "tiny" and client.models.retrieve("tiny") == model
    with pytest.raises(openai.NotFoundError, match="no model"):
        client.models.retrieve("other")
    assert served.ask("/health") == (200, b'{"status":"ok"}')
    counted = read_metrics(served)
    client.completions.create(**TEXT, max_tokens=5)
    served.ask("/v1/nowhere")
    after = read_metrics(served)

    def more(name):
        return after[name] - counted.get(name, 0)

    assert more('jaxkv_requests_total{route="/v1/completions",status="200"}') == 1
    assert more('jaxkv_requests_total{route="other",status="404"}') == 1
    assert more('jaxkv_tokens_total{kind="answer"}') == 5
    assert more("jaxkv_first_token_seconds_count") == 1
    assert more("jaxkv_between_tokens_seconds_count") == 1
    assert after["jaxkv_rows"] == 2 and after["jaxkv_requests_waiting"] == 0


def read_metrics(served):
    lines = served.ask("/metrics")[1].decode().splitlines()
    pairs = [line.rsplit(" ", 1) for line in lines if not line.startswith("#")]
    return {name: float(value) for name, value in pairs}
