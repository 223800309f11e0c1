"""Streams and events of the simulated device: which operations whoever looks may count on to be done.

Everything is computed at once, in the order of the program. What a real device would still be at is kept track of by clocks: how
many operations of each stream are known to be done, by the host and by each stream. Copies to RAM show their values, and copies
out of pinned memory are compared with what was copied, when the host comes to know of them, and not before.
"""

import threading
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

Clock = dict[int, int]
Complain = Callable[[str], None]


def later(one: Clock, other: Clock) -> Clock:
    """What is known once both are: the larger count of each stream."""
    return {number: max(one.get(number, 0), other.get(number, 0)) for number in one.keys() | other.keys()}


def garbage(to: Tensor) -> None:
    """Puts into memory of the host what nobody should read: NaN, or the largest integer."""
    if to.dtype.is_floating_point:
        to.fill_(torch.nan)
    else:
        to.fill_(1 if to.dtype == torch.bool else torch.iinfo(to.dtype).max)


@dataclass
class Copy:
    """A copy under way. stream, position: where it is in the order. host: memory in RAM. values: that come to it, or stay."""

    stream: int
    position: int
    host: Tensor
    values: Tensor
    down: bool

    def finish(self, complain: Complain) -> None:
        """The host knows of it."""
        if self.down:
            self.host.copy_(self.values)
        elif not torch.equal(*(part.reshape(-1).contiguous().view(torch.uint8) for part in (self.host, self.values))):
            complain("pinned memory was changed before the copy out of it was done")


@dataclass
class Use:
    """Of one storage: the stream that it was made on, its last write, reads since, and streams that `record_stream` named."""

    home: int
    write: tuple[int, int] = (0, 0)
    reads: Clock = field(default_factory=dict)
    recorded: set[int] = field(default_factory=set)


class Timeline:
    """What is known to be done, on one device. complain: told of what a real device would not promise."""

    def __init__(self, complain: Complain):
        self.complain = complain
        # Of all that is known: threads wait for copies of others, and must not go on before these are finished.
        self.lock = threading.RLock()
        self.host: Clock = {}
        self.clocks: dict[int, Clock] = defaultdict(dict)
        self.copies: list[Copy] = []
        self.uses: dict[int, Use] = {}
        self._current = threading.local()
        self._streams = 0

    def new_stream(self) -> int:
        """Number of another stream; 0 is the default one."""
        self._streams += 1
        return self._streams

    @property
    def current(self) -> int:
        """Of this thread."""
        return getattr(self._current, "stream", 0)

    @current.setter
    def current(self, stream: int) -> None:
        self._current.stream = stream

    def enqueue(self) -> int:
        """Another operation on the current stream: its position there."""
        clock = self.clocks[self.current]
        clock[self.current] = clock.get(self.current, 0) + 1
        return clock[self.current]

    def follow(self, stream: int, clock: Clock) -> None:
        """A stream goes on after everything in `clock`."""
        with self.lock:
            self.clocks[stream] = later(self.clocks[stream], clock)

    def wait(self, clock: Clock) -> None:
        """The host knows of everything in `clock`."""
        with self.lock:
            self.host = later(self.host, clock)
            done = [copy for copy in self.copies if copy.position <= self.host.get(copy.stream, 0)]
            self.copies = [copy for copy in self.copies if copy.position > self.host.get(copy.stream, 0)]
            for copy in done:
                copy.finish(self.complain)

    def wait_for_all(self) -> None:
        """The host waits for the device."""
        for clock in list(self.clocks.values()):
            self.wait(clock)

    def download(self, to: Tensor, values: Tensor) -> None:
        """A copy into pinned memory begins."""
        garbage(to)
        self.copies.append(Copy(self.current, self.enqueue(), to, values.clone(), True))

    def upload(self, source: Tensor) -> None:
        """A copy out of pinned memory begins."""
        self.copies.append(Copy(self.current, self.enqueue(), source, source.clone(), False))

    def touch(self, key: int, written: bool) -> None:
        """An operation of the current stream, the last one enqueued, reads or writes a storage."""
        stream, clock = self.current, self.clocks[self.current]
        use = self.uses.setdefault(key, Use(stream))
        for number, position in (use.write, *use.reads.items()) if written else (use.write,):
            if number != stream and clock.get(number, 0) < position:
                self.complain("memory is used on a stream that has not waited for the stream that it was last used on")
        if written:
            use.write, use.reads = (stream, clock.get(stream, 0)), {}
        else:
            use.reads[stream] = clock.get(stream, 0)

    def freed(self, key: int) -> None:
        """A storage is let go of: the next one in its place may be written by its home stream at once."""
        use = self.uses.pop(key, None)
        if use is None:
            return
        known = later(self.clocks[use.home], self.host)
        for number, position in (use.write, *use.reads.items()):
            if number not in (use.home, *use.recorded) and known.get(number, 0) < position:
                self.complain("memory was freed while another stream may use it, without record_stream")


def stand_ins(timeline: Timeline, waited: Callable[[str], None]) -> dict[str, type]:
    """`Stream`, `Event` and `StreamContext` for torch.cuda. waited: told when the host waits for a whole stream."""

    class Event:
        """Marks a place in a stream."""

        def __init__(self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False):
            self.clock: Clock = {}

        def record(self, stream: "Stream | None" = None) -> None:
            with timeline.lock:
                self.clock = dict(timeline.clocks[timeline.current if stream is None else stream.number])

        def wait(self, stream: "Stream | None" = None) -> None:
            timeline.follow(timeline.current if stream is None else stream.number, self.clock)

        def query(self) -> bool:
            timeline.wait(self.clock)
            return True

        def synchronize(self) -> None:
            timeline.wait(self.clock)

    class Stream:
        """An order of operations."""

        def __init__(self, device: object = None, priority: int = 0, number: int | None = None):
            self.number = timeline.new_stream() if number is None else number

        def wait_stream(self, other: "Stream") -> None:
            timeline.follow(self.number, timeline.clocks[other.number])

        def wait_event(self, event: Event) -> None:
            event.wait(self)

        def record_event(self, event: Event | None = None) -> Event:
            event = event or Event()
            event.record(self)
            return event

        def synchronize(self) -> None:
            waited("Stream.synchronize")
            timeline.wait(timeline.clocks[self.number])

        def query(self) -> bool:
            timeline.wait(timeline.clocks[self.number])
            return True

        def __eq__(self, other: object) -> bool:
            return isinstance(other, Stream) and other.number == self.number

        def __hash__(self) -> int:
            return self.number

    class StreamContext:
        """Makes a stream the current one."""

        def __init__(self, stream: Stream | None):
            self.stream = stream

        def __enter__(self) -> None:
            self.before = timeline.current
            if self.stream is not None:
                timeline.current = self.stream.number

        def __exit__(self, *_: object) -> None:
            timeline.current = self.before

    return {"Stream": Stream, "Event": Event, "StreamContext": StreamContext}
