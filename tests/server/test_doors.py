"""What a server lets in, what it says of all else, and how it ends."""

import json
import random
import time

import pytest
from server.http_served import Running, wait_until

for package in ("starlette", "uvicorn", "prometheus_client"):
    pytest.importorskip(package)

KEY = "a-key-of-ours-\N{LATIN SMALL LETTER E WITH ACUTE}"
TEXT = {"model": "tiny", "prompt": "x"}
PATHS = ("/v1/completions", "/v1/chat/completions")


@pytest.fixture(scope="module")
def strict(wide_lm):
    """A server with a key and little patience."""
    terms = dict(key=KEY, max_body=4000, body_seconds=0.3, queue=20)
    hosts = frozenset({"localhost", "127.0.0.1"})
    with Running(wide_lm, hosts=hosts, **terms) as it:
        yield it


@pytest.fixture
def ask(strict):
    """Ask with the key."""
    key = f"Bearer {KEY}".encode()
    return lambda *args, **more: strict.ask(*args, **{"Authorization": key} | more)


def told(answer):
    status, body = answer
    return status, json.loads(body)["error"]["message"]


def test_a_key_is_wanted_everywhere_but_for_health(strict, ask):
    assert ask("/v1/models")[0] == 200
    assert strict.ask("/health")[0] == 200
    assert ask("/health", Host="evil.example")[0] == 400
    bad = [
        "",
        "Bearer",
        "Bearer x",
        f"Basic {KEY}",
        f"Bearer {KEY}x",
        f"Bearer {KEY[:-1]}",
    ]
    for given in bad:
        for path in ("/v1/models", "/metrics", "/nowhere"):
            header = {"Authorization": given.encode()} if given else {}
            assert told(strict.ask(path, **header)) == (
                401,
                "Incorrect API key provided.",
            )


def test_keys_are_compared_in_constant_time(strict, ask, monkeypatch):
    from jaxkv.server import gate

    compared = []

    def compare(a, b):
        compared.append((len(a), len(b)))
        return True

    monkeypatch.setattr(gate.hmac, "compare_digest", compare)
    assert strict.ask("/v1/models", Authorization="Bearer nothing like it")[0] == 200
    assert compared == [(32, 32)]


def test_a_page_of_another_site_is_kept_out(ask):
    for host in (
        "evil.example",
        "evil.example:80",
        "",
        "127.0.0.1.evil.example",
        "[::1",
    ):
        status, said = told(ask("/v1/completions", TEXT, Host=host))
        assert status == 400 and "header Host" in said
    assert ask("/v1/models", Host="LOCALHOST:1")[0] == 200
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        status, said = told(ask("/v1/completions", TEXT, **{"Content-Type": kind}))
        assert status == 415 and "application/json" in said


def test_long_bodies_get_413(strict, ask):
    status, said = told(ask("/v1/completions", TEXT | {"prompt": "y" * 4000}))
    assert (status, said) == (413, "The body has more than 4000 bytes.")
    # One that does not say its length is counted.
    chunk = b"1000\r\n" + b" " * 4096 + b"\r\n"
    data = request(b"", {"Transfer-Encoding": "chunked"}) + chunk
    assert b" 413 " in strict.send(data)
    assert b" 413 " in strict.send(request(b"", {"Content-Length": "9" * 15}))


def test_slow_bodies_get_408_and_silent_connections_nothing(strict):
    begun = time.monotonic()
    slow = strict.send(request(b'{"model', {"Content-Length": "100"}))
    assert b" 408 " in slow and b"longer than 0.3 seconds" in slow
    for silent in (b"", b"POST /v1/comp", b"POST / HTTP/1.1\r\nHost: localhost\r\nX: "):
        assert strict.send(silent) == b""
    assert time.monotonic() - begun < 10


def request(body, headers, path=PATHS[0]):
    """Return a request with the key, as bytes."""
    usual = {"Host": "localhost", "Content-Type": "application/json"}
    usual |= {"Authorization": f"Bearer {KEY}", "Connection": "close"}
    if "Transfer-Encoding" not in headers:
        usual["Content-Length"] = str(len(body))
    lines = [
        f"POST {path} HTTP/1.1",
        *(f"{n}: {x}" for n, x in (usual | headers).items()),
    ]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


VALUES = [
    *(None, True, -1, 0, 2**31, 2**63, 10**400, 1e308, -1e-320, "", "x" * 999, [], {}),
    *([[]], [None], ["a", 1], {"a": {}}, [[[1]]], [1, "a"], "\ud800", "\0", [-1], 0.5),
]
RAW = [
    b"1e999",
    b"NaN",
    b"-Infinity",
    b"00",
    b'"\xff"',
    b'"\\ud800"',
    b"[" * 900,
    b"//",
]
FIELDS = [
    *("model", "prompt", "messages", "n", "seed", "stop", "stream", "temperature"),
    *("max_tokens", "stream_options", "echo", "logprobs", "top_p", "budget", "nothing"),
    *("response_format", "tools", "top_logprobs", "best_of", "top_k", "min_p"),
]


