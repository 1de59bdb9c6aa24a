"""The soak's draws and judgements, against a server that is a few lines of http.server and whose faults a test sets."""

from __future__ import annotations

import json
import math
import os
import random
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

import soak
from local_server import LocalServer
from sglang_sm120_reference.write import write_checkpoint
from soak_load import (
    AT_ONCE,
    ENDS,
    EVERY,
    FIRST_LONG,
    KINDS,
    KNOWN,
    LONG,
    LONGEST,
    NEW,
    ROOM,
    TIE,
    Answer,
    Ask,
    Load,
    draw,
    drawn_length,
    problem,
    questions,
)
from training import data

STUB = Path(__file__).parents[1] / "launch/stub/serve.py"
IDLE = {
    "num_running_reqs": 0, "num_queue_reqs": 0, "num_grammar_queue_reqs": 0, "kv_used_tokens": 0, "swa_used_tokens": 0,
    "kv_available_tokens": 768, "kv_evictable_tokens": 256, "max_total_num_tokens": 1024,
    "swa_available_tokens": 512, "swa_evictable_tokens": 0, "max_total_num_tokens_swa": 512,
}  # fmt: skip
SAID = "[12:00] Gracefully exiting... Remaining number of requests {}. Remaining requests remaining_rids=[].\n"


class FakeServer:
    """Answers /generate as SGLang does; what comes depends on the prompt alone, as long as nothing is wrong.

    Attributes:
        spoil: what becomes of the answer to the request with a number, given its tokens; None breaks it off.
        gauges: its counters.
        gate: requests wait until so many were in flight at a time.
        widest: the most that were.
    """

    def __init__(self) -> None:
        self.spoil: Callable[[int, list[int]], list[int] | None] = lambda number, tokens: tokens
        self.gauges: dict[str, float] = dict(IDLE)
        self.asked = self.gate = self.widest = self._flying = 0
        self._changed = threading.Condition()
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: Any) -> None:
                pass

            def do_GET(self) -> None:
                lines = [f'sglang:{name}{{tp_rank="0"}} {float(value)}\n' for name, value in fake.gauges.items()]
                self.give("# HELP\n" + "".join(lines))

            def do_POST(self) -> None:
                sent = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or "{}")
                if not self.path.startswith("/generate"):
                    return self.give("Cache flushed.")
                with fake._changed:
                    number, fake.asked, fake._flying = fake.asked, fake.asked + 1, fake._flying + 1
                    fake.widest = max(fake.widest, fake._flying)
                    fake._changed.notify_all()
                    if not fake._changed.wait_for(lambda: fake.widest >= fake.gate, timeout=10):
                        fake.gate = 0
                try:
                    self.generate(number, sent)
                except (BrokenPipeError, ConnectionResetError):
                    pass
                with fake._changed:
                    fake._flying -= 1

            def generate(self, number: int, sent: dict[str, Any]) -> None:
                sampling = sent["sampling_params"]
                found = fake.spoil(
                    number, [(sum(sent["input_ids"]) + i) % 640 for i in range(sampling["max_new_tokens"])]
                )
                if found is None:
                    return
                replies = [reply(found[: n + 1], n + 1 == len(found), sampling) for n in range(len(found))]
                if not sent["stream"]:
                    return self.give(json.dumps(replies[-1]))
                self.give("".join(f"data: {json.dumps(one)}\n\n" for one in replies) + "data: [DONE]\n\n")

            def give(self, text: str) -> None:
                self.send_response(200)
                self.end_headers()
                self.wfile.write(text.encode())

        class Server(ThreadingHTTPServer):
            request_queue_size = 2 * AT_ONCE

        self._server = Server(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def reply(tokens: list[int], is_last: bool, sampling: dict[str, Any]) -> dict[str, Any]:
    grammar = next((name for name in ("json_schema", "regex") if name in sampling), None)
    text = {"json_schema": '{"word": " water", "last": true}', "regex": "water say 12 is 345.", None: ""}[grammar]
    meta = {
        "finish_reason": {"type": "stop" if grammar else "length"} if is_last else None, "cached_tokens": 0,
        "output_token_logprobs": [[-0.1, token, None] for token in tokens],
        "output_top_logprobs": [[[-0.1, token, None], [-3.1, 0, None]] for token in tokens],
    }  # fmt: skip
    return {"text": text, "output_ids": tokens, "meta_info": meta}


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeServer]:
    monkeypatch.setattr(soak, "LOOK_SECONDS", 0.3)
    server = FakeServer()
    yield server
    server.close()


