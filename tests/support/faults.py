"""Faults under load: what clients get while a process of the application is lost, and what is left afterwards."""

from __future__ import annotations

import asyncio
import io
import json
import os
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import aiohttp
import httpx
import numpy as np
import psutil
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from deployments.tools.local_cluster import LocalCluster
from support.demo import DEMO_ANSWER, DEMO_IMAGE, DEMO_QUESTION, question

HUNG_S = 240.0
"""Longer than anything may take on a busy machine: a request without an end by then is a fault."""
LONG = 1500
"""Tokens of a stream that a fault meets in its middle."""
SHM = "/dev/shm"


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a request ended.

    Attributes:
        kind: `answer`, `refused` (503 in OpenAI's form with Retry-After), `error event`, `cut` (the transport reports
            it), `closed` (without a response), `no connection`, `silent` (a stream that seems complete and is not),
            `hung`, or else the status.
        detail: for the report of a test that fails.
    """

    kind: str
    detail: str = ""


class Asker:
    """Sends requests and classifies their ends. Close it."""

    def __init__(self, url: str) -> None:
        timeout = aiohttp.ClientTimeout(total=HUNG_S, sock_connect=10)
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, force_close=True), timeout=timeout
        )
        self._url = f"{url}/v1/chat/completions"

    async def __aenter__(self) -> Asker:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def ask(self, *images: bytes, begun: asyncio.Event | None = None, **fields: Any) -> Outcome:
        """One question about the images, greedy. `begun` is set with the first byte of a stream."""
        body = {"model": "builtin", "messages": question(DEMO_QUESTION, *images), "temperature": 0, **fields}
        data, headers = io.BytesIO(json.dumps(body).encode()), {"Content-Type": "application/json"}
        try:
            async with self._session.post(self._url, data=data, headers=headers) as response:
                text = b""
                async for piece in response.content.iter_any():
                    text += piece
                    if begun is not None:
                        begun.set()
                return _outcome(response, text.decode())
        except aiohttp.ClientPayloadError:
            return Outcome("cut")
        except aiohttp.ClientConnectorError as error:
            return Outcome("no connection", str(error))
        except aiohttp.ClientConnectionError as error:
            return Outcome("closed", repr(error))
        except TimeoutError:
            return Outcome("hung")

    async def stream(self, begun: asyncio.Event) -> Outcome:
        """A long stream."""
        return await self.ask(DEMO_IMAGE.read_bytes(), begun=begun, max_tokens=LONG, stream=True, ignore_eos=True)

    async def short(self) -> Outcome:
        """A question whose answer is checked."""
        return await self.ask(DEMO_IMAGE.read_bytes(), max_tokens=20)


def _outcome(response: aiohttp.ClientResponse, text: str) -> Outcome:
    detail = f"{response.status} {text[-300:]}"
    if response.status == 503:
        with suppress(ValueError, KeyError, TypeError):
            error = json.loads(text)["error"]
            if {"message", "type", "param", "code"} <= error.keys() and "Retry-After" in response.headers:
                return Outcome("refused", error["message"])
    if response.status != 200:
        return Outcome(str(response.status), detail)
    if response.content_type != "text/event-stream":
        content = json.loads(text)["choices"][0]["message"]["content"]
        return Outcome("answer" if DEMO_ANSWER in content.lower() else "wrong", detail)
    *events, last, _ = text.split("\n\n")
    if last != "data: [DONE]":
        return Outcome("silent", detail)
    return Outcome("error event" if '"error"' in events[-1] else "answer", detail)


def large_picture(number: int) -> bytes:
    """The demo's picture with 12 megapixels, as a file that no cache knows: the picture tier has work with it."""
    out = io.BytesIO()
    with Image.open(DEMO_IMAGE) as image:
        image.convert("RGB").resize((3464, 3464)).save(out, "JPEG")
    return out.getvalue() + bytes(np.uint8(number))  # what follows a JPEG's end is not looked at


@dataclass(frozen=True, slots=True)
class Load:
    """How the requests ended that a fault met.

    Attributes:
        streams: that had begun.
        others: unstreamed ones, of which nothing had been sent.
        later: those sent one after another from the fault on; the last one is the first right answer.
        back_s: seconds from the fault to that answer.
    """

    streams: list[Outcome]
    others: list[Outcome]
    later: list[Outcome]
    back_s: float

    def __str__(self) -> str:
        parts = {"streams": self.streams, "others": self.others, "later": self.later}
        reported = "; ".join(f"{name} {dict(Counter(each.kind for each in group))}" for name, group in parts.items())
        return f"back after {self.back_s:.1f} s; {reported}"


