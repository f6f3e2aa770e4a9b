"""Large bodies are parsed in a child process: the same results, and an end of the child is one request's."""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from llava_serve.api.app import create_app
from llava_serve.api.parse_process import ParseProcess
from llava_serve.api.service import LARGE_BODY_BYTES
from llava_serve.api.validation import read_chat
from llava_serve.config import ApiOptions
from llava_serve.errors import RequestError
from support.api_server import PATH, PacedBackend, error_of, serving, wait_until

PID: partial[int] = partial(eval, "__import__('os').getpid()")
READ = partial(read_chat, ignore_unknown=True, image_order="as_sent")


@pytest.fixture(scope="module")
def parse() -> Iterator[ParseProcess]:
    with ParseProcess() as made:
        yield made


def body(**fields: Any) -> bytes:
    return json.dumps({"messages": [{"role": "user", "content": "Hi"}]} | fields).encode()


def ended(pid: int) -> bool:
    """Within ten seconds."""
    end = time.monotonic() + 10
    while time.monotonic() < end:
        with suppress(ProcessLookupError, FileNotFoundError):
            os.kill(pid, 0)
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
                time.sleep(0.02)
                continue
        return True
    return False


@pytest.mark.parametrize(
    "given",
    [
        body(messages=[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}] * 1000, top_p=0.5),
        body(stop="x", colour="red", metadata={"a": 1}, stream=True, stream_options={"include_usage": True}),
        body(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": "data:," + "x" * 99_000}]}]),
    ],
)
async def test_a_request_is_read_as_in_a_thread(parse: ParseProcess, given: bytes) -> None:
    assert await parse(partial(READ, given), len(given)) == READ(given)


@pytest.mark.parametrize("given", [b"[", body(messages=[]), body(tools=[{}]), body(n="1"), body(messages=[1] * 50_000)])
async def test_an_error_is_the_same_as_in_a_thread(parse: ParseProcess, given: bytes) -> None:
    with pytest.raises(RequestError) as expected:
        READ(given)
    with pytest.raises(type(expected.value)) as got:
        await parse(partial(READ, given), len(given))
    assert (got.value.message, got.value.param) == (expected.value.message, expected.value.param)


async def test_the_child_is_one_and_has_no_torch(parse: ParseProcess) -> None:
    first, second, torch = await asyncio.gather(
        parse(PID, 0), parse(PID, 0), parse(partial(eval, "'torch' in __import__('sys').modules"), 0)
    )
    assert first == second != os.getpid()
    assert not torch


async def test_small_bodies_do_not_wait_for_large_ones(parse: ParseProcess) -> None:
    order: list[int] = []

    async def one(size: int) -> None:
        await parse(partial(time.sleep, 0 if size else 1), size)
        order.append(size)

    first = asyncio.ensure_future(one(0))  # it runs, and the others wait
    await asyncio.sleep(0.02)
    await asyncio.gather(first, *(one(size) for size in (9_000_000, 8_000_000, 70_000, 100_000)))
    assert order == [0, 70_000, 100_000, 8_000_000, 9_000_000]


async def test_an_unexpected_error_tells_where_it_was_raised(parse: ParseProcess) -> None:
    with pytest.raises(ZeroDivisionError) as got:
        await parse(partial(eval, "1 / 0"), 0)
    assert "parse_process.py" in "".join(got.value.__notes__)
    assert await parse(PID, 0)


async def test_a_child_that_ends_takes_its_request_only(parse: ParseProcess) -> None:
    before = await parse(PID, 0)
    bad, good = parse(partial(os._exit, 3), 0), parse(PID, 0)
    error, pid = await asyncio.gather(bad, good, return_exceptions=True)
    assert isinstance(error, RequestError)
    assert isinstance(pid, int)
    assert pid != before


async def test_a_child_that_was_ended_while_idle_fails_no_request(parse: ParseProcess) -> None:
    before = await parse(PID, 0)
    os.kill(before, signal.SIGKILL)
    assert await parse(PID, 0) != before


async def test_a_child_that_takes_too_long_is_replaced() -> None:
    with ParseProcess(timeout_s=0.5) as parse:
        before = await parse(PID, 0)
        bad, good = parse(partial(time.sleep, 60), 0), parse(PID, 0)
        error, pid = await asyncio.gather(bad, good, return_exceptions=True)
    assert isinstance(error, RequestError)
    assert isinstance(pid, int)
    assert ended(before)
    assert ended(pid)


async def test_closing_ends_work_and_starts_no_other_child(tmp_path: Path) -> None:
    before = set(multiprocessing.active_children())
    parse = ParseProcess()
    pid = await parse(PID, 0)
    begun = tmp_path / "begun"
    code = f"import time; open({str(begun)!r}, 'w').close(); time.sleep(60)"
    work = asyncio.ensure_future(parse(partial(exec, code), 0))
    await asyncio.to_thread(wait_until, begun.exists)
    parse.close()
    with pytest.raises((EOFError, OSError)):
        await work
    assert ended(pid)
    assert set(multiprocessing.active_children()) == before


def test_the_child_ends_with_its_parent() -> None:
    code = (
        "import asyncio, time\nfrom functools import partial\n"
        "from llava_serve.api.parse_process import ParseProcess\n"
        "if __name__ == '__main__':\n"
        "    parse = ParseProcess()\n"
        "    print(asyncio.run(parse(partial(eval, \"__import__('os').getpid()\"), 0)), flush=True)\n"
        "    time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        parent.kill()
    assert ended(pid)


def test_the_web_app_reads_large_bodies_there(parse: ParseProcess) -> None:
    app = create_app(PacedBackend(), ApiOptions(unknown_fields="ignore"), offload=parse)
    text = "a" * LARGE_BODY_BYTES
    with serving(app) as url, httpx.Client(base_url=url, timeout=60) as web:
        good = web.post(PATH, content=body(user=text, colour="red"), headers={"content-type": "application/json"})
        bad = web.post(PATH, content=body(user=text, n="1"), headers={"content-type": "application/json"})
    assert good.status_code == 200
    assert good.headers["x-llava-serve-notes"] == "colour: ignored"
    assert bad.status_code == 400
    assert error_of(bad)["param"] == "n"