def load_of(fake: FakeServer, seed: int, requests: int = 150, neighbours: Any = ()) -> Load:
    """A load that is over."""
    rng = random.Random(seed)
    known = questions(rng, 4)
    quiet = soak.ask_alone(fake.url, known)
    fake.gate = AT_ONCE
    load = Load(fake.url, known, quiet, 600, requests, rng, lambda: True)
    soak.under_load(SimpleNamespace(alive=lambda: True, pid=os.getpid()), load, neighbours, soak.Memory())  # type: ignore[arg-type]
    return load


def test_lengths_are_log_uniform_around_their_median(seed: int) -> None:
    rng = random.Random(seed)
    drawn = [drawn_length(rng) for _ in range(4000)]
    assert 11 <= min(drawn) and max(drawn) <= LONGEST and 135 <= statistics.median(drawn) <= 165
    # Five standard deviations of a quarter of the draws.
    least, most = math.log(min(drawn)), math.log(max(drawn))
    for quarter in range(4):
        share = sum(quarter <= 4 * (math.log(n) - least) / (most - least) <= quarter + 1 for n in drawn) / len(drawn)
        assert abs(share - 0.25) < 0.035, quarter


def test_what_is_drawn(seed: int) -> None:
    rng = random.Random(seed)
    known = questions(rng)
    assert len(known) == KNOWN + 1 and LONG - 3 * ROOM <= len(known[-1]) <= LONG
    # Every one ends where an answer begins.
    assert all(data.ASSISTANT in prompt[-4:] for prompt in known)
    asked = [draw(rng, number, known) for number in range(2000)]
    long = [number for number, ask in enumerate(asked) if len(ask.prompt) > LONGEST + ROOM]
    assert long == list(range(FIRST_LONG, 2000, EVERY))
    assert {asked[number].known for number in long} == {KNOWN, None}
    assert {(ask.kind, ask.end) for ask in asked} == {(kind, end) for kind in KINDS for end in ENDS}
    assert {ask.grammar for ask in asked if ask.kind == "structured"} == {"json_schema", "regex"}
    assert all(ask.prompt == known[ask.known] for ask in asked if ask.known is not None)
    assert {ask.after for ask in asked if ask.end == "aborted"} >= set(range(NEW))
    assert all(ask.stream for ask in asked if ask.end != "whole")
    others = [ask for ask in asked if ask.kind != "greedy" and len(ask.prompt) > 256]
    hits = sum(any(ask.prompt[:256] == prompt[:256] for prompt in known) for ask in others)
    # All but those that are longer than every greedy prompt, or by chance.
    assert 0.25 < hits / len(others) < 0.75


SAMPLED = Ask("sampled", "whole", (5,), 3, False)
GREEDY = Ask("greedy", "whole", (5,), 3, False, known=0)
QUIET = Answer([7, 8, 9], [-0.1] * 3, [3.0, TIE / 2, 3.0], finish="length")
JSON, WORD = (Ask("structured", "whole", (5,), 9, False, grammar=name) for name in ("json_schema", "regex"))


def whole(*tokens: int) -> Answer:
    return Answer(list(tokens), finish="length")


def ended(text: str) -> Answer:
    return Answer([6], text=text, finish="stop")


@pytest.mark.parametrize(
    ("ask", "answer", "words"),
    [
        (GREEDY, whole(7, 8, 9), None), (GREEDY, whole(6, 8, 9), "token 0 is 6, alone it was 7 by 3.00"),
        # Behind a tie anything may follow.
        (GREEDY, whole(7, 1, 2), None), (GREEDY, whole(7, 8), "length after 2 tokens"),
        (GREEDY._replace(end="aborted"), whole(7), None), (GREEDY._replace(end="half-closed"), whole(6), "token 0"),
        (SAMPLED, whole(1, 2, 3), None), (SAMPLED, whole(1, 2), "length after 2"), (SAMPLED, whole(1, 2, 3, 4), "4 t"),
        (SAMPLED, whole(1, 2, data.VOCAB), "outside"), (SAMPLED, ended(""), "stopped after 1 of 3"),
        (SAMPLED, Answer([1, 2, 3], finish="abort"), "abort after 3"), (SAMPLED, Answer(), "None after 0"),
        (SAMPLED._replace(end="half-closed"), Answer(), None),
        (JSON, ended('{"word": " water", "last": false}'), None), (JSON, ended('{"word": " water"}'), "not by its"),
        (JSON, ended('{"word": "x", "last": true}'), "not by its"), (JSON, ended('{"word'), "not by its"),
        (JSON, Answer([6] * 9, text='{"word', finish="length"), None),
        (WORD, ended("people is 12."), None), (WORD, ended("people is 1."), "not by its regex"),
    ],
)  # fmt: skip
def test_an_answer_is_judged(ask: Ask, answer: Answer, words: str | None) -> None:
    found = problem(ask, answer, QUIET if ask.kind == "greedy" else None)
    assert found is None if words is None else found is not None and words in found


