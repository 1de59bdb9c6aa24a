"""The accuracy harness against a server whose faults are scripted: it must find each, exactly where it is.

SGLang's own test tools run against it too.
"""

from __future__ import annotations

import importlib.metadata
import json
import re
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_server import Calls, Fake
from hypothesis import given
from hypothesis import strategies as st

import cookbook
import needles
import synthetic
import tools
from accuracy import main
from client import Call, Client, Reply, ServerGone
from intervals import floor_for, wilson
from report import Row, exit_code, same_json, table

ROOT = Path(__file__).parents[2]
LENGTHS = "--lengths=1K,4K"


@pytest.fixture
def fake() -> Iterator[Fake]:
    server = Fake()
    yield server
    server.close()


class Result:
    """What a run of the harness came to: exit code, text, JSON file."""

    def __init__(self, code: int, out: str, err: str, file: Path) -> None:
        self.code, self.out, self.err = code, out, err
        self.json: Any = json.loads(file.read_text()) if file.exists() else None

    def named(self, verdict: str) -> set[str]:
        return {row["name"] for row in self.json["rows"] if row["verdict"] == verdict}

    def sentence(self) -> str:
        """The one line of a misuse; nothing was printed or written beside it."""
        assert self.code == 2 and self.json is None and self.out == ""
        lines = [line for line in self.err.splitlines() if line.startswith("make accuracy: ")]
        assert len(lines) == 1
        return lines[0]


