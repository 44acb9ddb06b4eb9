"""A policy behind a WebSocket, in the protocol of OpenPI's clients: docs/serving.md."""

from __future__ import annotations

import asyncio
import copy
import errno
import hmac
import logging
import math
from collections.abc import Callable
from contextlib import suppress
from http import HTTPStatus
from typing import Any

import numpy as np
from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.frames import CloseCode
from websockets.http11 import Request, Response

from deflow.errors import UserError
from deflow.policy import AnyPolicy, checked_seed, noise_stream
from deflow.serving import wire
from deflow.serving.batching import Batcher

log = logging.getLogger(__name__)
library_log = logging.getLogger(f"{__name__}.websockets")
library_log.setLevel(logging.CRITICAL)  # it calls whatever a port scanner sends an error, with a traceback

KEYS = ("observation", "reset")  # of a request
HEALTH = "/healthz"
WRONG = 2**20  # bytes that a wrong request may have and still be told what is wrong
NUMBER = 9  # bytes of a number on the wire, at most
ONE_LINE = 500  # characters of an error, which may quote the request
PATIENCE = 5.0  # seconds that clients have to take their answers when the server stops
GOODBYE = 2.0  # seconds that a client has to say that it knows of a connection's end


class PolicyServer:
    """Answers each request with the actions that `Policy.act` would carry out one after the other.

    A connection is a robot of its own: its noise begins with the seed when it connects, and does not depend on other
    connections, nor on how many observations are decided together.

    Args:
        policy: may be shared with nobody while it serves.
        seed: with which the noise of each connection begins.
        token: without which nobody is served; None: everybody is.
    """

    def __init__(self, policy: AnyPolicy, seed: int = 0, token: str | None = None) -> None:
        self.policy, self.seed, self._token = policy, checked_seed(seed), token
        self._batcher = Batcher(policy)
        self._connections = self._refused = 0
        self._stopping = False
        self._open: set[ServerConnection] = set()
        self._listening: set[asyncio.Timeout] = set()  # of those that wait for a request

    @property
    def metadata(self) -> dict[str, Any]:
        """What a client is told when it connects."""
        spec = self.policy.spec
        return {
            "observation_shape": list(spec.observation_shape),
            "observation_dtype": "float32" if spec.image is None else "uint8",
            "horizon": spec.horizon,
            "action_dim": spec.action_dim // spec.horizon,
            "seed": self.seed,
        }

    @property
    def summary(self) -> str:
        """One line on what was done so far."""
        latencies, batches = self._batcher.latencies, self._batcher.batches
        line = f"{latencies.count} decisions for {self._connections} connections, {self._refused} requests refused"
        if not latencies.count:
            return line
        p50, p99 = latencies.quantile(0.5), latencies.quantile(0.99)
        return f"{line}; {latencies.count / batches:.1f} decided together; p50 {p50:.2f} ms, p99 {p99:.2f} ms"

    async def run(self, host: str, port: int, stop: asyncio.Event, on_start: Callable[[int], None]) -> None:
        """Serve until `stop`; then what was asked is answered, and all connections are closed.

        Args:
            host: address to listen on.
            port: 0: one that is free.
            stop: set when it shall end.
            on_start: called with the port, once clients can connect.

        Raises:
            UserError: if it cannot listen there.
        """
        working = asyncio.create_task(self._batcher.work())
        try:
            await self._batcher.warm_up()
            server = await self._listen(host, port)
            on_start(server.sockets[0].getsockname()[1])
            await stop.wait()
            await self._close(server)
        finally:
            working.cancel()
            self.hang_up()  # on clients that do not take what they are sent
            await asyncio.wait([working])

    def hang_up(self) -> None:
        """Wait for no client any more."""
        for connection in self._open:
            connection.transport.abort()

    async def _listen(self, host: str, port: int) -> Server:
        try:
            return await serve(
                self._converse,
                host,
                port,
                process_request=self._admit,
                origins=[None],  # browsers name one: no page that is open on this machine shall move the robot
                compression=None,
                close_timeout=GOODBYE,
                max_size=WRONG + NUMBER * math.prod(self.policy.spec.observation_shape),
                logger=library_log,
            )
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise UserError(f"port {port} of {host} is in use: choose another port=, or port=0") from error
            raise UserError(f"cannot listen on port {port} of {host}: {error.strerror or error}") from error
        except ValueError as error:  # such as host=a..b
            raise UserError(f"cannot listen on port {port} of {host}: {error}") from error

    async def _close(self, server: Server) -> None:
        self._stopping = True
        server.close(close_connections=False)
        for waiting in self._listening:
            waiting.reschedule(asyncio.get_running_loop().time())
        with suppress(TimeoutError):
            async with asyncio.timeout(PATIENCE):
                await server.wait_closed()

    def _admit(self, connection: ServerConnection, request: Request) -> Response | None:
        """The answer to an HTTP request that does not become a WebSocket; None: it does."""
        if request.path == HEALTH:
            return connection.respond(HTTPStatus.OK, "OK\n")
        if self._token is None or _is_given(self._token, request):
            return None
        response = connection.respond(
            HTTPStatus.UNAUTHORIZED, "the header Authorization: Api-Key TOKEN is missing or wrong\n"
        )
        response.headers["WWW-Authenticate"] = "Api-Key"
        return response

    async def _converse(self, connection: ServerConnection) -> None:
        self._connections += 1
        self._open.add(connection)
        robot = Robot(self.policy, self.seed, self._batcher)
        try:
            await connection.send(wire.pack(self.metadata))
            while (message := await self._next(connection)) is not None:
                await connection.send(await self._answer(message, robot))
            await connection.close(CloseCode.GOING_AWAY, "the server stops")
        except ConnectionClosed:  # by the client, or by the library for a message that is too large
            pass
        finally:
            self._open.remove(connection)

    async def _next(self, connection: ServerConnection) -> bytes | str | None:
        """The next request; None: the server stops, and none is there."""
        try:
            async with asyncio.timeout(0 if self._stopping else None) as waiting:
                self._listening.add(waiting)
                return await connection.recv()
        except TimeoutError:
            return None
        finally:
            self._listening.discard(waiting)

    async def _answer(self, message: bytes | str, robot: Robot) -> bytes | str:
        """The reply; or text, by which OpenPI's clients know an error."""
        try:
            return wire.pack(await robot.answer(_request(message)))
        except UserError as error:
            self._refused += 1
            return _one_line(error)
        except Exception as error:  # a bug: of ours, or in the code of a policy of the user's own
            self._refused += 1
            log.exception("a request failed")
            return _one_line(f"the server failed: {type(error).__name__}: {error}")