def test_a_load_is_counted(fake: FakeServer, seed: int) -> None:
    figures = load_of(fake, seed).figures
    assert sum(figures.sent.values()) == 150 == fake.asked - 5
    assert {end for _, end in figures.sent} == set(ENDS) and figures.long == 2
    assert fake.widest == AT_ONCE
    assert not figures.wrong and not figures.lost
    assert figures.near == figures.compared > 500


def test_told_to_end_it_sends_no_more(fake: FakeServer, seed: int) -> None:
    def look(share: float) -> None:
        if fake.asked > 30:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load_of(fake, seed, 10_000, [SimpleNamespace(look=look, server=SimpleNamespace(alive=lambda: True))])
    time.sleep(1)
    asked = fake.asked
    time.sleep(0.5)
    assert 30 < asked == fake.asked


def test_one_wrong_token_is_found(fake: FakeServer, seed: int) -> None:
    is_greedy, spoilt = {}, []

    def spoil(number: int, tokens: list[int]) -> list[int]:
        # Greedy answers have NEW tokens; the first after the quiet ones that has is spoilt at its first token.
        if number > 20 and len(tokens) == NEW and not is_greedy:
            is_greedy[number] = True
            spoilt.append(number)
            return [(tokens[0] + 1) % 640, *tokens[1:]]
        return tokens

    fake.spoil = spoil
    figures = load_of(fake, seed).figures
    assert spoilt and len(figures.wrong) == 1 and "alone it was" in figures.wrong[0], figures.wrong


def test_one_lost_request_is_found(fake: FakeServer, seed: int) -> None:
    fake.spoil = lambda number, tokens: None if number == 40 else tokens
    figures = load_of(fake, seed).figures
    assert len(figures.lost) + len(figures.wrong) == 1 and sum(figures.sent.values()) + len(figures.lost) == 150


def test_an_idle_server_has_nothing_left(fake: FakeServer) -> None:
    assert soak.left_when_idle(fake.url, 0) == []


@pytest.mark.parametrize("name", [*soak.NOT_USED, "kv_available_tokens", "swa_available_tokens", "kv_evictable_tokens"])
def test_one_request_or_page_that_is_left_is_found(fake: FakeServer, name: str) -> None:
    fake.gauges[name] += 1
    [line] = soak.left_when_idle(fake.url, 0)
    assert name in line or "are free and" in line


@pytest.mark.parametrize(
    ("log", "words"),
    [
        (SAID.format(0), None), ("", "no word of its"), (SAID.format(1) + SAID.format(0), "1 then 0"),
        ("Traceback (most recent call last):\n" + SAID.format(0), "Traceback"),
        ("ValueError: pool memory leak detected! [full]\n" + SAID.format(0), "memory leak"),
    ],
)  # fmt: skip
def test_a_log_is_judged(log: str, words: str | None) -> None:
    found = soak.log_problems(log)
    assert found == [] if words is None else len(found) == 1 and words in found[0]


def test_growing_memory_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def seen(bytes_at: Callable[[float], float]) -> list[tuple[float, int]]:
        return [(i / 100, int(bytes_at(i / 100))) for i in range(101)]

    start = 4 << 30
    # While it warms up it may grow, and later it may come and go.
    flat = seen(lambda share: start * (0.5 if share < soak.WARM else 1 + 0.1 * (int(share * 100) % 2)))
    grown = seen(lambda share: start * (1 + 0.08 * share))
    assert soak.Memory(flat).problems() == []
    assert "host grew from 4" in soak.Memory(grown).problems()[0]
    assert "needed more" in soak.Memory(flat[:20]).problems()[0]
    monkeypatch.setattr(soak.torch.cuda, "is_available", lambda: True)
    assert "GPU grew" in soak.Memory(flat, grown).problems()[0] and soak.Memory(flat, flat).problems() == []