def malformed(rng):
    """Return a path, a body that is seldom right, and headers."""
    chat = rng.random() < 0.5
    good = {"model": "tiny", "max_tokens": 1}
    good |= (
        {"messages": [{"role": "user", "content": "x"}]} if chat else {"prompt": "x"}
    )
    headers = {}
    if rng.random() < 0.7:
        if chat and rng.random() < 0.4:
            good["messages"][0][rng.choice(["role", "content", "x"])] = rng.choice(
                VALUES
            )
        else:
            good[rng.choice(FIELDS)] = rng.choice(VALUES)
    body = json.dumps(good).encode()
    kind = rng.randrange(6)
    if kind == 0:
        body = body[: rng.randrange(len(body))]
    elif kind == 1:
        at = rng.randrange(len(body))
        body = body[:at] + rng.randbytes(rng.randrange(1, 5)) + body[at + 1 :]
    elif kind == 2:
        body = body.replace(b"1", rng.choice(RAW), 1)
    elif kind == 3:
        bad = {
            "Content-Type": "a\xffb",
            "Content-Length": rng.choice(["-1", "x", "3, 4"]),
        }
        bad |= {"Expect": "nothing", "Host": "\x01", "Transfer-Encoding": "gzip"}
        bad |= {"X" * 99: "y" * 9, "Content-Encoding": "br", "Upgrade": "websocket"}
        name = rng.choice(list(bad))
        headers[name] = bad[name]
    return PATHS[chat], body, headers


def test_a_thousand_malformed_requests(strict, ask, caplog):
    rng = random.Random(0)
    counts = {}
    for _ in range(1000):
        path, body, headers = malformed(rng)
        answer = strict.send(request(body, headers, path))
        status = answer[9:12].decode() or "closed"
        counts[status] = counts.get(status, 0) + 1
        assert status in ("200", "400", "404", "408", "413", "415", "closed"), (
            status, path, body, headers, answer,
        )  # fmt: skip
    assert counts["400"] > 400 and counts["200"] > 50 and counts.get("closed", 0) < 100
    assert caplog.text == ""
    assert ask("/v1/completions", TEXT)[0] == 200
    wait_until(lambda: strict.service.worker.taken == 0)


SECRET = "do-not-tell-of-/etc/passwd"


def test_a_fault_of_ours_says_nothing_of_itself(wide_lm, caplog):
    with Running(wide_lm, seconds=60) as served:

        def broken(*_):
            raise RuntimeError(SECRET)

        served.service._lm.tokenizer  # noqa: B018 -- what is made once is there
        encode, served.service._words = served.service._words, broken
        assert told(served.ask(PATHS[0], TEXT)) == (
            500,
            "The server failed at this request.",
        )
        served.service._words = encode
        # One that fails leaves the next alone.
        board = served.engine._board
        place, board.place = board.place, broken
        assert told(served.ask(PATHS[0], TEXT))[0] == 500
        status, answer = served.ask(PATHS[0], TEXT | {"stream": True})
        assert status == 200 and b'"status"' not in answer
        assert json.loads(answer.split(b"data: ")[1])["error"]["type"] == "server_error"
        assert b"[DONE]" not in answer
        board.place = place
        assert served.ask(PATHS[0], TEXT)[0] == 200
        # Where the loop itself fails, nobody waits for ever.
        served.engine.step = broken
        assert served.ask(PATHS[0], TEXT)[0] == 503
        assert served.ask("/health")[0] == 503
        assert served.ask(PATHS[0], TEXT)[0] == 503
    assert SECRET not in caplog.text and "Traceback" not in caplog.text
    assert caplog.text.count("RuntimeError") == 2  # of a request, and of the loop
    assert "FailedError" in caplog.text


def test_time_is_bounded(wide_lm):
    with Running(wide_lm, seconds=0.4) as served, served.slowly(0.15):
        said = told(served.ask(PATHS[0], TEXT | {"max_tokens": 32}))
        assert said == (408, "The request took longer than this server allows.")
        wait_until(lambda: served.service.worker.taken == 0)
        status, answer = served.ask(PATHS[0], TEXT | {"max_tokens": 32, "stream": True})
        assert status == 200
        assert json.loads(answer.split(b"data: ")[-1])["error"]["type"] == "timeout"
        wait_until(lambda: served.service.worker.taken == 0)


def test_a_signal_ends_what_runs_and_refuses_the_rest(wide_lm):
    with Running(wide_lm) as served, served.slowly(0.05):
        waiting = served.connect()
        body = json.dumps(TEXT | {"max_tokens": 32, "seed": 1}).encode()
        waiting.sendall(request(body, {}))
        wait_until(lambda: served.engine.running)
        served.stop()
        wait_until(lambda: served.service.stopping)
        assert told(served.ask(PATHS[0], TEXT))[0] == 503
        assert served.ask("/health")[0] == 503
        answer = b""
        while part := waiting.recv(65536):
            answer += part
        assert (
            json.loads(answer.split(b"\r\n\r\n")[1])["usage"]["completion_tokens"] == 32
        )
        served.thread.join(60)
        assert not served.thread.is_alive()
        with pytest.raises(OSError, match=r"refused|reset"):
            served.ask("/health")


def test_grace_ends(wide_lm):
    with Running(wide_lm, grace=0.2) as served, served.slowly(0.3):
        waiting = served.connect()
        waiting.sendall(request(json.dumps(TEXT | {"max_tokens": 32}).encode(), {}))
        wait_until(lambda: served.engine.running)
        served.stop()
        assert b" 503 " in waiting.recv(65536)


def test_a_second_signal_does_not_wait(wide_lm):
    with Running(wide_lm) as served, served.slowly(0.3):
        waiting = served.connect()
        waiting.sendall(request(json.dumps(TEXT | {"max_tokens": 32}).encode(), {}))
        wait_until(lambda: served.engine.running)
        begun = time.monotonic()
        served.stop()
        served.server.handle_exit(2, None)
        served.thread.join(60)
        assert time.monotonic() - begun < 2.4 < 8 * 0.3 + 1
