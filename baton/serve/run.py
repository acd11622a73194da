"""`baton serve`: opens the port, loads the models, answers until a signal, and lets running answers end."""

import asyncio
import logging
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

import uvicorn

from baton.serve.guard import State, log
from baton.serve.preferences import Preferences, default_file
from baton.serve.settings import KEY_VARIABLE, ApiKey, Limits, Pooling, read_key
from baton.serve.vllm import Choice, chosen, command
from baton.targets import open_target
from handoff.errors import UserError
from handoff.parent import Parent
from training.importing import quick_imports
from training.terminal import shown


def serve(
    targets: Sequence[str],
    *,
    host: str,
    port: int,
    engine: Choice,
    key_file: Path | None,
    pooling: Pooling,
    limits: Limits,
    ui: bool,
    preferences: Path | None,
) -> int:
    """Serves until a signal; returns the exit code.

    Raises:
        UserError: the port is in use, a model cannot be opened, or two have one name; or the key cannot be read, or
            preferences cannot be kept.
    """
    if preferences is not None and not ui:
        raise UserError("--preferences: only the page for chats writes them; add --ui")
    key = read_key(key_file)
    parents = [open_target(target) for target in targets]
    names = [parent.name for parent in parents]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"two models are named {twice[0]}, and a request could not tell them apart; serve one of them")
    kept = Preferences(preferences or default_file(parents[0])) if ui else None
    with quick_imports():
        import torch

    if chosen(engine, torch.cuda.device_count()) == "vllm":
        if len(parents) > 1:
            raise UserError("vLLM serves one model; name one, or use --engine inprocess")
        if ui:
            raise UserError("--ui: vLLM has no page for chats; use --engine inprocess")
        made = command(parents[0], host, port, key, limits)
        print(shown("starting " + " ".join(made.arguments)), flush=True)
        made.run()
    listening = listen(host, port)
    with listening:
        return _serve(parents, listening, State(limits, None if key is None else ApiKey(key), host), pooling, kept)


def _serve(
    parents: Sequence[Parent], listening: socket.socket, state: State, pooling: Pooling, kept: Preferences | None
) -> int:
    with quick_imports():
        from transformers.utils.logging import disable_progress_bar

        from baton.serve.app import Application
        from baton.serve.page import add_page
        from baton.serve.served import Served, Worker

    disable_progress_bar()
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
    served = [Served(parent, state.limits, pooling) for parent in parents]
    host, port = listening.getsockname()[:2]
    for one in served:
        if one.as_text:
            log.warning("%s: conversations are put to it as text, because %s", shown(one.name), one.as_text)
    if state.key is None and host not in ("127.0.0.1", "::1"):
        log.warning("no key: everyone who reaches %s can use the models; set %s or --api-key-file", host, KEY_VARIABLE)
    worker = Worker(served)
    worker.start()
    try:
        address = f"[{host}]" if ":" in host else host
        ready = f"serving {', '.join(one.name for one in served)} at http://{address}:{port}/v1"
        application = Application(served, worker, state)
        if kept is not None:
            add_page(application.fast, state, [one.name for one in served], kept)
            ready += f"\nchat at http://{address}:{port}/, preferences go to {kept.path}"
        server = Server(application.asgi, state, ready)
        asyncio.run(server.serve(sockets=[listening]))
        return server.code
    finally:
        worker.close()


def listen(host: str, port: int) -> socket.socket:
    """A socket at this address, before a model is loaded. Raises UserError."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:
        raise UserError(f"--host {host}: {error}") from error
    made = socket.socket(family, socket.SOCK_STREAM)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
        made.listen(128)
    except OSError as error:
        made.close()
        raise UserError(
            f"{host}:{port} cannot be used ({error.strerror}); another program may have the port: choose one with "
            "--port, or 0 for any free one"
        ) from error
    return made


class Server(uvicorn.Server):
    """uvicorn, with our answer to signals: the first lets running answers end, the second does not wait for them."""

    def __init__(self, app: object, state: State, ready: str) -> None:
        super().__init__(
            uvicorn.Config(
                app,  # type: ignore[arg-type]
                log_config=None,
                access_log=False,
                lifespan="off",
                server_header=False,
                limit_concurrency=1000,
                timeout_keep_alive=30,
                timeout_graceful_shutdown=state.limits.drain_seconds,
            )
        )
        self._state, self._ready = state, ready
        self.code = 0

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Starts to listen, and says so."""
        await super().startup(sockets)
        print(shown(self._ready), flush=True)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal."""
        if self._state.draining:
            self.force_exit, self.code = True, 128 + sig
            return
        self._state.draining = self.should_exit = True
        log.info("%s: no new requests; running answers may take %d s", signal.Signals(sig).name,
                 self._state.limits.drain_seconds)  # fmt: skip