@pytest.fixture
def judge(fake: Fake, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """Runs the harness on the fake server in this process."""

    def run(*words: str, url: str | None = None) -> Result:
        file = tmp_path / "result.json"
        code = main([url or fake.url, *words, f"--out={file}"])
        out, err = capsys.readouterr()
        return Result(code, out, err, file)

    return run


def cells(lengths: list[int], concurrency: list[int]) -> set[str]:
    return {needles._name(n, depth, width) for n in lengths for width in concurrency for depth in needles.DEPTHS}


def test_a_server_that_is_always_right_passes(fake: Fake, judge: Callable[..., Result]):
    result = judge("--only=json,tools,needle", LENGTHS, url=fake.url + "/v1/")
    assert result.code == 0, result.out
    assert result.named("pass") == cells([1024, 4096], [1, 8, 16]) | {"JSON only", "tool calls"}
    assert "32 passed, 0 failed, 0 not run" in result.out and result.json["complete"]
    for row in result.json["rows"]:
        if row["suite"] == "needle":
            asked = 4096 if row["name"].startswith("4K") else 1024
            room = asked - needles.ANSWER_TOKENS
            assert all(needles.CLOSE * room <= count <= room for count in row["detail"]["prompt_tokens"])
            assert row["total"] >= 2
    assert len(tools.CASES) == 15 and len(result.json["rows"][1]["detail"]["cases"]) == 15


def test_the_file_says_what_was_measured(judge: Callable[..., Result]):
    found = judge("--only=json").json
    lock = json.loads((ROOT / "overlay/sglang_sm120/sglang.lock").read_text())
    assert found["lock"]["sglang"] == lock["sglang"] and re.fullmatch("[0-9a-f]{64}", found["lock"]["sha256"])
    assert {"op": "sparse_mla", "provider": "torch"}.items() <= next(
        row for row in found["providers"] if row["op"] == "sparse_mla" and row["provider"] == "torch"
    ).items()
    assert sum(row["chosen"] for row in found["providers"]) == len({row["op"] for row in found["providers"]})
    assert found["machine"]["name"] and found["machine"]["cpus"] > 0
    assert found["local"] and found["model"] == "fake" and found["server"]["context"] == 1 << 20


def test_lost_far_needles_fail_exactly_those_cells(fake: Fake, judge: Callable[..., Result]):
    """The commonest defect: fluent, short prompts right, recall lost beyond a distance."""
    fake.reach = 2_500
    result = judge("--only=needle", LENGTHS, "--concurrency=1,8")
    lost = {needles._name(4096, depth, width) for depth in (0.0, 0.25) for width in (1, 8)}
    assert result.code == 1 and result.named("FAIL") == lost
    assert result.named("pass") == cells([1024, 4096], [1, 8]) - lost
    assert "0/2 FAIL" in result.out and "perhaps 1234567" in result.out


def test_a_wrong_key_is_no_recall(fake: Fake, judge: Callable[..., Result]):
    """One digit off, or the right key after a wrong one."""
    for text in (lambda t: re.sub(r"\d{7}", lambda m: str(int(m[0]) ^ 1), t), lambda t: "1111111? " + t):
        fake.text = text
        result = judge("--only=needle", "--lengths=1K", "--concurrency=1")
        assert result.code == 1 and result.named("FAIL") == cells([1024], [1])


def test_a_short_context_is_not_run_and_never_passed(fake: Fake, judge: Callable[..., Result]):
    fake.context = 2048
    result = judge("--only=needle", LENGTHS, "--concurrency=1,8")
    assert result.code == 0 and result.named("pass") == cells([1024], [1, 8])
    assert result.named("not run") == cells([4096], [1, 8])
    assert "10 passed, 0 failed, 10 not run" in result.out and "context is 2048 tokens" in result.out
    for row in result.json["rows"]:
        if row["verdict"] == "not run":
            assert (row["right"], row["total"], row["score"]) == (0, 0, None) and "2048" in row["not_run"]


def test_no_context_for_any_needle(fake: Fake, judge: Callable[..., Result]):
    fake.context = 1000
    assert "context is 1000 tokens" in judge("--only=needle", LENGTHS).sentence()
    assert "No needle prompt of 60 tokens" in judge("--only=json,needle", "--lengths=60,4K").sentence()


def test_a_quick_run_says_what_it_left_out(judge: Callable[..., Result]):
    result = judge("--only=needle", "--quick", "--lengths=1K,64K", "--concurrency=1")
    assert result.code == 0 and result.named("not run") == cells([65536], [1])


def test_as_many_requests_are_in_flight_as_asked(fake: Fake, judge: Callable[..., Result]):
    for width in (3, 16):
        fake.widest, fake.gate = 0, width
        assert judge("--only=needle", "--lengths=1K", f"--concurrency={width}", "--repeats=1").code == 0
        assert fake.widest == width


def test_only_unrun_rows_do_not_pass():
    assert exit_code([Row("needle", "a", not_run="why")]) == 1 == exit_code([])
    assert exit_code([Row("x", "a", 1, 1)]) == 0 and exit_code([Row("x", "a", 1, 1), Row("x", "b", 0, 1)]) == 1


def test_without_tokenize_the_usage_counts(fake: Fake, judge: Callable[..., Result]):
    fake.tokenizes = False
    result = judge("--only=needle", "--lengths=4K", "--concurrency=1")
    assert result.code == 0
    for row in result.json["rows"]:
        assert all(0.93 * 4096 < count <= 4096 for count in row["detail"]["prompt_tokens"])


@pytest.mark.parametrize(
    "text",
    [
        lambda text: f"Here is the JSON you asked for: {text}",
        lambda text: f"```json\n{text}\n```",
        lambda text: f"{text}\nI hope that this helps.",
        lambda text: text.replace('"', "'"),
    ],
)
def test_json_in_prose_is_not_json_only(text: Callable[[str], str], fake: Fake, judge: Callable[..., Result]):
    fake.text = text
    result = judge("--only=json,tools")
    assert result.code == 1 and result.named("FAIL") == {"JSON only"} and result.named("pass") == {"tool calls"}
    assert "not JSON only" in result.out


def test_another_value_is_a_wrong_answer(fake: Fake, judge: Callable[..., Result]):
    fake.text = lambda text: text.replace("1843", "1844")
    row = judge("--only=json").json["rows"][0]
    assert [wrong["case"] for wrong in row["wrong"]] == ["flat object"] and row["verdict"] == "FAIL"


CALL_FAULTS: dict[str, tuple[str, Callable[[Calls], Calls]]] = {
    "another enum": ("enum", lambda calls: [(calls[0][0], {**calls[0][1], "unit": "celsius"})]),
    "text for a number": ("numbers and booleans", lambda calls: [(calls[0][0], {**calls[0][1], "id": "4"})]),
    "one for true": ("numbers and booleans", lambda calls: [(calls[0][0], {**calls[0][1], "on": 1})]),
    "one call of two": ("parallel, one tool", lambda calls: calls[:1]),
    "the same call twice": ("parallel, two tools", lambda calls: [calls[0], calls[0]]),
    "a call too many": ("single", lambda calls: [*calls, calls[0]]),
    "a needless call": ("none needed", lambda calls: [("get_weather", {"city": "Paris"})]),
    "an optional field": ("required fields only", lambda calls: [(calls[0][0], {**calls[0][1], "date": ""})]),
    "flattened": ("nested objects", lambda calls: [(calls[0][0], {"name": "Ada Byron", "priority": "high"})]),
    "mangled characters": ("unicode", lambda calls: [(name, {"city": "æ±äº¬"}) for name, _ in calls]),
    "a lost piece of a stream": ("streaming, parallel", lambda calls: [(calls[0][0], {}), calls[1]]),
    "no call": ("no arguments", lambda calls: []),
}


@pytest.mark.parametrize("fault", CALL_FAULTS)
def test_wrong_calls_fail_that_case(fault: str, fake: Fake, judge: Callable[..., Result]):
    name, change = CALL_FAULTS[fault]
    fake.calls = lambda case, calls: change(calls) if case == name else calls
    result = judge("--only=tools")
    row = result.json["rows"][0]
    assert result.code == 1 and {case for case, right in row["detail"]["cases"].items() if not right} == {name}
    assert (row["right"], row["total"]) == (14, 15) and name in result.out
    assert judge("--only=tools", "--floor=tools=0.9").code == 0


def test_the_order_of_parallel_calls_is_free(fake: Fake, judge: Callable[..., Result]):
    fake.calls = lambda case, calls: calls[::-1]
    assert judge("--only=tools").code == 0


def test_calls_without_their_finish_reason(fake: Fake, judge: Callable[..., Result]):
    fake.finish = "stop"
    cases = judge("--only=tools").json["rows"][0]["detail"]["cases"]
    assert {name for name, right in cases.items() if right} == {"none needed", "after a result"}


def questions(folder: Path, right: int, total: int, **more: Callable[[int], Any]) -> tuple[str, dict[str, str]]:
    """A synthetic file of one task, and the answers of a server that has the first `right` of `total` right."""
    lines, answers = [], {}
    for i in range(total):
        line = {"id": str(i), "task": "recall", "distance": 100 * (i % 2), "answer": f"v{i}"}
        asked = f" key {i} ="
        ask = {"prompt": asked} if i % 2 else {"messages": [{"role": "user", "content": asked}]}
        lines.append({**line, **ask, **{name: value(i) for name, value in more.items()}})
        answers[asked] = f"v{i}" if i < right else "v"
    file = folder / "questions.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return f"--synthetic={file}", answers


def test_synthetic_scores_are_exact(fake: Fake, judge: Callable[..., Result], tmp_path: Path):
    """Against an oracle that has 18 of 20 right: as many pass, one fewer does not, at every concurrency."""
    for right, code in ((18, 0), (17, 1)):
        words, fake.answers = questions(tmp_path, right, 20, oracle=lambda i: f" v{i}\n" if i < 18 else "no")
        result = judge("--only=synthetic", words, "--concurrency=1,16")
        assert result.code == code
        for row, name in zip(result.json["rows"], ("recall x1", "recall x16"), strict=True):
            assert (row["name"], row["right"], row["total"], row["detail"]["expected"]) == (name, right, 20, 0.9)
            by_distance = row["detail"]["right_of_total_by_distance"]
            assert by_distance == {"0": [9, 10], "128": [right - 9, 10]}
            assert len(row["wrong"]) == 20 - right and row["floor"] == pytest.approx(0.895)


@pytest.mark.parametrize(("right", "verdict"), [(990, "pass"), (989, "FAIL"), (994, "pass")])
def test_recall_needs_99_percent_where_the_oracle_has_it(right: int, verdict: str):
    """1,000 questions of which the oracle has 995 right: half a point below that is 99 %."""
    asked = []
    for i in range(1000):
        question = synthetic.Question(str(i), "t", 0, "yes", "p", None, "yes" if i < 995 else "no", None, 1, None)
        asked.append((question, Reply(" yes\n" if i < right else "yes no")))
    row = synthetic._row("t x1", asked, None)
    assert (row.right, row.total, row.verdict) == (right, 1000, verdict)


@pytest.mark.parametrize(
    ("arguments", "right"), [('{"word": "small"}', 1), ('{"word": "Small"}', 0), ("{", 0), ("small", 0)]
)
def test_synthetic_tool_calls(arguments: str, right: int, tmp_path: Path):
    ask = {"messages": [{"role": "user", "content": "call small"}], "tools": list(tools.CASES[0].tools)}
    line = {"id": "1", "task": "call", "distance": 0, "answer": '[["look", {"word": "small"}]]', **ask}
    (tmp_path / "q.jsonl").write_text(json.dumps(line))
    question = synthetic.load(tmp_path / "q.jsonl")[0]
    row = synthetic._row("call x1", [(question, Reply("", (Call("look", arguments, "c"),), "tool_calls"))], None)
    assert (row.right, row.total) == (right, 1)
    row = synthetic._row("call x1", [(question, Reply(question.answer))], None)
    assert row.right == 0 and row.wrong[0]["got"] == question.answer


def test_floors_of_synthetic_tasks():
    assert [round(synthetic.floor_of(share), 4) for share in (1, 0.99, 0.98, 0.002)] == [0.995, 0.99, 0.975, 0]


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("{", "is not JSON"),
        ("[]", "needed an object"),
        ("{}", "lacks id, task, distance, answer"),
        ('{"id": "1", "task": "t", "distance": 1, "answer": "a"}', "exactly one of prompt and messages"),
        ('{"id": "1", "task": "t", "distance": "far", "answer": "a", "prompt": "p"}', "distance is 'far'"),
        ('{"id": "1", "task": "t", "distance": 1, "answer": "a", "messages": [], "tools": []}', "needs messages"),
        ("", "has no questions"),
    ],
)
def test_questions_that_are_none(line: str, sentence: str, judge: Callable[..., Result], tmp_path: Path):
    (tmp_path / "q.jsonl").write_text(line + "\n")
    assert sentence in judge("--only=synthetic", f"--synthetic={tmp_path / 'q.jsonl'}").sentence()


