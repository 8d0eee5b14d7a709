"""Remote stores, against a real S3 server: cache, push and pull, with faults and kills."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from nemo_kd.cli.main import main
from nemo_kd.errors import StoreError
from nemo_kd.store import Sample, Store, pull, push, verify
from nemo_kd.store import remote as remote_module
from nemo_kd.store.manifest import MANIFEST
from nemo_kd.store.tools.copying import TRANSFER
from tests.processes import environment
from tests.store.s3 import BUCKET, Server, serving
from tests.store.samples import spec, store

pytest.importorskip("s3fs")
ROWS = 11


@pytest.fixture(scope="module")
def running() -> Iterator[Server]:
    with serving() as server:
        yield server


@pytest.fixture
def s3(running: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Server:
    """The server without faults, the environment that leads to it, and an empty cache."""
    running.requests, running.fault = Counter(), lambda method, path: ""
    for name, value in running.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("NEMO_KD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(remote_module, "FIRST_WAIT", 0.01)
    return running


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return store(tmp_path_factory.mktemp("stores") / "local", spec(), ROWS)


@pytest.fixture
def url(s3: Server, local: Path, request: pytest.FixtureRequest) -> str:
    """The URL of the pushed store."""
    url = f"s3://{BUCKET}/{request.node.name}/store"
    push(local, url)
    s3.requests.clear()
    return url


def same(one: Sample, other: Sample) -> bool:
    return (
        one.row == other.row
        and np.array_equal(one.input_ids, other.input_ids)
        and np.array_equal(one.topk.ids, other.topk.ids)
        and np.array_equal(one.topk.logits, other.topk.logits)
    )


def files(directory: Path) -> dict[str, bytes]:
    """Content of every file below a directory, by relative path."""
    paths = (path for path in directory.rglob("*") if path.is_file())
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in paths}


def settled(opened: Store) -> Store:
    """The store after its prefetching has ended."""
    opened.origin.wait()
    return opened


def test_a_remote_store_has_the_samples_of_the_local_one(url: str, local: Path) -> None:
    remote, here = Store(url), Store(local)
    assert remote.fingerprint == here.fingerprint
    assert len(remote) == len(here) == ROWS
    assert all(map(same, remote, here))
    assert not list(verify(url))
    again = pickle.loads(pickle.dumps(remote))
    assert same(again[3], here[3])


def test_opening_fetches_no_part_and_reading_fetches_this_and_the_next(
    url: str, s3: Server
) -> None:
    opened = Store(url)
    assert s3.of("GET", MANIFEST) == 1
    assert not s3.of("GET", "/tokens.bin")
    opened[0]
    settled(opened)
    assert s3.of("GET", "tokens.bin") == 2
    opened[0], Store(url)[0]
    assert s3.of("GET", "tokens.bin") == 2


def test_a_part_that_arrives_damaged_is_fetched_again_and_refused_in_the_end(
    url: str, s3: Server
) -> None:
    damaged = iter(["damage"] * 2)
    s3.fault = lambda method, path: (
        next(damaged, "") if method == "GET" and path.endswith("topk_ids.bin") else ""
    )
    assert Store(url)[0].row == 0
    s3.fault = lambda method, path: "damage" if path.endswith("topk_ids.bin") else ""
    with pytest.raises(StoreError, match=r"another SHA-256 than in the manifest.*push") as caught:
        settled(Store(url))[ROWS - 1]
    assert url in str(caught.value)


def test_a_part_that_was_cut_in_the_cache_is_named(url: str) -> None:
    opened = Store(url)
    opened[0]
    opened.origin.wait()
    part = opened.directory / opened.manifest.parts[1].name
    os.truncate(part / "tokens.bin", 1)
    with pytest.raises(StoreError, match=f"remove {part}: it is a cache of {url}"):
        opened[ROWS // 2]


def test_a_server_that_fails_twice_is_asked_again(url: str, s3: Server, tmp_path: Path) -> None:
    failures: Counter[str] = Counter()

    def twice(method: str, path: str) -> str:
        failures[path] += 1
        return "error" if failures[path] <= 2 else ""

    s3.fault = twice
    assert len(Store(url)) == ROWS
    pull(url, tmp_path / "pulled")
    assert max(failures.values()) > 2


def test_a_server_that_always_fails_ends_in_one_line(url: str, s3: Server) -> None:
    s3.fault = lambda method, path: "error"
    with pytest.raises(StoreError, match="6 times; check the network") as caught:
        Store(url)
    assert f"{url}/{MANIFEST}" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("address", "what"),
    [
        (f"s3://{BUCKET}/nothing", "no such file; check the URL"),
        ("s3://user:secret@bucket/store", "credentials and queries in a URL are refused"),
        ("https://host/store?signature=secret", "credentials and queries in a URL are refused"),
        ("nosuch://bucket/store", "Protocol not known"),
        ("gs://bucket/store", "gcsfs"),
    ],
)
def test_addresses_that_cannot_be_read(s3: Server, address: str, what: str) -> None:
    with pytest.raises(StoreError, match=what) as caught:
        Store(address)
    assert "secret" not in str(caught.value)


def test_missing_packages_are_named(tmp_path: Path) -> None:
    (tmp_path / "s3fs.py").write_text("raise ImportError('hidden', name='s3fs')\n")
    code = "from nemo_kd.store import Store; Store('s3://bucket/store')"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment(PYTHONPATH=f"{tmp_path}{os.pathsep}{os.getcwd()}"),
        capture_output=True,
        text=True,
    )
    assert "pip install '.[remote]' in a checkout of nemo-kd" in done.stderr.splitlines()[-1]


def read_all(url: str, results: multiprocessing.Queue[int]) -> None:
    results.put(sum(sample.row for sample in Store(url)))


def test_processes_that_read_at_once_download_once(url: str, s3: Server) -> None:
    context = multiprocessing.get_context("fork")  # as data loaders do, after a store was read
    results = context.Queue()
    processes = [context.Process(target=read_all, args=(url, results)) for _ in range(2)]
    for process in processes:
        process.start()
    assert [results.get(timeout=60) for _ in processes] == [sum(range(ROWS))] * 2
    for process in processes:
        process.join()
    downloads = {path: n for (m, path), n in s3.requests.items() if m == "GET" and ".bin" in path}
    assert set(downloads.values()) == {1}


def test_pulling_what_was_pushed_gives_the_same_files(
    url: str, local: Path, s3: Server, tmp_path: Path
) -> None:
    pull(url, tmp_path / "pulled")
    assert files(tmp_path / "pulled") == files(local)
    gets = s3.of("GET", ".bin")
    pull(url, tmp_path / "pulled")
    assert s3.of("GET", ".bin") == gets
    assert os.listdir(tmp_path) == ["pulled"]


def test_a_pull_mends_a_damaged_copy(url: str, local: Path, s3: Server, tmp_path: Path) -> None:
    target = tmp_path / "pulled"
    pull(url, target)
    wrong = target / "segment-00001/topk_ids.bin"
    wrong.write_bytes(bytes(wrong.stat().st_size))
    (target / "segment-00002/shard.json").unlink()
    shutil.rmtree(target / "segment-00003")
    (target / "index.bin").write_bytes(b"")
    (target / "spec.json").unlink()
    s3.requests.clear()
    pull(url, target)
    assert files(target) == files(local)
    assert [s3.of("GET", f"segment-0000{i}/tokens.bin") for i in range(4)] == [0, 1, 1, 1]
    assert os.listdir(tmp_path) == ["pulled"]


def test_a_mending_that_was_killed_is_continued(
    url: str, s3: Server, local: Path, tmp_path: Path
) -> None:
    target = tmp_path / "pulled"
    pull(url, target)
    for number in (0, 2):
        (target / f"segment-0000{number}/tokens.bin").unlink()
    s3.requests.clear()
    killed_at(s3, "GET", "segment-00002/tokens.bin", "pull", url, target)
    s3.requests.clear()
    pull(url, target)
    assert files(target) == files(local)
    assert not s3.of("GET", "segment-00000/tokens.bin")


def test_a_push_to_a_directory_creates_it(local: Path, s3: Server, tmp_path: Path) -> None:
    for url in (f"file://{tmp_path}/a/store", str(tmp_path / "b" / "store")):
        push(local, url)
        assert all(map(same, Store(url), Store(local)))


def test_a_push_writes_the_manifest_last(s3: Server, local: Path) -> None:
    written: list[str] = []

    def note(method: str, path: str) -> str:
        written.extend([path] if method == "PUT" else [])
        return ""

    s3.fault = note
    push(local, f"s3://{BUCKET}/last/store")
    assert written[0].endswith(TRANSFER)
    assert written[-1].endswith(MANIFEST)


def killed_at(s3: Server, method: str, name: str, *command: object) -> None:
    """Kill `nemo-kd` while the server does not answer its request for a path with this end."""
    s3.fault = lambda m, path: "hang" if m == method and path.endswith(name) else ""
    process = subprocess.Popen(
        [sys.executable, "-m", "nemo_kd", *map(str, command)],
        env=environment(),
        stderr=subprocess.PIPE,
    )
    deadline = time.monotonic() + 30
    while not s3.of(method, name):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.kill()
    process.communicate()
    s3.fault = lambda m, path: ""


def test_a_push_that_was_killed_is_continued(s3: Server, local: Path, tmp_path: Path) -> None:
    url = f"s3://{BUCKET}/killed/store"
    killed_at(s3, "PUT", "segment-00002/tokens.bin", "push", local, url)
    with pytest.raises(StoreError, match="no such file"):
        Store(url)
    other = store(tmp_path / "other", spec(teacher={"name": "other", "fingerprint": "c" * 64}))
    with pytest.raises(StoreError, match="an unfinished copy of another store"):
        push(other, url)
    s3.requests.clear()
    push(local, url)
    assert not s3.of("PUT", "segment-00000/tokens.bin")
    assert s3.of("PUT", "segment-00002/tokens.bin") == 1
    assert len(list(Store(url))) == ROWS
    with pytest.raises(StoreError, match="holds another store"):
        push(other, url)


def test_a_pull_that_was_killed_is_continued(
    url: str, s3: Server, local: Path, tmp_path: Path
) -> None:
    target = tmp_path / "pulled"
    killed_at(s3, "GET", "segment-00002/tokens.bin", "pull", url, target)
    assert not target.exists()
    s3.requests.clear()
    pull(url, target)
    assert files(target) == files(local)
    assert not s3.of("GET", "segment-00000/tokens.bin")
    assert s3.of("GET", "segment-00002/tokens.bin") == 1


def test_nothing_foreign_is_written_to(url: str, s3: Server, local: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("mine")
    with pytest.raises(StoreError, match="/mine exists and is not the store"):
        pull(url, tmp_path / "mine")
    with pytest.raises(StoreError, match=r"holds store/.*, not a store"):
        push(local, url.rpartition("/")[0])


def test_commands_take_the_url_of_a_store(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["inspect", url], ["show", url, "3", "--ids"], ["verify", url], ["stats", url]):
        with pytest.raises(SystemExit) as ended:
            main(command)
        assert ended.value.code == 0, capsys.readouterr()
    assert f"{url}: no problems" in capsys.readouterr().out


def test_no_credentials_are_written(url: str, s3: Server, tmp_path: Path) -> None:
    settled(Store(url))[0]
    assert not [name for name, content in files(tmp_path).items() if b"secret" in content]


def test_any_protocol_of_fsspec_will_do(local: Path, s3: Server) -> None:
    for url in ("memory://a/store", f"file://{local}"):
        if url.startswith("memory"):
            push(local, url)
        assert all(map(same, Store(url), Store(local)))
