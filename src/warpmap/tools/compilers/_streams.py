"""When the work of CUDA streams runs, worked out in plain Python.

A stream is a queue: what is in it runs in order. Streams know nothing of each
other, unless one waits for an event that another records.
"""

from collections.abc import Callable

from warpmap.trace import Frame, Lanes, Span, Trace


class Timeline:
    """When the work of some streams runs.

    Work begins when all that its stream was given before has ended, and the
    unit that it needs is free. Units take turns in the order of the calls.

    Examples:
        >>> line = Timeline()
        >>> line.launch("a", "kernels", "fill", 5)
        Span(start=0, end=5, text='fill', mark='')
        >>> filled = line.event("a")
        >>> line.wait("b", filled)
        >>> line.launch("b", "copies", "send", 2)
        Span(start=5, end=7, text='send', mark='')
    """

    def __init__(self) -> None:
        """No stream has work yet."""
        self._streams: dict[str, float] = {}
        self._units: dict[str, float] = {}

    def launch(self, stream: str, unit: str, text: str, time: float) -> Span:
        """Give a stream work that keeps a unit busy for some time."""
        start = max(self._streams.get(stream, 0), self._units.get(unit, 0))
        self._streams[stream] = self._units[unit] = start + time
        return Span(start, start + time, text)

    def event(self, stream: str) -> float:
        """The moment when all that the stream was given so far has ended."""
        return self._streams.get(stream, 0)

    def wait(self, stream: str, event: float) -> None:
        """Let what the stream is given from now on begin after an event."""
        self._streams[stream] = max(self.event(stream), event)


def overlap(
    chunks: int,
    streams: int,
    copy: float,
    kernel: float,
    record: Callable[[str, Span], object] | None = None,
) -> float:
    """Copy chunks in, compute, copy out, on streams that take turns.

    Args:
        chunks: Pieces of the work.
        streams: Streams that the pieces are dealt to.
        copy: Time of a copy of one chunk, either way.
        kernel: Time of the kernel on one chunk.
        record: Told of each piece of work, and by which unit it is done.

    Returns:
        When the last has ended.

    Raises:
        ValueError: If there is nothing to do, or no stream.

    Examples:
        >>> overlap(4, 1, 1.0, 1.0), overlap(4, 3, 1.0, 1.0)
        (12.0, 6.0)
    """
    for name, value in (("chunks", chunks), ("streams", streams)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    line, end = Timeline(), 0.0
    for chunk in range(chunks):
        stream = f"{chunk % streams}"
        for unit, time in (("in", copy), ("kernel", kernel), ("out", copy)):
            span = line.launch(stream, unit, f"{chunk}", time)
            end = max(end, span.end)
            if record:
                record(unit, span)
    return end


def stream_trace(
    chunks: int = 4, streams: int = 2, copy: float = 2.0, kernel: float = 3.0
) -> Trace:
    """Chunks are copied in, computed and copied out, on some streams.

    Args:
        chunks: Pieces of the work, 1 to 8.
        streams: Streams that the pieces are dealt to, 1 to 8.
        copy: Time of a copy of one chunk, either way, in ms; above 0.
        kernel: Time of the kernel on one chunk, in ms; above 0.

    Returns:
        A lane for each unit of the GPU; spans are numbered by chunk.

    Raises:
        ValueError: If an argument is out of range.

    Examples:
        >>> stream_trace()[-1].caption
        'All is done after 17 ms; in one stream it takes 28 ms.'
    """
    for name, value in (("chunks", chunks), ("streams", streams)):
        if not 1 <= value <= 8:
            raise ValueError(f"{name} must be 1 to 8, got {value}")
    for name, time in (("copy", copy), ("kernel", kernel)):
        if not 0 < time < 1e6:
            raise ValueError(f"{name} must be above 0 and finite, got {time}")
    done: list[tuple[str, Span]] = []
    end = overlap(chunks, streams, copy, kernel, lambda *one: done.append(one))

    def lanes(count: int) -> Lanes:
        spans = [
            (unit, Span(s.start, s.end, s.text, "new" if i == count else "on"))
            for i, (unit, s) in enumerate(done[:count], start=1)
        ]
        return Lanes(
            [
                (name, [s for u, s in spans if u == unit])
                for unit, name in (
                    ("in", "copy in"),
                    ("kernel", "kernel"),
                    ("out", "copy out"),
                )
            ],
            "ms",
            end,
        )

    frames = [
        Frame(
            f"Chunk {s.text}, {unit}, in stream {int(s.text) % streams}: "
            f"{s.start:g} to {s.end:g} ms.",
            lanes(i),
        )
        for i, (unit, s) in enumerate(done, start=1)
    ]
    alone = overlap(chunks, 1, copy, kernel)
    frames.append(
        Frame(
            f"All is done after {end:g} ms; in one stream it takes "
            f"{alone:g} ms.",
            lanes(len(done) + 1),
        )
    )
    return frames