class Robot:
    """What the server keeps of one connection: its noise."""

    def __init__(self, policy: AnyPolicy, seed: int, batcher: Batcher) -> None:
        self._policy, self._batcher = policy, batcher
        self._noise = noise_stream(seed)

    async def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """The reply to a request; one that is refused changes nothing.

        Raises:
            UserError: if the observation or the seed cannot be.
        """
        observation = self._observation(request["observation"]) if "observation" in request else None
        noise = self._after(request["reset"]) if "reset" in request else copy.deepcopy(self._noise)
        reply = {} if observation is None else await self._decide(observation, noise)
        self._noise = noise  # not before: what is refused has changed nothing
        return reply

    def _observation(self, sent: Any) -> np.ndarray:
        """What was sent as an observation; NumPy gets lists of the right sizes alone, others it may blow up."""
        shape = self._policy.spec.observation_shape
        _check_lists(sent, shape, f"an observation has shape {shape}, in an array or in lists of numbers")
        return self._policy.single(sent)

    def _after(self, reset: Any) -> np.random.Generator:
        """The noise after a reset, as `Policy.reset` has it; the client has the whole plan, so none is forgotten."""
        if reset is False or reset is None:
            raise UserError(f"reset is true, or the seed with which the noise begins anew, got {reset}")
        return copy.deepcopy(self._noise) if reset is True else noise_stream(checked_seed(reset))

    async def _decide(self, observation: np.ndarray, noise: np.random.Generator) -> dict[str, Any]:
        decision = await self._batcher.decide(observation, self._policy.draw_noise(noise))
        latencies = self._batcher.latencies
        timing = {
            "infer_ms": decision.milliseconds,
            "infer_ms_p50": latencies.quantile(0.5),
            "infer_ms_p99": latencies.quantile(0.99),
            "batch": decision.batch,
        }
        return {"actions": decision.actions, "server_timing": timing}


def _request(message: bytes | str) -> dict[str, Any]:
    if isinstance(message, str):
        raise UserError("a request is a binary message of msgpack, got text")
    request = wire.unpack(message)
    if not isinstance(request, dict) or not request:
        raise UserError(f"a request is a map with {' or '.join(KEYS)}, got {request!r}")
    for key in request:
        if key not in KEYS:
            raise UserError(f"unknown key {key!r}: a request holds {' or '.join(KEYS)}")
    return request


def _check_lists(sent: Any, shape: tuple[int, ...], expected: str) -> None:
    """Raise `UserError`, which begins with `expected`, for lists of other lengths, or that hold anything but numbers.

    An array in place of them is no concern of this: whatever its shape, it is no larger than the message.
    """
    if isinstance(sent, np.ndarray):
        return
    if isinstance(sent, list) and shape:
        if len(sent) != shape[0]:
            raise UserError(f"{expected}, got a list of {len(sent)} in place of {shape[0]}")
        for part in sent:
            _check_lists(part, shape[1:], expected)
    elif shape or not isinstance(sent, bool | int | float):
        raise UserError(f"{expected}, got {type(sent).__name__}")


def _is_given(token: str, request: Request) -> bool:
    """Whether a request has the token, in a time that does not tell how much of it is right."""
    given = request.headers.get_all("Authorization")
    return len(given) == 1 and hmac.compare_digest(given[0].encode(errors="replace"), f"Api-Key {token}".encode())


def _one_line(error: object) -> str:
    line = " ".join(str(error).split())
    return line if len(line) <= ONE_LINE else f"{line[:ONE_LINE]}..."
