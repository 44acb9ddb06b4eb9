"""A policy behind a WebSocket: what robots are told, together and alone, and what a wrong request costs."""

from __future__ import annotations

import asyncio
import math
import re
import signal
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from queue import Queue
from typing import Any

import msgpack
import numpy as np
import pytest
import torch
from websockets.exceptions import ConnectionClosedError, ConnectionClosedOK, InvalidStatus
from websockets.sync.client import ClientConnection, connect

import deflow
from deflow.errors import UserError
from deflow.policy import Policy
from deflow.serving import serve as command
from deflow.serving import server as server_module
from deflow.serving import wire
from deflow.serving.batching import REMEMBERED, Latencies
from deflow.serving.server import NUMBER, WRONG, PolicyServer
from deflow.types import Spec
from tests.agents.tester import Acting
from tests.commands import ROOT, run, start
from tests.conftest import CKPT

TOKEN = "correct-horse-battery"


class Noise(Acting):
    """Acts with its noise, moved by the first number that it sees, once it may; remembers how many it decided for."""

    def __init__(self, spec: Spec) -> None:
        super().__init__(spec)
        self.rows: list[int] = []
        self.begun, self.may = threading.Semaphore(0), threading.Event()
        self.may.set()

    def act(self, observations: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        self.rows.append(len(z))
        self.begun.release()
        assert self.may.wait(60)
        return (observations.flatten(1)[:, :1].float() + z).tanh()


class Client:
    """Speaks as OpenPI's `WebsocketClientPolicy` does: the same connection, the same bytes, the same errors."""

    def __init__(self, port: int, token: str | None = None, **settings: Any) -> None:
        headers = {"Authorization": f"Api-Key {token}"} if token else None
        uri = f"ws://127.0.0.1:{port}"
        settings |= {"compression": None, "max_size": None, "additional_headers": headers, "proxy": None}
        self.line: ClientConnection = connect(uri, **settings)
        self.metadata = self.answer()

    def ask(self, request: Any) -> None:
        self.line.send(request if isinstance(request, bytes | str) else msgpack.packb(request, default=as_openpi))

    def answer(self) -> dict[str, Any]:
        reply = self.line.recv(timeout=60)
        if isinstance(reply, str):
            raise RuntimeError(f"Error in inference server:\n{reply}")
        return msgpack.unpackb(reply, object_hook=from_openpi)

    def infer(self, request: Any) -> dict[str, Any]:
        self.ask(request)
        return self.answer()

    def act(self, observation: Any, **more: Any) -> np.ndarray:
        return self.infer({"observation": observation, **more})["actions"]

    def has_arrived(self) -> None:
        """Wait until the server has what was sent (a pong comes after that) and its turn was (another one)."""
        for _ in range(2):
            assert self.line.ping().wait(60)


def as_openpi(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return {b"__ndarray__": True, b"data": value.tobytes(), b"dtype": value.dtype.str, b"shape": value.shape}
    return {b"__npgeneric__": True, b"data": value.item(), b"dtype": value.dtype.str}


def from_openpi(value: dict) -> Any:
    return np.ndarray(value[b"shape"], value[b"dtype"], value[b"data"]) if b"__ndarray__" in value else value


class Serving:
    """A server in a thread of its own, as long as a `with` lasts."""

    def __init__(self, policy: Policy, seed: int = 0, token: str | None = None) -> None:
        self.server = PolicyServer(policy, seed, token)
        self._started: Queue[int] = Queue()
        self._thread = threading.Thread(target=asyncio.run, args=(self._serve(),))

    async def _serve(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        await self.server.run("127.0.0.1", 0, self._stop, self._started.put)

    def stop(self) -> None:
        with suppress(RuntimeError):  # it has stopped by itself, and its loop is closed
            self._loop.call_soon_threadsafe(self._stop.set)

    def __enter__(self) -> Serving:
        self._thread.start()
        self.port = self._started.get(timeout=60)
        return self

    def __exit__(self, *_: Any) -> None:
        self.stop()
        self._thread.join(60)
        assert not self._thread.is_alive()


@contextmanager
def serving(policy: Policy, clients: int = 1, **more: Any) -> Iterator[tuple[Serving, list[Client]]]:
    with Serving(policy, **more) as server:
        yield server, [Client(server.port, more.get("token")) for _ in range(clients)]


# What a robot is told.


def test_a_client_learns_what_it_may_send_and_gets_the_whole_plan() -> None:
    with serving(Policy(Noise(Spec(4, 6, horizon=3))), seed=5) as (server, [client]):
        told = {"observation_shape": [4], "observation_dtype": "float32", "horizon": 3, "action_dim": 2, "seed": 5}
        assert client.metadata == told
        reply = client.infer({"observation": np.zeros(4)})
        assert (reply["actions"].shape, reply["actions"].dtype) == ((3, 2), np.float32)
        timing = reply["server_timing"]
        assert timing["batch"] == 1
        assert 0 < timing["infer_ms"] == timing["infer_ms_p50"] == timing["infer_ms_p99"]
        with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/healthz") as health:
            assert (health.status, health.read()) == (200, b"OK\n")


def test_carried_out_one_after_the_other_plans_are_what_act_gives() -> None:
    agent = Noise(Spec(4, 6, horizon=3))
    alone = Policy(agent, seed=2)
    with serving(Policy(agent), seed=2) as (_, [client]):
        for start in range(3):  # an observation in the midst of a plan changes nothing
            plan = client.act(np.full(4, start, np.float64))
            assert np.array_equal(plan, [alone.act(np.full(4, start)) for _ in range(3)])


def test_reset_begins_the_noise_anew_if_there_is_a_seed() -> None:
    agent = Noise(Spec(4, 2))
    alone = Policy(agent, seed=0)
    with serving(Policy(agent)) as (_, [client]):
        first = client.act([0, 0, 0, 0])
        assert np.array_equal(first[0], alone.act(np.zeros(4)))
        assert client.infer({"reset": True}) == {}
        assert np.array_equal(client.act([0.0, 0, 0, 0])[0], alone.act(np.zeros(4)))
        assert client.infer({"reset": np.int64(0)}) == {}
        assert np.array_equal(client.act(np.zeros(4)), first)
        alone.reset(seed=7)
        assert np.array_equal(client.act(np.zeros(4), reset=7)[0], alone.act(np.zeros(4)))


def test_images_stay_images() -> None:
    image = np.full((1, 2, 2, 3), 255, np.uint8)
    with serving(Policy(Noise(Spec(12, 2, image=(1, 2, 2, 3))))) as (_, [client]):
        assert client.metadata["observation_dtype"] == "uint8"
        assert (client.act(image) > 0.99).all()
        with pytest.raises(RuntimeError, match="is an image of uint8, got float64"):
            client.act(image / 255)


def test_the_pages_example_works() -> None:
    page = (ROOT / "docs" / "serving.md").read_text()
    _, code = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names: dict[str, Any] = {}
    with serving(Policy(Noise(Spec(4, 6, horizon=3))), clients=0) as (server, _):
        exec(code.replace(":8000", f":{server.port}"), names)  # the page's own text
    assert names["actions"].shape == (3, 2)


# Together.


def test_who_asks_in_the_meantime_is_decided_for_together_and_as_alone() -> None:
    agent = Noise(Spec(4, 2))
    with serving(Policy(agent), clients=6, seed=1) as (server, clients):
        agent.rows.clear()
        while agent.begun.acquire(blocking=False):
            pass
        agent.may.clear()
        clients[0].ask({"observation": np.zeros(4)})
        assert agent.begun.acquire(timeout=60)
        for number, client in enumerate(clients[1:], 1):
            client.ask({"observation": np.full(4, number)})
            client.has_arrived()
        agent.may.set()
        replies = [client.answer() for client in clients]
        assert agent.rows == [1, 5]
        assert [reply["server_timing"]["batch"] for reply in replies] == [1, 5, 5, 5, 5, 5]
    for number, reply in enumerate(replies):
        alone = Policy(agent, seed=1).act(np.full(4, number))
        np.testing.assert_allclose(reply["actions"][0], alone, rtol=0, atol=1e-6)  # some units in float32's last place
    assert server.server.summary.startswith("6 decisions for 6 connections, 0 requests refused; 3.0 decided together; ")


def test_a_trained_policy_decides_for_many_as_for_each(finished_run: Callable[..., Path]) -> None:
    path = finished_run()
    observations = np.random.default_rng(0).standard_normal((3, 4, 2))  # decision, client
    with serving(deflow.load(path), clients=4, seed=3) as (_, clients):
        found = []
        for step in observations:
            for client, observation in zip(clients, step, strict=True):
                client.ask({"observation": observation})
            found.append([client.answer()["actions"][0] for client in clients])
    for number in range(4):
        alone = deflow.load(path, seed=3)
        expected = [alone.act(observation) for observation in observations[:, number]]
        np.testing.assert_allclose(np.array(found)[:, number], expected, atol=1e-5)  # as sums of another order round


# What is wrong.


def array(data: Any = bytes(16), dtype: Any = "<f4", shape: Any = (4,)) -> dict[str, Any]:
    return {"observation": {b"__ndarray__": True, b"data": data, b"dtype": dtype, b"shape": shape}}


LISTS = "an observation has shape (4,), in an array or in lists of numbers"
WRONG_REQUESTS: Sequence[tuple[Any, str]] = [
    ({"observation": np.zeros(3)}, "an observation has shape (4,), got (3,)"),
    ({"observation": np.zeros((2, 4))}, "an observation has shape (4,), got (2, 4)"),
    ({"observation": [0, 0, 0, np.nan]}, "the observation holds NaN or infinity"),
    ({"observation": [0, 0, 0, 1e300]}, "the observation holds NaN or infinity"),
    ({"observation": [0] * 3}, f"{LISTS}, got a list of 3 in place of 4"),
    ({"observation": [[0] * 4] * 2}, f"{LISTS}, got a list of 2 in place of 4"),
    ({"observation": [[0], 0, 0, 0]}, f"{LISTS}, got list"),
    ({"observation": ["0"] * 4}, f"{LISTS}, got str"),
    ({"observation": [b"0"] * 4}, f"{LISTS}, got bytes"),
    ({"observation": [0, 0, 0, None]}, f"{LISTS}, got NoneType"),
    ({"observation": None}, f"{LISTS}, got NoneType"),
    ({"observation": "0"}, f"{LISTS}, got str"),
    ({"observation": {"state": [0] * 4}}, f"{LISTS}, got dict"),
    # NumPy makes each text as long as the longest: gigabytes of these.
    ({"observation": ["x" * 2000] + [""] * 200_000}, f"{LISTS}, got a list of 200001 in place of 4"),
    ({"observation": [b"x" * 2000] + [b""] * 200_000}, f"{LISTS}, got a list of 200001 in place of 4"),
    ({"observation": [np.zeros(2), 0, 0, 0]}, "an observation is an array of shape (4,): "),
    ({"observation": [0] * 4, "prompt": "go"}, "unknown key 'prompt': a request holds observation or reset"),
    ({}, "a request is a map with observation or reset, got {}"),
    ([1], "a request is a map with observation or reset, got [1]"),
    ({"reset": False}, "reset is true, or the seed with which the noise begins anew, got False"),
    ({"reset": -1}, "seed must be a whole number of at least 0, got -1"),
    ({"reset": 1.5}, "seed must be a whole number of at least 0, got 1.5"),
    ({"observation": [0] * 4, "reset": "a\nb"}, "seed must be a whole number of at least 0, got a b"),
    ("hello", "a request is a binary message of msgpack, got text"),
    (b"", "the message is not msgpack: "),
    (b"\xc1", "the message is not msgpack: "),
    (b"\x80\x80", "the message is not msgpack: "),
    (b"\xdd\xff\xff\xff\xff", "the message is not msgpack: "),
    (b"\x91" * 10_000, "the message is not msgpack: "),
    (b"\x81\xa1\xff\x00", "the message is not msgpack: "),
    (b"\x81\x01\x00", "the message is not msgpack: "),
    (bytes(range(0xC1, 0x100)), "the message is not msgpack: "),
    (array(dtype="|O8", data=bytes(32)), "an array must hold numbers, got dtype '|O8'"),
    (array(dtype="|V4"), "an array must hold numbers, got dtype '|V4'"),
    (array(dtype="i4,i4"), "an array must hold numbers, got dtype 'i4,i4'"),
    (array(dtype=[["a", "<f4"]]), "an array must hold numbers, got dtype [["),
    (array(shape=[5]), "an array of dtype <f4 and shape (5,) must have 20 bytes, got 16 bytes"),
    (array(shape=[2**62, 2**62]), "must have 85070591730234615865843651857942052864 bytes, got 16 bytes"),
    (array(shape=[-4]), "an array's shape must be a list of at most 32 sizes, got [-4]"),
    (array(shape=[1] * 33), "an array's shape must be a list of at most 32 sizes, got [1, 1"),
    (array(shape=4), "an array's shape must be a list of at most 32 sizes, got 4"),
    (array(data="0" * 16), "must have 16 bytes, got str"),
    ({"observation": {b"__npgeneric__": True, b"data": "1", b"dtype": "<U1"}}, "a scalar must be a number, got str"),
]


def test_a_wrong_request_is_answered_by_a_line_and_changes_nothing() -> None:
    agent = Noise(Spec(4, 2))
    with serving(Policy(agent)) as (server, [client]):
        for request, says in WRONG_REQUESTS:
            with pytest.raises(RuntimeError) as refused:
                client.infer(request)
            line = str(refused.value).removeprefix("Error in inference server:\n")
            assert says in line
            assert "\n" not in line
            assert len(line) < 520
        assert np.array_equal(client.act(np.zeros(4))[0], Policy(agent).act(np.zeros(4)))
    assert f" {len(WRONG_REQUESTS)} requests refused" in server.server.summary


def test_lists_of_the_wrong_sizes_never_become_an_array(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Policy, "single", lambda *_: pytest.fail("it becomes one"))
    with serving(Policy(Noise(Spec(4, 2)))) as (_, [client]):
        for text in ("x", b"x"):
            for observation in ([text * 2000] + [text[:0]] * 200_000, [text] * 4, [[text]] * 4):
                with pytest.raises(RuntimeError, match=re.escape(LISTS)):
                    client.act(observation)


def test_a_message_that_is_too_large_closes_its_connection_alone() -> None:
    with serving(Policy(Noise(Spec(4, 2))), clients=2) as (_, [client, other]):
        most = WRONG + NUMBER * 4
        with pytest.raises(RuntimeError, match="not msgpack"):
            client.infer(bytes(most))
        with pytest.raises(ConnectionClosedError, match=f"message too big.*exceeds limit of {most} bytes"):
            client.infer(bytes(most + 1))
        assert other.act(np.zeros(4)).shape == (1, 2)


def test_actions_that_are_nan_are_not_sent() -> None:
    class Lost(Noise):
        def act(self, observations: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
            return z / (observations[:, :1] != 3)

    with serving(Policy(Lost(Spec(4, 2)))) as (_, [client]):
        with pytest.raises(RuntimeError, match="actions for this observation are NaN or infinite"):
            client.act(np.full(4, 3))
        assert np.isfinite(client.act(np.zeros(4))).all()


def test_a_bug_costs_an_answer_and_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    class Failing(Noise):
        def act(self, observations: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
            if observations.any():
                raise ZeroDivisionError("of its own")
            return z.tanh()

    with serving(Policy(Failing(Spec(4, 2)))) as (_, [client]):
        with pytest.raises(RuntimeError, match="the server failed: ZeroDivisionError: of its own"):
            client.act(np.ones(4))
        assert client.act(np.zeros(4)).shape == (1, 2)
    (record,) = caplog.records
    assert record.exc_info is not None


def test_other_protocols_and_pages_of_browsers_are_turned_away(caplog: pytest.LogCaptureFixture) -> None:
    with serving(Policy(Noise(Spec(4, 2)))) as (server, [client]):
        with pytest.raises(InvalidStatus, match="403"):
            connect(f"ws://127.0.0.1:{server.port}", origin="http://evil.example", proxy=None)  # type: ignore[arg-type]
        with socket.create_connection(("127.0.0.1", server.port)) as line:
            line.sendall(b"\x00\xffhello\r\n\r\n")
            while line.recv(1000):
                pass
        assert client.act(np.zeros(4)).shape == (1, 2)
    assert not caplog.records


# Who may ask.


def test_without_the_token_nobody_is_served() -> None:
    with serving(Policy(Noise(Spec(4, 2))), token=TOKEN) as (server, [client]):
        assert client.act(np.zeros(4)).shape == (1, 2)
        for token in (None, TOKEN[:-1], f"{TOKEN}!", "ü"):
            with pytest.raises(InvalidStatus, match="401"):
                Client(server.port, token)
        address = f"http://127.0.0.1:{server.port}/"
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(address)
        assert urllib.request.urlopen(f"{address}healthz").status == 200


def test_a_token_is_made_where_other_machines_can_connect(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv(command.TOKEN, raising=False)
    assert [command.token_for(host) for host in ("127.0.0.1", "127.0.0.2", "::1")] == [None] * 3
    made = [command.token_for(host) for host in ("0.0.0.0", "::", "", "robot.example", "localhost")]
    assert len(set(made)) == 5
    assert capsys.readouterr().out == "".join(f"token: {token}\n" for token in made)
    monkeypatch.setenv(command.TOKEN, TOKEN)
    assert [command.token_for(host) for host in ("127.0.0.1", "0.0.0.0")] == [TOKEN] * 2
    assert capsys.readouterr().out == ""
    for bad in ("short", "with spaces in between", "ümläute-are-no-header"):
        monkeypatch.setenv(command.TOKEN, bad)
        with pytest.raises(UserError, match="DEFLOW_TOKEN must have at least 16"):
            command.token_for("0.0.0.0")


# How it ends.


def test_what_was_asked_is_answered_before_it_stops() -> None:
    agent = Noise(Spec(4, 2))
    with serving(Policy(agent), clients=3) as (server, [first, second, idle]):
        agent.may.clear()
        while agent.begun.acquire(blocking=False):
            pass
        first.ask({"observation": np.zeros(4)})
        assert agent.begun.acquire(timeout=60)
        for _ in range(2):
            second.ask({"observation": np.zeros(4)})  # one waits for the policy, one for its turn
        second.has_arrived()
        server.stop()
        with pytest.raises(ConnectionClosedOK, match=r"1001 .*the server stops"):
            idle.answer()
        with pytest.raises(OSError):  # noqa: PT011 (refused, by whatever name)
            Client(server.port)
        agent.may.set()
        for client, answers in ((first, 1), (second, 2)):
            assert [client.answer()["actions"].shape for _ in range(answers)] == [(1, 2)] * answers
            with pytest.raises(ConnectionClosedOK, match="1001"):
                client.answer()


def test_a_client_that_does_not_read_keeps_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "PATIENCE", 0.1)
    with serving(Policy(Noise(Spec(4, 10**6))), clients=0) as (server, _):
        client = Client(server.port, max_queue=1)  # beyond one answer, they fill the buffers in between
        for _ in range(6):
            client.ask({"observation": np.zeros(4)})
    with pytest.raises(ConnectionClosedError):
        _ = [client.answer() for _ in range(6)]


def test_a_second_signal_waits_for_no_client(finished_run: Callable[..., Path]) -> None:
    process = start("serve.py", f"ckpt={finished_run() / CKPT}", "port=0", "threads=1")
    process.wait_for(lambda: "serving at" in process.output()[0])
    port = int(process.output()[0].partition("ws://127.0.0.1:")[2].partition(":")[0])
    with socket.create_connection(("127.0.0.1", port)) as deaf:  # to the goodbye: it answers nothing
        deaf.sendall(
            b"GET / HTTP/1.1\r\nHost: a\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
        )
        assert deaf.recv(4096).startswith(b"HTTP/1.1 101")
        for _ in range(2):
            process.send_signal(signal.SIGINT)
        _, errors = process.communicate()
    assert (process.wait(), errors) == (0, "")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_command_serves_until_a_signal(number: int, finished_run: Callable[..., Path]) -> None:
    process = start("serve.py", f"ckpt={finished_run() / CKPT}", "port=0", "seed=4", "threads=1")
    process.wait_for(lambda: "serving at" in process.output()[0])
    said = process.output()[0]
    assert said.endswith(": observation (2,), actions (1, 2); Ctrl-C ends it\n")
    client = Client(int(said.partition("ws://127.0.0.1:")[2].partition(":")[0]))
    action = deflow.load(finished_run(), seed=4).act(np.zeros(2))
    np.testing.assert_allclose(client.act(np.zeros(2))[0], action, atol=1e-6)
    process.send_signal(number)
    with pytest.raises(ConnectionClosedOK, match="1001"):
        client.answer()
    out, errors = process.communicate()
    assert (process.wait(), errors) == (0, "")
    assert "\n1 decisions for 1 connections, 0 requests refused; 1.0 decided together; p50 " in out


def test_an_address_that_cannot_be_listened_on_is_one_line(finished_run: Callable[..., Path]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = run("serve.py", f"ckpt={finished_run()}", f"port={port}")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == f"error: port {port} of 127.0.0.1 is in use: choose another port=, or port=0\n"
    for host in ("192.0.2.1", "a..b", "a\0b"):
        server = PolicyServer(Policy(Noise(Spec(4, 2))))
        with pytest.raises(UserError, match=f"cannot listen on port 0 of {re.escape(host)}: "):
            asyncio.run(server.run(host, 0, asyncio.Event(), lambda _: pytest.fail("listens")))


def test_a_missing_package_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=r"^serving needs the packages websockets and msgpack: pip install websockets msg"
    ):
        command.serve({})  # type: ignore[arg-type]


# What it stands on.


def test_quantiles_are_of_the_last_durations() -> None:
    latencies = Latencies()
    for duration in range(3 * REMEMBERED):
        latencies.add(float(duration))
    assert latencies.count == 3 * REMEMBERED
    assert latencies.quantile(0) == 2 * REMEMBERED
    assert latencies.quantile(0.5) == 2.5 * REMEMBERED
    assert latencies.quantile(1) == 3 * REMEMBERED - 1


@pytest.mark.parametrize("dtype", ["?", "u1", "<i8", ">f4", "f2", "f8"])
@pytest.mark.parametrize("shape", [(), (0,), (3, 2)])
def test_arrays_of_numbers_go_both_ways(dtype: str, shape: tuple[int, ...]) -> None:
    sent = np.arange(math.prod(shape)).reshape(shape).astype(dtype)
    read = wire.unpack(wire.pack({"a": [sent]}))["a"][0]
    assert (read.dtype, read.shape) == (sent.dtype, sent.shape)
    assert np.array_equal(read, sent)


@pytest.mark.parametrize("value", [np.array([object()]), np.array(["a"]), object()])
def test_nothing_else_is_sent(value: Any) -> None:
    with pytest.raises(TypeError, match="cannot send"):
        wire.pack(value)