def test_a_whole_soak(fake: FakeServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    """Its exit code, its table and soak.json; 1 where a greedy prompt is answered otherwise at the end, or a server
    stops or answers no more."""

    class Server:
        last = math.inf

        def __init__(self, _: Path, *flags: str, log: Path, **__: Any) -> None:
            self.url, self.log, self.pid = fake.url, log, os.getpid()

        def alive(self) -> bool:
            return fake.asked < self.last

        def log_tail(self) -> str:
            return "last words"

        def __enter__(self) -> Server:
            return self

        def __exit__(self, *_: Any) -> None:
            pass

        def stop(self, seconds: float) -> None:
            self.log.write_text(SAID.format(0))

        def require_step(self, modes: Any) -> None:
            pass

    monkeypatch.setattr(soak, "LocalServer", Server)
    monkeypatch.setattr(soak, "questions", lambda rng: questions(rng, 4))
    monkeypatch.setattr(soak.Neighbour, "look", lambda *_: None)
    monkeypatch.setattr(soak.Neighbour, "problem", lambda _: None)
    monkeypatch.setattr(soak.Memory, "problems", lambda _: [])
    assert soak.soak(tmp_path, tmp_path, 600, 60, False, 0) == 0, capsys.readouterr().out
    assert "nothing was left over" in capsys.readouterr().out
    told = json.loads((tmp_path / "soak.json").read_text())
    assert sum(told["sent"].values()) == 60 and told["problems"] == []
    last = fake.asked * 2 - 1
    fake.spoil = lambda number, tokens: tokens if number < last else [(token + 1) % 640 for token in tokens]
    assert soak.soak(tmp_path, tmp_path, 600, 60, False, 0) == 1
    assert "PROBLEM: alone again, prompt 4 is answered otherwise" in capsys.readouterr().out
    fake.spoil = lambda number, tokens: tokens
    Server.last = fake.asked + 25
    assert soak.soak(tmp_path, tmp_path, 600, 60, False, 0) == 1
    assert "PROBLEM: the server stopped;" in (said := capsys.readouterr().out) and "last words" in said
    Server.last = math.inf
    fake.spoil = lambda number, tokens: None if number > 300 else tokens
    fake.asked = 300 - 5 - 60
    assert soak.soak(tmp_path, tmp_path, 600, 60, False, 0) == 1
    assert "PROBLEM: the server answers no more" in (said := capsys.readouterr().out) and "last words" in said


def test_the_launcher_notices_its_neighbours_end(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With the launcher's stand-in for SGLang; a server that goes on, or that had ended before, is a problem."""
    monkeypatch.setattr(soak, "STALL_SECONDS", 2)
    checkpoint = write_checkpoint(tmp_path / "small")
    launcher = (str(STUB), *soak.launcher(checkpoint)[2:])
    with LocalServer(checkpoint, log=tmp_path / "frozen.log", launcher=launcher) as server:
        while "evidence for" not in server.log.read_text():
            assert server.alive(), server.log_tail()
            time.sleep(0.1)
        neighbour = soak.Neighbour(server, "frozen", 0.1)
        neighbour.look(0.05)
        assert "had ended before" in str(neighbour.problem(0))
        neighbour.look(0.1)
        assert "still runs after 0 s" in str(neighbour.problem(0))
        assert neighbour.problem(40) is None
        # Its sentence is of a server that makes no token, and what is left is counted.
        assert "ended with 1, left 0" in str(soak.Neighbour(server, "killed", 0.1, neighbour.tree).problem(0))
        assert "left 1 processes" in str(soak.Neighbour(server, "frozen", 0.1, [psutil.Process()]).problem(0))


def test_misuse(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert soak.main([str(tmp_path / "none"), "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("make soak: ")
    with pytest.raises(SystemExit, match="2"):
        soak.main([str(tmp_path), "--seconds", "0"])
    assert "--seconds is 0.0, needed more than 0" in capsys.readouterr().err
