"""Servers that fail: what passes is retried, what does not is an error that says what to change."""

from __future__ import annotations

import threading
import time
from email.utils import formatdate
from pathlib import Path

import httpx
import numpy as np
import pytest

from nemo_kd.cli.teacher import check_kind, load, read
from nemo_kd.errors import NemoKDError
from nemo_kd.served import server as of_server
from nemo_kd.served.client import _hint, _retry_after
from nemo_kd.sft import RowError
from nemo_kd.store import Store
from tests.served.conftest import ROWS, SHARED, configuration, run, served
from tests.served.server import Faults, Server
from tests.served.test_served import same_files

APIS = ["vllm", "sglang"]
SHORT = "data.max_seq_length=40"


@pytest.fixture(scope="session")
def undisturbed(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The stores vllm/ and sglang/ of a server without faults."""
    path = tmp_path_factory.mktemp("undisturbed")
    with Server(teacher / "llama") as server:
        for api in APIS:
            run(*served(server, teacher, path / api, f"teacher.api={api}"))
    return path


@pytest.mark.parametrize("api", APIS)
def test_failures_that_pass_change_nothing(
    teacher: Path, server: Server, undisturbed: Path, tmp_path: Path, api: str
) -> None:
    # A row is asked twice: wrong answers that follow each other would be those of one row.
    faults = {1: "short", 3: "500", 4: "429", 5: "reset", 6: "truncated", 8: "slow", 13: "no json"}
    server.faults = lambda number: faults.get(number, "")
    more = [f"teacher.api={api}", "teacher.timeout=3", "teacher.concurrency=4"]
    start = time.monotonic()
    run(*served(server, teacher, tmp_path / "store", *more))
    assert 3 < time.monotonic() - start < 30
    assert len(server.requests) == 1 + ROWS + len(faults)
    same_files(undisturbed / api, tmp_path / "store")


def test_a_restart_of_the_server_changes_nothing(
    teacher: Path, undisturbed: Path, tmp_path: Path
) -> None:
    first = Server(teacher / "llama")
    stopped = threading.Event()

    def faults(number: int) -> str:
        if number == 5 and not stopped.is_set():
            stopped.set()
            first.http.shutdown()
            first.http.server_close()
            threading.Timer(1.5, first.__enter__).start()
        return "reset" if stopped.is_set() and number == 5 else ""

    first.faults = faults
    with first:
        more = ["teacher.concurrency=2", "teacher.retries=6"]
        run(*served(first, teacher, tmp_path / "store", *more))
    assert stopped.is_set()
    same_files(undisturbed / "vllm", tmp_path / "store")


WRONG = {
    "short": "tokens were sent, but the answer has",
    "shifted": "shifted by a position|mixes positions|for the first token",
    "rotated": "is shifted, or belongs to another row|mixes positions",
    "cached": "no log-probabilities at 16 positions, the first of them 1: .* start the server with",
    "other row": "it belongs to another row|is shifted, or belongs to another row",
    "logits": "are not the log-probabilities of a softmax",
    "nan": "the answer is not a completion|are not the log-probabilities",
    "no json": "the answer is not",
    "deep": "the answer is not",
    "huge id": "an id of more than 64 bits|log-probability .* contradicts|has 2[12] ids",
}


def of_rows(server: Server, fault: str) -> Faults:
    """A fault in all answers but that to the test request, which is shorter than any row."""

    def of_row(number: int) -> str:
        body = server.requests[number]
        return fault if len(body.get("prompt") or body["input_ids"]) > 4 else ""

    return of_row


@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize("fault", WRONG)
def test_answers_that_do_not_fit_are_errors_of_their_rows(
    teacher: Path, server: Server, tmp_path: Path, api: str, fault: str
) -> None:
    server.faults = of_rows(server, fault)
    overrides = served(server, teacher, tmp_path / "store", f"teacher.api={api}", SHORT)
    with pytest.raises(RowError, match=rf"train\.jsonl, row \d: .*({WRONG[fault]})"):
        run(*overrides)
    assert len(server.requests) >= 3  # each row a second time


def test_an_id_too_many_is_an_error(teacher: Path, server: Server, tmp_path: Path) -> None:
    server.faults = lambda number: "long"
    message = r"a test request: .* has 2[12] ids at position \d+, expected dump.top_k=20"
    with pytest.raises(NemoKDError, match=message):
        run(*served(server, teacher, tmp_path / "store"))


@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize("fault", ["no logprobs", "shifted", "logits", "other api"])
def test_a_server_that_gives_no_log_probabilities_is_refused_at_the_start(
    teacher: Path, server: Server, tmp_path: Path, api: str, fault: str
) -> None:
    server.faults = lambda number: fault
    overrides = served(server, teacher, tmp_path / "store", f"teacher.api={api}")
    with pytest.raises(NemoKDError, match=r"http://127\.0\.0\.1:\d+/\S+: a test request: the "):
        run(*overrides, "on_bad_row=drop")
    assert len(server.requests) == 2 and not (tmp_path / "store").exists()


def test_no_store_is_written_if_every_row_is_left_out(
    teacher: Path, server: Server, undisturbed: Path, tmp_path: Path
) -> None:
    server.faults = of_rows(server, "shifted")
    overrides = served(server, teacher, tmp_path / "store", "on_bad_row=drop")
    message = rf"all {ROWS} rows were left out; one of them: \S+train\.jsonl, row \d+: the answer"
    with pytest.raises(RowError, match=message):
        run(*overrides)
    assert not (tmp_path / "store/manifest.json").exists()
    server.faults = lambda number: ""
    run(*overrides)
    same_files(undisturbed / "vllm", tmp_path / "store")


def test_rows_with_wrong_answers_are_dropped_if_asked(
    teacher: Path,
    server: Server,
    undisturbed: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole = {sample.row: sample for sample in Store(undisturbed / "vllm")}
    wrong = [whole[row].input_ids.tolist() for row in (2, 7)]
    server.faults = lambda number: "shifted" if server.requests[number]["prompt"] in wrong else ""
    store = run(*served(server, teacher, tmp_path / "store", "on_bad_row=drop"))
    assert [sample.row for sample in store] == [row for row in range(ROWS) if row not in (2, 7)]
    for sample in store:
        assert np.array_equal(sample.topk.ids, whole[sample.row].topk.ids)
    said = capsys.readouterr().err
    assert "left out: 2 rows without a usable answer of the server, such as" in said
    assert f"{teacher}/train.jsonl, row " in said


def test_a_top_k_above_the_servers_limit_names_its_option(
    teacher: Path, server: Server, tmp_path: Path
) -> None:
    server.max_logprobs = 10
    with pytest.raises(NemoKDError, match=r"dump\.top_k=20, .* at most 10 .* --max-logprobs 20"):
        run(*served(server, teacher, tmp_path / "store"))
    assert len(server.requests) == 1
    assert len(run(*served(server, teacher, tmp_path / "store", "dump.top_k=10"))) == ROWS


def test_other_limits_on_top_k_name_the_option_too(
    teacher: Path, server: Server, tmp_path: Path
) -> None:
    server.max_logprobs, overrides = 10, served(server, teacher, tmp_path / "store")
    server.limit_words = "Cannot request more than {1} prompt logprobs."
    with pytest.raises(NemoKDError, match=r"more than 10 prompt logprobs.*option --max-logprobs"):
        run(*overrides)
    server.faults = lambda number: "capped"
    message = r"has 1[01] ids at .*server's limit \(--max-logprobs\)"
    with pytest.raises(NemoKDError, match=message):
        run(*overrides)


def test_another_refusal_is_the_servers_own(teacher: Path, server: Server, tmp_path: Path) -> None:
    overrides = served(server, teacher, tmp_path / "store", "teacher.model=teacher")
    cfg = configuration(*overrides)
    served_teacher = load(read(cfg), cfg)
    server.names = ["renamed"]
    from nemo_kd.teacher.dump import dump

    with pytest.raises(NemoKDError, match=r"request: .*: 400 .* `teacher` does not exist"):
        dump(read(cfg), served_teacher)


def refusal(server: Server, teacher: Path, *overrides: str) -> str:
    """The error of starting a dump."""
    cfg = configuration(*served(server, teacher, teacher / "none", *overrides))
    with pytest.raises(NemoKDError) as caught:
        load(read(cfg), cfg)
    assert not (teacher / "none").exists()
    return str(caught.value)


def test_what_a_server_cannot_do_is_refused_at_the_start(
    teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Server(teacher / "llama") as server:
        check_refusals(teacher, server, monkeypatch)


def check_refusals(teacher: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    def said(*overrides: str) -> str:
        return refusal(server, teacher, *overrides)

    assert "set dump.temperatures=[1.0]" in said("dump.temperatures=[1.0,2.0]")
    assert "use profile plain" in said("dump.profile=sampled")
    assert "set data.max_seq_length=127 or less" in said("data.max_seq_length=128")
    assert "teacher.model=x is not served; the server has: teacher" in said("teacher.model=x")
    assert "check teacher.url" in said(f"teacher.url={server.url}/no")
    server.names = ["a", "b"]
    assert "teacher.model must be given, because the server lists: a, b" in said()
    server.key = "s3cret"
    assert "set teacher.api_key_env" in said()
    assert "teacher.api_key_env=KEY, but this environment" in said("teacher.api_key_env=KEY")
    monkeypatch.setenv("KEY", "wrong")
    assert "wrong" not in said("teacher.api_key_env=KEY")
    assert not server.requests


def test_another_tokenizer_is_refused(teacher: Path, server: Server, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(teacher / "llama", tmp_path / "other")
    file = tmp_path / "other/tokenizer.json"
    file.write_text(file.read_text().replace('"é"', '"è"'))
    more = server.tokenizer.__class__.from_pretrained(tmp_path / "other")
    more.add_tokens(["return"])
    more.save_pretrained(tmp_path / "other")
    said = refusal(server, teacher, f"teacher.tokenizer={tmp_path}/other")
    assert "the server's tokenizer is another one" in said


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("401", "status 401"),
        ("404", "status 404"),
        ("500", "500 Internal Server Error: no"),
        ("garbage", "Expected `array`, got `str`"),
        ("deep", "recursion"),
        ("slow", "no answer within 1 s"),
    ],
)
def test_a_tokenizer_that_the_server_does_not_tell_is_not_compared_and_this_is_said(
    teacher: Path,
    server: Server,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    fault: str,
    reason: str,
) -> None:
    server.tokenize = fault
    monkeypatch.setattr(of_server, "TOKENIZE_SECONDS", 1.0)
    cfg = configuration(*served(server, teacher, teacher / "none"))
    start = time.monotonic()
    load(read(cfg), cfg)
    assert time.monotonic() - start < 3  # teacher.timeout and teacher.retries are far longer
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "/tokenize" in line]
    assert f"{server.url}/tokenize: the server does not tell its tokenizer (" in line
    assert reason in line and line.endswith("check that it is the served model's")


@pytest.mark.parametrize(
    ("location", "advice"),
    [
        ("http://other:8000/v1/models", "; set teacher.url to http://other:8000"),
        ("http://other/api/v1/models", "; set teacher.url to http://other/api"),
        ("https://h/base/v1/models/", "; set teacher.url to https://h/base"),
        ("/api/v1/models?x=1", "; set teacher.url to http://h/api"),
        ("//other/v1/models", "; set teacher.url to http://other"),
        ("https://login/", "; it redirects to https://login/: set teacher.url to the server "),
        ("", "; it redirects to http://h/base/v1/models: set teacher.url to the server that "),
        ("http://[::1", "; it redirects to http://[::1, which is no address"),
    ],
)
def test_a_redirect_names_the_address_to_set(location: str, advice: str) -> None:
    """Not the path of the request below it: teacher.url is the server's base address."""
    request = httpx.Request("GET", "http://h/base/v1/models")
    answer = httpx.Response(301, headers={"Location": location}, request=request)
    assert _hint(answer, "/v1/models").startswith(advice)


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("ALL_PROXY", "socks5://x:1", "variable ALL_PROXY is no usable proxy .socks5 needs the pa"),
        ("HTTP_PROXY", "ftp://u:s3cret@x:1", "variable HTTP_PROXY is no usable proxy .Unknown sch"),
        ("https_proxy", "ftp://x:1", "variable https_proxy is no usable proxy .Unknown scheme"),
        ("NO_PROXY", "a b,[::1", "variable NO_PROXY cannot be read .*: set it to hosts"),
        ("SSL_CERT_FILE", "/nonexistent", "variable SSL_CERT_FILE=/nonexistent has no readable"),
        ("SSL_CERT_FILE", __file__, "variable SSL_CERT_FILE=.* has no readable certificates"),
        (
            "HTTP_PROXY",
            "http://u:s3cret@127.0.0.1:1",
            "teacher.url and the proxy of the variable HTTP_PROXY, ",
        ),
        ("all_proxy", "127.0.0.1:1", "teacher.url and the proxy of the variable all_proxy, and"),
    ],
)
def test_a_variable_that_keeps_the_server_from_being_reached_is_named(
    teacher: Path, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, message: str
) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "SSL_CERT_FILE"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    monkeypatch.setenv(variable, value)
    overrides = ["teacher.url=http://nohost.invalid:8000", f"teacher.tokenizer={teacher}/llama"]
    paths = [f"data.file_path={teacher}/train.jsonl", f"output_dir={teacher}/none"]
    cfg = configuration("teacher.kind=served", "teacher.retries=0", *overrides, *paths)
    with pytest.raises(NemoKDError, match=message) as caught:
        load(read(cfg), cfg)
    assert "s3cret" not in str(caught.value) and "\n" not in str(caught.value)


