"""A network between trainer and server that can be cut and can fall silent, as a process without root has it."""

import asyncio
import contextlib
import socket
import struct
import threading
from typing import Any

_RESET = struct.pack("ii", 1, 0)


class Proxy:
    """Forwards TCP connections to `target` ("host:port") from `address`, in a thread of its own, until `close`."""

    def __init__(self, target: str) -> None:
        self._host, port = target.rsplit(":", 1)
        self._port = int(port)
        self._loop = asyncio.new_event_loop()
        self._writers: set[asyncio.StreamWriter] = set()
        self._flows = asyncio.Event()
        self._is_cut = False
        threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True).start()
        self._listener = self._run(asyncio.start_server(self._accept, "127.0.0.1", 0))
        self.heal()
        self.address = f"127.0.0.1:{self._listener.sockets[0].getsockname()[1]}"

    def cut(self) -> None:
        """Resets every connection, and new ones at once."""

        async def cut() -> None:
            self._is_cut = True
            self._flows.set()
            for writer in list(self._writers):
                _reset(writer)

        self._run(cut())

    def stall(self) -> None:
        """Nothing gets through, and nobody is told."""

        async def stall() -> None:
            self._flows.clear()

        self._run(stall())

    def heal(self) -> None:
        async def heal() -> None:
            self._is_cut = False
            self._flows.set()

        self._run(heal())

    def close(self) -> None:
        self.cut()
        self._loop.call_soon_threadsafe(self._listener.close)
        self._loop.call_soon_threadsafe(self._loop.stop)

    def _run(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(20)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._is_cut:
            _reset(writer)
            return
        await self._flows.wait()
        try:
            there, back = await asyncio.open_connection(self._host, self._port)
        except OSError:
            _reset(writer)
            return
        self._writers |= {writer, back}
        try:
            await asyncio.gather(self._pump(reader, back), self._pump(there, writer))
        finally:
            self._writers -= {writer, back}
            for each in (writer, back):
                with contextlib.suppress(OSError):
                    each.close()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(1 << 16):
                await self._flows.wait()
                writer.write(data)
                await writer.drain()
        with contextlib.suppress(OSError):
            writer.close()


def _reset(writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    writer.transport.abort()
