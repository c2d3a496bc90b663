"""Which addresses the programs of a Triton kernel touch, in plain Python.

A block of addresses is a column of rows plus a row of columns. Here it is
written out, address by address, for the kernels of ``triton_language``.
"""

from collections.abc import Callable, Collection, Sequence

from warpmap.trace import Cell, Frame, Grid, Mark, Trace

Program = tuple[int, int]
Place = tuple[int, int]  # row and column
Matrix = Sequence[Sequence[float]]


def _check(**blocks: int) -> None:
    for name, size in blocks.items():
        if size < 1 or size & (size - 1):
            raise ValueError(f"{name} must be a power of two, got {size}")


def _programs(M: int, N: int, BLOCK_M: int, BLOCK_N: int) -> list[Program]:
    rows, cols = -(-M // BLOCK_M), -(-N // BLOCK_N)
    return [(m, n) for n in range(cols) for m in range(rows)]


def visit_blocks(
    M: int,
    N: int,
    stride: int,
    BLOCK_M: int,
    BLOCK_N: int,
    masked: bool = True,
    record: Callable[[Program, list[int], list[int]], object] | None = None,
) -> dict[int, int]:
    """Let a program visit each block of a matrix, as a kernel's loads would.

    Args:
        M: Rows.
        N: Columns.
        stride: Addresses from a row to the next.
        BLOCK_M: Rows of a block, a power of two.
        BLOCK_N: Columns of a block, a power of two.
        masked: Whether what lies outside of the matrix is left out.
        record: Told of each program, the addresses that it visits, and those
            that its mask leaves out.

    Returns:
        How often each address was visited.

    Raises:
        ValueError: If a size is out of range.

    Examples:
        >>> visit_blocks(1, 3, stride=3, BLOCK_M=1, BLOCK_N=4)
        {0: 1, 1: 1, 2: 1}
        >>> visit_blocks(1, 3, stride=3, BLOCK_M=1, BLOCK_N=4, masked=False)
        {0: 1, 1: 1, 2: 1, 3: 1}
    """
    _check(BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N)
    for name, size in (("M", M), ("N", N)):
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")
    if stride < N:
        raise ValueError(f"stride must be at least N = {N}, got {stride}")
    visits: dict[int, int] = {}
    for pid in _programs(M, N, BLOCK_M, BLOCK_N):
        rows = range(pid[0] * BLOCK_M, (pid[0] + 1) * BLOCK_M)
        cols = range(pid[1] * BLOCK_N, (pid[1] + 1) * BLOCK_N)
        block = {(row, col): row * stride + col for row in rows for col in cols}
        inside = [p for (i, j), p in block.items() if i < M and j < N]
        outside = [p for (i, j), p in block.items() if i >= M or j >= N]
        touched = inside if masked else [*block.values()]
        for address in touched:
            visits[address] = visits.get(address, 0) + 1
        if record:
            record(pid, touched, outside)
    return visits


def block_trace(
    M: int = 5,
    N: int = 6,
    stride: int = 6,
    BLOCK_M: int = 2,
    BLOCK_N: int = 4,
    masked: bool = True,
) -> Trace:
    """Programs visit the blocks of a matrix, one after another.

    Args:
        M: Rows of the matrix, 1 to 8.
        N: Columns, 1 to 12.
        stride: Addresses from a row to the next, N to 12.
        BLOCK_M: Rows of a block, a power of two up to 8.
        BLOCK_N: Columns of a block, a power of two up to 16.
        masked: Whether the kernel has a mask.

    Returns:
        The memory, a line for each row; a cell counts its visits.

    Raises:
        ValueError: If an argument is out of range.

    Examples:
        >>> block_trace()[-1].caption
        'All 30 elements were visited once.'
        >>> block_trace(masked=False)[-1].caption
        '8 elements were visited again, and 8 places that are none.'
    """
    for name, value, most in (
        ("M", M, 8),
        ("N", N, 12),
        ("stride", stride, 12),
        ("BLOCK_M", BLOCK_M, 8),
        ("BLOCK_N", BLOCK_N, 16),
    ):
        if not 1 <= value <= most:
            raise ValueError(f"{name} must be 1 to {most}, got {value}")
    elements = {r * stride + c for r in range(M) for c in range(N)}
    frames: Trace = []
    visits: dict[int, int] = {}
    # all that blocks reach: behind the matrix is what belongs to others
    reached = -(-M // BLOCK_M) * BLOCK_M - 1, -(-N // BLOCK_N) * BLOCK_N - 1
    lines = reached[0] + reached[1] // stride + 1

    def grid(now: Collection[int], out: Collection[int]) -> Grid:
        def cell(address: int) -> Cell:
            mark: Mark = ""
            if address in now:
                mark = "new" if address in elements else "gone"
            elif address in out:
                mark = "wait"
            elif address in elements:
                mark = "on"
            count = visits.get(address, 0)
            text = f"{count}" if count else "" if address in elements else "·"
            return Cell(text, mark)

        return Grid(
            [
                (
                    f"row {row}" if row < M else "behind",
                    [cell(row * stride + col) for col in range(stride)],
                )
                for row in range(lines)
            ],
            [f"+{col}" for col in range(stride)],
        )

    def record(pid: Program, now: list[int], out: list[int]) -> None:
        for address in now:
            visits[address] = visits.get(address, 0) + 1
        left = f"{len(out)} are masked" if out else "none is masked"
        if not masked:
            left = f"{len(out)} should not be" if out else "all are right"
        frames.append(
            Frame(
                f"Program {pid}: {BLOCK_M * BLOCK_N} addresses, {left}.",
                grid(now, out),
            )
        )

    done = visit_blocks(M, N, stride, BLOCK_M, BLOCK_N, masked, record)
    again = sum(done[p] > 1 for p in elements)
    none = len(set(done) - elements)
    said = f"All {len(elements)} elements were visited once."
    if again or none:
        said = (
            f"{again} elements were visited again, and {none} places that are "
            "none."
        )
    frames.append(Frame(said, grid((), ())))
    return frames


def matmul_blocks(
    a: Matrix,
    b: Matrix,
    BLOCK_M: int,
    BLOCK_N: int,
    BLOCK_K: int,
    record: Callable[[Program, list[Place], list[Place]], object] | None = None,
) -> list[list[float]]:
    """Product of two matrices, block by block, as ``_matmul_kernel``.

    Args:
        a: ``(M, K)``.
        b: ``(K, N)``.
        BLOCK_M: Rows of a block of the result, a power of two.
        BLOCK_N: Columns of it, a power of two.
        BLOCK_K: Terms of a step, a power of two.
        record: Told of each step, the program, and what it loads of ``a`` and
            of ``b``.

    Returns:
        ``(M, N)``.

    Raises:
        ValueError: If a block is no power of two.

    Examples:
        >>> matmul_blocks([[1, 2]], [[3], [4]], 1, 1, 2)
        [[11.0]]
    """
    _check(BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K)
    M, N, K = len(a), len(b[0]), len(b)
    c = [[0.0] * N for _ in range(M)]
    for pid in _programs(M, N, BLOCK_M, BLOCK_N):
        rows = range(pid[0] * BLOCK_M, min((pid[0] + 1) * BLOCK_M, M))
        cols = range(pid[1] * BLOCK_N, min((pid[1] + 1) * BLOCK_N, N))
        for first in range(0, K, BLOCK_K):
            terms = range(first, min(first + BLOCK_K, K))
            for i in rows:
                for j in cols:
                    c[i][j] = c[i][j] + sum(a[i][k] * b[k][j] for k in terms)
            if record:
                record(
                    pid,
                    [(i, k) for i in rows for k in terms],
                    [(k, j) for k in terms for j in cols],
                )
    return c


def matmul_trace(
    M: int = 4,
    N: int = 8,
    K: int = 6,
    BLOCK_M: int = 2,
    BLOCK_N: int = 4,
    BLOCK_K: int = 2,
) -> Trace:
    """Programs walk along K, and load a block of each matrix at every step.

    Args:
        M: Rows of A, 1 to 8.
        N: Columns of B, 1 to 8.
        K: Columns of A, which are the rows of B, 1 to 8.
        BLOCK_M: Rows of a block of the result, a power of two up to 8.
        BLOCK_N: Columns of it, a power of two up to 8.
        BLOCK_K: Terms of a step, a power of two up to 8.

    Returns:
        Above A, below B; a cell counts how often it was loaded.

    Raises:
        ValueError: If an argument is out of range.

    Examples:
        >>> matmul_trace()[-1].caption
        '144 elements were loaded: each of A 2 times, each of B 2 times.'
    """
    sizes = {"M": M, "N": N, "K": K}
    sizes |= {"BLOCK_M": BLOCK_M, "BLOCK_N": BLOCK_N, "BLOCK_K": BLOCK_K}
    for name, value in sizes.items():
        if not 1 <= value <= 8:
            raise ValueError(f"{name} must be 1 to 8, got {value}")
    _check(BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K)
    steps = len(_programs(M, N, BLOCK_M, BLOCK_N)) * -(-K // BLOCK_K)
    if steps > 150:
        raise ValueError(
            f"BLOCK_K must be larger: {steps} steps are too many to watch"
        )
    a, b = [[0] * K for _ in range(M)], [[0] * N for _ in range(K)]
    frames: Trace = []

    def grid(name: str, x: Matrix, now: Collection[Place]) -> Grid:
        def cell(i: int, j: int) -> Cell:
            mark: Mark = "new" if (i, j) in now else "on" if x[i][j] else ""
            return Cell(f"{x[i][j]}", mark)

        return Grid(
            [
                (f"{name} {i}", [cell(i, j) for j in range(len(row))])
                for i, row in enumerate(x)
            ],
            [f"{j}" for j in range(len(x[0]))],
        )

    def record(pid: Program, of_a: list[Place], of_b: list[Place]) -> None:
        for counts, places in ((a, of_a), (b, of_b)):
            for i, j in places:
                counts[i][j] += 1
        first = of_b[0][0]
        frames.append(
            Frame(
                f"Program {pid}, k from {first}: {len(of_a)} elements of A, "
                f"{len(of_b)} of B.",
                grid("A", a, of_a),
                grid("B", b, of_b),
            )
        )

    ones_a, ones_b = [[1.0] * K] * M, [[1.0] * N] * K
    matmul_blocks(ones_a, ones_b, BLOCK_M, BLOCK_N, BLOCK_K, record)
    total = sum(map(sum, a)) + sum(map(sum, b))
    frames.append(
        Frame(
            f"{total} elements were loaded: each of A {a[0][0]} times, "
            f"each of B {b[0][0]} times.",
            grid("A", a, ()),
            grid("B", b, ()),
        )
    )
    return frames