def test_a_proxy_that_does_not_matter_is_not_named(
    teacher: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    assert "HTTP_PROXY" not in refusal(server, teacher, "teacher.url=http://127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", "nohost.invalid")
    assert "HTTP_PROXY" not in refusal(server, teacher, "teacher.url=http://nohost.invalid:8000")


def test_no_server_is_an_error_soon(teacher: Path) -> None:
    gone = Server(teacher / "llama")
    with gone:
        pass
    start = time.monotonic()
    assert "after 3 attempts; check the server and teacher.url" in refusal(gone, teacher)
    assert time.monotonic() - start < 8


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("teacher.kind=served", "teacher.url must be the server's address"),
        ("teacher.kind=served teacher.url=http://h:1", "teacher.tokenizer must be given"),
        ("teacher.kind=served teacher.url=ftp://h teacher.tokenizer=t", "teacher.url must be"),
        ("teacher.kind=served teacher.url=http://u:s3cret@h teacher.tokenizer=t", "a password"),
        ("teacher.kind=hf teacher.url=http://h:1", "teacher.url is for teacher.kind=served"),
        ("teacher.kind=nemo teacher.concurrency=4", "teacher.concurrency is for teacher.kind="),
        ("teacher.kind=hf", "model.restore_from_path must be given"),
        ("teacher.kind=nemo", "model.restore_from_path must be given"),
        ("model.restore_from_path=a {served}", "model.restore_from_path is not used with"),
        ("model.tensor_model_parallel_size=2 {served}", "the server decides how its model"),
        ("{served} teacher.api=tgi", "teacher.api is 'tgi': expected one of vllm, sglang"),
        ("teacher.kind=vllm", "Did you mean .served"),
    ],
)
def test_keys_that_do_not_go_together_are_refused(overrides: str, message: str) -> None:
    usable = "teacher.kind=served teacher.url=http://h:1 teacher.tokenizer=t"
    given = overrides.format(served=usable).split()
    with pytest.raises(NemoKDError, match=message) as caught:
        check_kind(read(configuration("data.file_path=x", "output_dir=y", *given)))
    assert "s3cret" not in str(caught.value)


def test_generation_is_refused(teacher: Path, server: Server, tmp_path: Path) -> None:
    from hydra import compose, initialize_config_dir

    from tests.processes import ROOT

    with initialize_config_dir(str(ROOT / "conf"), version_base=None):
        overrides = served(server, teacher, tmp_path / "store")
        cfg = compose("generate_with_teacher", [*SHARED, *overrides])
    with pytest.raises(NemoKDError, match=r"teacher.kind=served does not generate answers"):
        load(read(cfg), cfg)


def test_retry_after_is_a_number_or_a_date() -> None:
    def wait(value: str) -> float:
        return _retry_after(httpx.Headers({"Retry-After": value}))

    assert [wait("3"), wait("0"), wait(""), wait("soon"), wait("-4")] == [3, 0, 0, 0, 0]
    assert wait("99999999999") == 3600
    assert 8 < wait(formatdate(time.time() + 10, usegmt=True)) <= 10
    assert wait("Mon, 01 Jan 2001 00:00:00 GMT") == 0