async def fault_under_load(url: str, fault: Any, bound_s: float) -> Load:
    """Runs 8 streams and 6 other requests, causes the fault in their middle, and asks until an answer is right."""
    pictures = [large_picture(number) for number in range(3)] + [DEMO_IMAGE.read_bytes()] * 3
    async with Asker(url) as asker:
        begun = [asyncio.Event() for _ in range(8)]
        streams = [asyncio.create_task(asker.stream(each)) for each in begun]
        async with asyncio.timeout(HUNG_S):
            await asyncio.gather(*(each.wait() for each in begun))
        others = [asyncio.create_task(asker.ask(each, max_tokens=60)) for each in pictures]
        await asyncio.sleep(0.3)
        assert not any(each.done() for each in streams), "the streams ended before the fault"
        start = time.monotonic()
        await asyncio.to_thread(fault)
        later: list[Outcome] = []
        while not later or later[-1].kind != "answer":
            assert time.monotonic() < start + bound_s, f"not back: {later[-3:]}"
            later.append(await asker.short())
            await asyncio.sleep(0.2)
        back_s = time.monotonic() - start
        return Load(await asyncio.gather(*streams), await asyncio.gather(*others), later, back_s)


def kill(processes: list[psutil.Process]) -> None:
    """Ends processes by SIGKILL."""
    assert processes
    for each in processes:
        each.kill()
    psutil.wait_procs(processes, timeout=20)


def processes_of(running: LocalCluster, *, title: str = "") -> list[psutil.Process]:
    """The processes of a local cluster, those whose command line holds the title."""
    found, folder = [], str(running.log.parent)
    tree = {each.pid for each in psutil.Process(running.process.pid).children(recursive=True)}
    for each in psutil.process_iter():
        with suppress(psutil.Error):
            command = " ".join(each.cmdline())
            if title in command and (each.pid in tree or folder in command) and each.status() != psutil.STATUS_ZOMBIE:
                found.append(each)
    return found


@dataclass(frozen=True, slots=True)
class Holdings:
    """What a local cluster holds at rest.

    Attributes:
        processes: how many of each kind.
        files: descriptors by process.
        shared_memory: names in /dev/shm that no living process has mapped.
        objects: in Ray's object store, as its agent last said; it says so every ten seconds.
    """

    processes: Counter[str]
    files: dict[int, int]
    shared_memory: set[str]
    objects: int

    def left_by(self, after: Holdings) -> str:
        """What there is more of afterwards; empty if there is nothing. A few descriptors are connections in use, and
        Serve's controller keeps an object for a replica that it has started."""
        more = {
            "processes": after.processes - self.processes,
            "files": {
                pid: (self.files[pid], count)
                for pid, count in after.files.items()
                if count > self.files.get(pid, count) + 15
            },
            "shared memory": after.shared_memory - self.shared_memory,
            "objects": after.objects if after.objects > self.objects + 2 else 0,
        }
        return "; ".join(f"{name}: {what}" for name, what in more.items() if what)


KINDS = ("ServeReplica:llava", "ServeController", "ProxyActor", "HAProxyManager", "decode_worker", "haproxy -")


def holdings(running: LocalCluster) -> Holdings:
    """At this moment."""
    kinds: Counter[str] = Counter()
    files = {}
    for each in processes_of(running):
        with suppress(psutil.Error):
            command = " ".join(each.cmdline())
            kinds.update(kind for kind in KINDS if kind in command)
            files[each.pid] = each.num_fds()
    return Holdings(kinds, files, _unmapped(), _objects(running))


def _objects(running: LocalCluster) -> int:
    families = text_string_to_metric_families(httpx.get(running.metrics_url, timeout=60).text)
    samples = [sample for family in families for sample in family.samples]
    return int(sum(each.value for each in samples if each.name == "ray_object_store_num_local_objects"))


def _unmapped() -> set[str]:
    """Of this user."""
    mapped = set()
    for each in psutil.process_iter():
        with suppress(OSError), open(f"/proc/{each.pid}/maps", encoding="utf-8") as maps:
            mapped |= {line.split(maxsplit=5)[-1].strip() for line in maps if SHM in line}
    owned = [each for each in os.scandir(SHM) if each.stat().st_uid == os.getuid()]
    return {each.name for each in owned if each.path not in mapped}