def test_misuse(judge: Callable[..., Result], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert "--synthetic" in judge("--only=synthetic").sentence()
    assert "cannot be read" in judge("--only=synthetic", f"--synthetic={tmp_path / 'none.jsonl'}").sentence()
    assert "No OpenAI-compatible server" in judge("--only=json", url="http://127.0.0.1:9").sentence()
    for words in (["--only=jsn"], ["--lengths=4X"], ["--floor=tools"], ["--repeats=0"]):
        with pytest.raises(SystemExit) as stop:
            judge(*words)
        assert stop.value.code == 2
        capsys.readouterr()


def test_a_server_that_goes_away(fake: Fake, judge: Callable[..., Result]):
    """What was judged before is kept, marked as not complete."""
    answered = fake.reply

    def reply(body: dict[str, Any]) -> tuple[str, Calls]:
        if "tools" in body:
            threading.Thread(target=fake.close).start()
            raise ConnectionResetError
        return answered(body)

    fake.reply = reply  # type: ignore[method-assign]
    result = judge("--only=json,tools")
    assert result.code == 1 and "stopped answering" in result.err and "1 rows" in result.err
    assert not result.json["complete"] and result.named("pass") == {"JSON only"}


def test_missing_questions_are_one_sentence(
    judge: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(cookbook, "has_sgl_eval", lambda: True)
    sentence = judge("--only=json,gsm8k,gpqa,aime25", f"--data={tmp_path / 'nowhere'}").sentence()
    for part in ("GSM8K", "GPQA", "gsm8k.jsonl", "gpqa_diamond.jsonl", "--only"):
        assert part in sentence
    assert "AIME25" not in sentence


def test_a_download_that_fails_is_one_sentence(judge: Callable[..., Result], monkeypatch: pytest.MonkeyPatch):
    def offline(words: list[str]) -> subprocess.CompletedProcess[str]:
        failed = {"error": "ConnectionError: no route"}
        return subprocess.CompletedProcess(words, 0, f"a warning\n{json.dumps(failed)}\n", "")

    monkeypatch.setattr(cookbook, "_child", offline)
    assert "SGLang's own download failed: ConnectionError: no route" in judge("--only=gsm8k").sentence()


def write_gsm8k(folder: Path) -> list[dict[str, str]]:
    """Seven questions."""
    rows = [{"question": f"What is {i} and {i}?", "answer": f"Both.\n#### {2 * i}"} for i in range(1, 8)]
    (folder / "gsm8k.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def test_sglangs_own_tool_judges_gsm8k(fake: Fake, judge: Callable[..., Result], tmp_path: Path):
    """`python -m sglang.test.run_eval` on a file: every question is asked, the shot's too, and the score is exact."""
    rows = write_gsm8k(tmp_path)
    fake.answers = {f"{rows[0]['answer']}\n\nQuestion: {row['question']}\nAnswer:": row["answer"] for row in rows[:5]}
    result = judge("--only=gsm8k", f"--data={tmp_path}")
    row = result.json["rows"][0]
    assert (row["right"], row["total"], row["published"], row["verdict"]) == (5, 7, 0.9613, "FAIL")
    assert row["floor"] == floor_for(0.9613, 7) and row["detail"]["failed_requests"] == 0
    assert result.code == 1 and "±" in result.out


def test_what_sgl_eval_is_for_is_not_run_without_it(judge: Callable[..., Result], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cookbook, "has_sgl_eval", lambda: False)
    result = judge("--only=json,gpqa,aime25")
    assert result.code == 0 and len(result.named("not run")) == 2
    assert all("pip install sgl-eval==0.1.3" in row["not_run"] for row in result.json["rows"] if row["not_run"])


def test_sglangs_pin_of_sgl_eval_is_ours():
    assert f'{cookbook.SGL_EVAL}; extra == "test"' in (importlib.metadata.requires("sglang") or [])


@pytest.mark.parametrize(("error_rate", "failed"), [(0.0, 0), (0.25, 1)])
def test_sgl_evals_metrics_are_read(tmp_path: Path, error_rate: float, failed: int):
    """As sgl-eval 0.1.3 writes them; a refused request is an empty answer to it."""
    file = tmp_path / "metrics.json"
    found = {"aggregate": {"score": 0.75, "error_rate": error_rate}, "num_examples": 4, "n_repeats": 1}
    file.write_text(json.dumps(found))
    output = f"Run directory: {tmp_path}\n\nMetrics: {file}\n"
    row = cookbook.read_sgl_eval(Row("gpqa", "GPQA"), subprocess.CompletedProcess([], 0, output))
    assert (row.right, row.total, row.detail["failed_requests"], len(row.wrong)) == (3, 4, failed, failed)


@pytest.mark.parametrize(("code", "partial", "problem"), [(1, False, "exit code 1"), (0, True, "only a part")])
def test_an_evaluation_that_breaks_off_gives_no_score(tmp_path: Path, code: int, partial: bool, problem: str):
    file = tmp_path / "metrics.json"
    file.write_text(json.dumps({"aggregate": {"score": 0.5}, "num_examples": 2, "partial": partial}))
    done = subprocess.CompletedProcess([], code, f"Metrics: {file}\n")
    with pytest.raises(ServerGone, match=problem):
        cookbook.read_sgl_eval(Row("gpqa", "GPQA"), done)


def test_refused_requests_are_named(tmp_path: Path):
    """SGLang's tools take a refusal for an empty answer; the row says that there were some."""
    file = tmp_path / "result.json"
    file.write_text('{"score": 0.5}')
    output = f"Bad Request Error too long\nWriting results to {file}\n"
    row = cookbook._read(Row("gsm8k", "GSM8K"), 2, subprocess.CompletedProcess([], 0, output))
    assert row.right == 1 and row.detail["failed_requests"] == 1 and "too long" in row.wrong[0]["the first"]


def test_flags_follow_the_published_protocol(fake: Fake):
    fake.context = 65536
    client = Client(fake.url)
    gsm8k = cookbook.flags(client, cookbook.EVALUATIONS["gsm8k"], 200)
    aime = cookbook.flags(client, cookbook.EVALUATIONS["aime25"], None)
    assert "--num-examples 200" in " ".join(gsm8k) and "--temperature 0" in " ".join(gsm8k)
    assert f"--max-tokens {65536 - cookbook.PROMPT_TOKENS}" in " ".join(aime) and "thinking=true" in aime
    assert "--num-examples" not in aime and cookbook.QUICK_QUESTIONS == 200


@pytest.mark.parametrize(
    ("right", "total", "low", "high"),
    # statsmodels' proportion_confint(method="wilson"), Wilson's own table, and the closed form at the ends: z²/(n+z²).
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (20, 20, 0.8389, 1.0)],
)
def test_wilson(right: int, total: int, low: float, high: float):
    assert wilson(right, total) == pytest.approx((low, high), abs=5e-5)


@given(st.integers(1, 2000), st.data())
def test_wilson_holds_the_share_and_narrows(total: int, data: st.DataObject):
    right = data.draw(st.integers(0, total))
    low, high = wilson(right, total)
    assert 0 <= low <= right / total <= high <= 1
    wider = wilson(right, total, z=3)
    assert wider.low <= low and high <= wider.high
    assert wilson(4 * right, 4 * total).high - wilson(4 * right, 4 * total).low < high - low


@given(st.floats(0.01, 1), st.integers(1, 300))
def test_floors_are_where_the_interval_reaches_the_published(published: float, total: int):
    right = round(floor_for(published, total) * total)
    assert wilson(right, total).high >= published
    assert right == 0 or wilson(right - 1, total).high < published
    assert Row("x", "x", right, total, floor_for(published, total)).verdict == "pass"
    assert right == 0 or Row("x", "x", right - 1, total, floor_for(published, total)).verdict == "FAIL"


def test_floors_of_the_published_flash_values():
    """200 questions cannot tell 93 from 95.5 %; 1,319 can."""
    assert wilson(186, 200).high > 0.955 > wilson(1227, 1319).high
    assert [round(floor_for(p, n), 4) for p, n in ((0.9613, 1319), (0.881, 198), (0.95, 30))] == [0.9515, 0.8384, 0.9]
    assert table([Row("gsm8k", "GSM8K", 186, 200, floor_for(0.9613, 200), 0.9613)]).count("± 3.6") == 1


def test_same_json():
    assert same_json({"a": [1, 2.0]}, {"a": [1.0, 2]}) and same_json(None, None)
    for a, b in ((True, 1), (1, "1"), ([1, 2], [2, 1]), ({"a": 1}, {}), (None, False), ([], {})):
        assert not same_json(a, b) and not same_json(b, a)
