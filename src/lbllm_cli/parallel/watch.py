"""Whether all ranks are alive, and how the first of them ended: what a collective operation that never returns cannot say."""

import os
import threading
import time
from datetime import timedelta
from typing import Any

# A rank beats so often, and is given up after so long without: its machine or its network is gone. A slow disk holds up no beat.
BEAT, LOST = 3.0, 45.0
# What the others have to end by themselves once one has ended: they save what they can.
GRACE = 20.0
_ENDED, _CODE = "ended", "code"


class Watch:
    """Beats of this rank, and an eye on those of the others, in a thread of its own and by its own connection.

    connect: makes a key-value store of `torch.distributed`, that all ranks share.
    """

    def __init__(self, connect: Any, rank: int, size: int):
        self.store, self.rank, self.size = connect(), rank, size
        self._beats = connect()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="lbllm-watch", daemon=True)
        self._seen = [("", time.monotonic())] * size
        self._beats.set(f"beat{rank}", "0")

    def start(self) -> None:
        """From now on a rank that is lost ends this one."""
        self._thread.start()

    def stop(self) -> None:
        """The end is near and wanted."""
        self._over.set()
        self._thread.join(2 * BEAT)

    def end(self, code: int) -> bool:
        """Says that this rank ends with an exit code. Returns whether it is the first, whose message is the one to be read."""
        try:
            if self.store.add(_ENDED, 1) == 1:
                self.store.set(_CODE, str(code))
                return True
        except RuntimeError:
            pass  # With the store its machine is gone, and the message of whoever lost it first has been said there.
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

    def _run(self) -> None:
        count = 0
        while not self._over.wait(BEAT):
            count += 1
            try:
                self._beats.set(f"beat{self.rank}", str(count))
                if self._beats.check([_CODE]):
                    self._leave(int(self._beats.get(_CODE)))
                    return
                silent = self._silent()
            except RuntimeError:
                self._leave(1, "the rank that the others meet at is gone")
                return
            if silent is not None:
                self._leave(1, f"rank {silent} has been silent for {LOST:.0f} seconds")
                return

    def _silent(self) -> int | None:
        """A rank whose beat has not changed for too long."""
        now = time.monotonic()
        for rank in range(self.size):
            beat = self._beats.get(f"beat{rank}").decode() if self._beats.check([f"beat{rank}"]) else ""
            if beat != self._seen[rank][0]:
                self._seen[rank] = (beat, now)
            elif now - self._seen[rank][1] > LOST:
                return rank
        return None

    def _leave(self, code: int, lost: str | None = None) -> None:
        """Ends this process, which may stand in an operation that never returns; what is on disk is whole at every moment."""
        if lost is not None:
            first = self.end(code)
            if first:
                os.write(2, f"lbllm: {lost}; run the same command again to resume\n".encode())
        elif self._over.wait(GRACE):
            return
        os._exit(code)


def connection(host: str, port: int, prefix: str, serves: bool) -> Any:
    """A store that this process serves or finds at another; waits up to five minutes for it."""
    import torch.distributed as dist

    stores: Any = dist
    store = stores.TCPStore(host, port, is_master=serves, timeout=timedelta(minutes=5), wait_for_workers=False, multi_tenant=True)
    return stores.PrefixStore(prefix, store)
