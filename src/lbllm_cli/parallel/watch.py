"""Whether all ranks are alive, and how the first of them ended: what a collective operation that never returns cannot say."""

import os
import threading
import time
from datetime import timedelta
from typing import Any

# A rank beats so often, and is given up after so long without: its machine or its network is gone. A slow disk holds up no beat.
BEAT, LOST = 3.0, 45.0
# One that has not begun yet may still be reading its libraries.
LATE = 300.0
# What the others have to end by themselves once one has ended: they save what they can.
GRACE = 20.0
_ENDED, _CODE, _LEFT = "ended", "code", "left"


class Watch:
    """Beats of this rank, and an eye on those of the others, in a thread of its own and by its own connection.

    connect: makes a key-value store of `torch.distributed`, that all ranks share. serves: whether the store is in this process.
    speaks: whether this rank is the one of its machine that has a message where the store is gone, and with it the first's.
    """

    def __init__(self, connect: Any, rank: int, size: int, serves: bool, speaks: bool):
        self.store, self.rank, self.size = connect(), rank, size
        self.serves, self.speaks = serves, speaks
        # The first connection may stand in a wait of the main thread.
        self._beats = connect()
        self._over = threading.Event()
        self._threads = [
            threading.Thread(target=target, name=f"lbllm-{name}", daemon=True)
            for name, target in (("watch", self._run), ("store", self._guard))
        ]
        # Time is counted in own beats: a whole run that was stopped and goes on has lost nobody.
        self._count = 0
        self._seen = [("", 0)] * size
        self._beats.set(f"beat{rank}", "0")

    def start(self) -> None:
        """From now on a rank that is lost ends this one."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """The end is near and wanted."""
        self._over.set()
        for thread in self._threads:
            thread.join(2 * BEAT)

    def end(self, code: int) -> bool:
        """Says that this rank ends with an exit code. Returns whether it is the first, whose message is the one to be read."""
        return self._end(self.store, code)

    def _end(self, store: Any, code: int) -> bool:
        try:
            if store.add(_ENDED, 1) == 1:
                store.set(_CODE, str(code))
                return True
        except RuntimeError:
            return self.speaks
        return False

    def ended(self, wait: float = 0.0) -> int | None:
        """Exit code of the first rank that has ended. wait: seconds to wait for one."""
        until = time.monotonic() + wait
        while True:
            try:
                if self.store.check([_CODE]):
                    return int(self.store.get(_CODE))
            except RuntimeError:
                return 1
            if time.monotonic() >= until:
                return None
            time.sleep(0.2)

    def part(self) -> None:
        """The last a rank does. A store in this process would be gone with it: it stays until the others have read how it ended,
        as soon as they look."""
        until = time.monotonic() + BEAT + 1
        try:
            self._beats.set(f"{_LEFT}{self.rank}", "")
            while self.serves and time.monotonic() < until and not self._beats.check([f"{_LEFT}{i}" for i in range(self.size)]):
                time.sleep(0.05)
        except RuntimeError:
            pass  # Nobody is left to be waited for.

    def _run(self) -> None:
        while not self._over.wait(BEAT):
            try:
                self._beats.set(f"beat{self.rank}", str(self._count + 1))
                if self._beats.check([_CODE]):
                    self._leave(int(self._beats.get(_CODE)))
                    return
                silent = self._silent()
            except RuntimeError:
                if not self._over.is_set():
                    self._leave(1, "the rank that the others meet at is gone")
                return
            if silent is not None:
                self._leave(1, silent)
                return
            self._count += 1

    def _silent(self) -> str | None:
        """What there is to be said of a rank whose beat has not changed for too long."""
        for rank in range(self.size):
            beat = self._beats.get(f"beat{rank}").decode() if self._beats.check([f"beat{rank}"]) else ""
            if beat != self._seen[rank][0]:
                self._seen[rank] = (beat, self._count)
                continue
            waited = (self._count - self._seen[rank][1]) * BEAT
            if beat and waited > LOST:
                return f"rank {rank} has been silent for {LOST:.0f} seconds"
            if not beat and waited > LATE:
                return f"rank {rank} has not come within {LATE:.0f} seconds"
        return None

    def _guard(self) -> None:
        """Ends this process where the store does not answer: whoever asks a machine that is gone waits for ever."""
        before, same = 0, 0
        while not self._over.wait(BEAT):
            before, same = self._count, same + 1 if self._count == before else 0
            if same * BEAT > LOST + GRACE:
                self._tell("the rank that the others meet at has been silent for too long", self.speaks)
                os._exit(1)

    def _leave(self, code: int, lost: str | None = None) -> None:
        """Ends this process, which may stand in an operation that never returns; what is on disk is whole at every moment."""
        if lost is not None:
            self._tell(lost, self._end(self._beats, code))
        elif self._over.wait(GRACE):
            return
        self.part()
        os._exit(code)

    @staticmethod
    def _tell(lost: str, first: bool) -> None:
        if first:
            os.write(2, f"lbllm: {lost}; run the same command again to resume\n".encode())


def connection(host: str, port: int, prefix: str, serves: bool) -> Any:
    """A store that this process serves or finds at another; waits up to five minutes for it."""
    import torch.distributed as dist

    stores: Any = dist
    store = stores.TCPStore(host, port, is_master=serves, timeout=timedelta(minutes=5), wait_for_workers=False, multi_tenant=True)
    return stores.PrefixStore(prefix, store)
