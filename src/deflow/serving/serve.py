"""`serve.py`: a policy for robots and other programs to ask, over a WebSocket."""

from __future__ import annotations

import asyncio
import os
import re
import secrets
from ipaddress import ip_address
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from deflow.cores import set_threads
from deflow.errors import UserError
from deflow.extras import require
from deflow.loading import ACTING, load
from deflow.signals import SIGNALS

if TYPE_CHECKING:
    from deflow.serving.server import PolicyServer

TOKEN = "DEFLOW_TOKEN"  # variable


def serve(config: DictConfig) -> None:
    """Serve a policy until a signal; the last line says how long its decisions took.

    Raises:
        UserError: if a package is missing, the checkpoint cannot be loaded, or the address not be listened on.
    """
    require("serving", "websockets", "msgpack")
    from deflow.serving.server import PolicyServer  # needs them

    set_threads(config.threads)
    acting = {name: config[name] for name in ACTING}
    policy = load(config.ckpt, device=config.device, trust=config.trust, run_seed=config.run_seed, **acting)
    server = PolicyServer(policy, config.seed, token_for(config.host))
    asyncio.run(_serve_until_a_signal(server, config.host, config.port))
    print(server.summary)


def token_for(host: str) -> str | None:
    """What clients must know: the user's token, or, where other machines can connect, a new one, which is shown.

    Raises:
        UserError: for a token that can be guessed, or stand in no header.
    """
    token = os.environ.get(TOKEN)
    if token:
        if not re.fullmatch(r"[!-~]{16,}", token):
            raise UserError(f"{TOKEN} must have at least 16 letters, digits and signs, without spaces")
        return token
    if _is_this_machine(host):
        return None
    token = secrets.token_urlsafe(32)
    print(f"token: {token}", flush=True)
    return token


def _is_this_machine(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:  # a name, which may stand for anything
        return False


async def _serve_until_a_signal(server: PolicyServer, host: str, port: int) -> None:
    loop, stop = asyncio.get_running_loop(), asyncio.Event()

    def on_signal() -> None:
        if stop.is_set():
            server.hang_up()  # a second signal does not wait
        stop.set()

    def on_start(port: int) -> None:
        where = f"[{host}]" if ":" in host else host
        told = server.metadata
        takes, gives = tuple(told["observation_shape"]), (told["horizon"], told["action_dim"])
        print(f"serving at ws://{where}:{port}: observation {takes}, actions {gives}; Ctrl-C ends it", flush=True)

    for number in SIGNALS:
        loop.add_signal_handler(number, on_signal)
    await server.run(host, port, stop, on_start)
