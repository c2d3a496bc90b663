"""Every element is touched once, in the emulator as on a GPU."""

import itertools
import math
import random
import re
import subprocess
from pathlib import Path

import pytest
import torch
from aot import compile_cuda

from warpmap.tools.compilers import _streams
from warpmap.tools.compilers import cuda_programming as module
from warpmap.tools.compilers._streams import Timeline, overlap, stream_trace
from warpmap.tools.compilers.cuda_programming import (
    WALKS,
    Dim3,
    Thread,
    axpy,
    axpy_once,
    gpu_kernel,
    launch,
    touch,
    walk_trace,
)
from warpmap_site.traces import check, impure_imports

SOURCE = Path(module.__file__).with_suffix(".cu")
PAGE = Path(__file__).parents[3] / "docs/tools/compilers/cuda_programming.md"

# box, grid, block: a line, a plane, a box; too small a grid, too large a one
LAUNCHES = [
    ((1, 1, 1), (1,), (1,)),
    ((40, 1, 1), (2,), (8,)),
    ((7, 1, 1), (3,), (32,)),
    ((9, 5, 1), (2, 2), (4, 2)),
    ((9, 5, 1), (1, 3), (16, 4)),
    ((5, 4, 3), (2, 1, 2), (2, 3, 1)),
    ((6, 7, 8), (3, 2, 1), (2, 2, 4)),
]


def owner_of(element, box, grid, block):
    """The number of the thread that must come, from the element alone."""
    X, Y, _ = box
    grid, block = ((*d, 1, 1)[:3] for d in (grid, block))
    x, rest = element % X, element // X
    place = (x, rest % Y, rest // Y)
    # coordinates of the thread in the whole grid, and in its block
    at = [p % (g * b) for p, g, b in zip(place, grid, block, strict=True)]
    (bx, by, bz), (tx, ty, tz) = (
        [a // b for a, b in zip(at, block, strict=True)],
        [a % b for a, b in zip(at, block, strict=True)],
    )
    number = bx + grid[0] * (by + grid[1] * bz)
    thread = tx + block[0] * (ty + block[1] * tz)
    return number * math.prod(block) + thread


def touches(kernel, box, grid, block, seed=None):
    owner, visits = [-1] * math.prod(box), [0] * math.prod(box)
    launch(kernel, grid, block, owner, visits, *box, seed=seed)
    return owner, visits


def check_touch(kernel, launches):
    for box, grid, block in launches:
        owner, visits = touches(kernel, box, grid, block)
        assert visits == [1] * math.prod(box)
        assert owner == [
            owner_of(i, box, grid, block) for i in range(math.prod(box))
        ]


def random_launches(count):
    draw = random.Random(0)
    for _ in range(count):
        axes = draw.randint(1, 3)
        sizes = [
            tuple(draw.randint(1, most) for _ in range(axes))
            for most in (12, 3, 4)
        ]
        yield (*sizes[0], 1, 1)[:3], sizes[1], sizes[2]


# The emulator


def test_every_element_is_touched_once_by_the_thread_that_must():
    check_touch(touch, [*LAUNCHES, *random_launches(40)])


@pytest.mark.parametrize("walk", WALKS)
def test_axpy_agrees_with_a_loop(walk):
    for n, blocks, threads in itertools.product((1, 7, 64), (1, 3), (1, 8, 33)):
        if walk == "one element each" and blocks * threads < n:
            continue
        x, y = [random.random() for _ in range(n)], [random.random()] * n
        want = [3.0 * a + b for a, b in zip(x, y, strict=True)]
        launch(WALKS[walk], blocks, threads, 3.0, x, y, n, seed=1)
        assert y == want


def test_too_small_a_grid_leaves_the_rest_out_in_silence():
    y = [0.0] * 100
    launch(axpy_once, 3, 16, 1.0, [1.0] * 100, y, 100)
    assert y == [1.0] * 48 + [0.0] * 52


def step_of_a_block(at, owner, visits, X, Y, Z):
    """The stride forgets the other blocks."""
    for x in range(at.blockIdx.x * at.blockDim.x + at.threadIdx.x, X,
                   at.blockDim.x):  # fmt: skip
        visits[x] += 1
        yield x


def end_included(at, owner, visits, X, Y, Z):
    for x in at.along(0, X + 1):
        visits[x % X] += 1
        yield x


def block_left_out(at, owner, visits, X, Y, Z):
    for x in range(at.threadIdx.x, X, at.gridDim.x * at.blockDim.x):
        visits[x] += 1
        yield x


def columns_first(at, owner, visits, X, Y, Z):
    for y, x in itertools.product(at.along(1, Y), at.along(0, X)):
        owner[x * Y + y] = at.block_number * math.prod(at.blockDim) + at.number
        visits[x * Y + y] += 1
        yield x


@pytest.mark.parametrize(
    "wrong", [step_of_a_block, end_included, block_left_out, columns_first]
)
def test_a_wrong_walk_is_caught(wrong):
    with pytest.raises(AssertionError):
        check_touch(wrong, LAUNCHES[1:5])


def test_warps_are_cut_from_threads_with_x_fastest():
    torch_order = torch.cartesian_prod(*(torch.arange(d) for d in (3, 4, 8)))
    for number, (z, y, x) in enumerate(torch_order.tolist()):
        at = Thread(Dim3(1), Dim3(8, 4, 3), Dim3(0, 0, 0), Dim3(x, y, z))
        assert at.number == number


def test_blocks_come_in_any_order_and_nothing_changes():
    def order(seed):
        seen = []
        owner, visits = [-1] * 60, [0] * 60
        launch(touch, (3, 2), (4, 2), owner, visits, 10, 6, seed=seed,
               record=lambda block, _: seen.append(block))  # fmt: skip
        return tuple(seen), tuple(owner)

    orders, owners = zip(*map(order, range(5)), strict=True)
    assert len(set(orders)) > 1
    assert len(set(owners)) == 1


@pytest.mark.parametrize(
    ("grid", "block", "says"),
    [
        (0, 1, r"grid must be 1 to .* got \(0, 1, 1\)"),
        ((1, 65536), 1, "grid must be 1 to"),
        (2**31, 1, "grid must be 1 to"),
        (1, (1, 1, 65), r"block must be 1 to \(1024, 1024, 64\)"),
        (1, (32, 33), "at most 1024 threads, got 32 x 33 x 1 = 1056"),
        (1, (), r"block must have 1 to 3 sizes, got \(\)"),
        ((1, 1, 1, 1), 1, "grid must have 1 to 3 sizes"),
    ],
)
def test_a_launch_that_cuda_refuses_is_refused(grid, block, says):
    with pytest.raises(ValueError, match=says):
        launch(axpy, grid, block, 1.0, [], [], 0)


# Traces


@pytest.mark.parametrize("walk", WALKS)
def test_the_trace_shows_who_touched_what(walk):
    frames = check("walk_trace", walk_trace(30, 2, 5, walk))
    x, y, owners = [1.0] * 30, [0.0] * 30, {}

    def record(block, touched):
        owners.update(
            {i: f"{block.x}.{at.threadIdx.x}" for at, i in touched.items()}
        )

    launch(WALKS[walk], 2, 5, 1.0, x, y, 30, record=record)
    shown = [c.text for _, row in frames[-1].picture.rows for c in row]
    assert shown == [owners.get(i, "") for i in range(30)]
    assert [bool(text) for text in shown] == [v == 1.0 for v in y]


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: walk_trace(n=97), "n must be 1 to 96, got 97"),
        (lambda: walk_trace(blocks=0), "blocks must be 1 to 8, got 0"),
        (lambda: walk_trace(threads=17), "threads must be 1 to 16, got 17"),
        (lambda: walk_trace(walk="jump"), "walk must be one of"),
        (lambda: stream_trace(chunks=9), "chunks must be 1 to 8, got 9"),
        (lambda: stream_trace(copy=-1.0), "copy must be above 0"),
        (lambda: stream_trace(kernel=math.nan), "kernel must be above 0"),
        (lambda: overlap(0, 1, 1, 1), "chunks must be at least 1, got 0"),
        (lambda: overlap(1, 0, 1, 1), "streams must be at least 1, got 0"),
    ],
)
def test_bad_input_is_named(call, says):
    with pytest.raises(ValueError, match=says):
        call()


@pytest.mark.parametrize("chunks", [1, 2, 5, 8])
@pytest.mark.parametrize(("copy", "kernel"), [(2.0, 3.0), (4.0, 1.0)])
def test_streams_overlap_as_a_pipeline_must(chunks, copy, kernel):
    all_three = 2 * copy + kernel
    assert overlap(chunks, 1, copy, kernel) == chunks * all_three
    # with a stream for each chunk the slowest unit never waits
    best = all_three + (chunks - 1) * max(copy, kernel)
    assert overlap(chunks, chunks, copy, kernel) == best


def test_work_keeps_the_order_of_its_stream_unit_and_events():
    draw = random.Random(0)
    for _ in range(50):
        line, done, waits = Timeline(), [], dict.fromkeys("abc", 0.0)
        for _ in range(20):
            stream, unit = draw.choice("abc"), draw.choice("kc")
            if draw.random() < 0.3:
                other = draw.choice("abc")
                line.wait(stream, line.event(other))
                ends = [s.end for st, _, s in done if st == other]
                # an event waits for what its stream waits for, too
                waits[stream] = max([waits[stream], waits[other], *ends])
                continue
            span = line.launch(stream, unit, "", draw.randint(1, 9))
            before = [s.end for st, u, s in done if st == stream or u == unit]
            assert span.start == max([waits[stream], *before])
            done.append((stream, unit, span))


def test_the_trace_of_streams_shows_the_very_pipeline():
    for chunks, streams in itertools.product((1, 4, 8), (1, 2, 5)):
        frames = check("stream_trace", stream_trace(chunks, streams))
        lanes = frames[-1].picture
        assert lanes.end == overlap(chunks, streams, 2.0, 3.0)
        assert max(s.end for _, lane in lanes.lanes for s in lane) == lanes.end
        assert [len(lane) for _, lane in lanes.lanes] == [chunks] * 3


def test_the_modules_run_where_there_is_no_torch():
    assert impure_imports(module.__name__) == []
    assert impure_imports(_streams.__name__) == []


# What the compiler makes of it


def squeeze(code):
    """Instructions without addresses, register numbers and float types."""
    lines = []
    for line in code.splitlines():
        line = re.sub(r"/\*.*?\*/", "", line).strip().rstrip(";").strip()
        line = re.sub(r"\b(ld|st)\.global\.[fb]32", r"\1.global.32", line)
        line = re.sub(r"%[a-z]+\d+", "%", line)
        line = re.sub(r"\b(U?[RP])\d+", r"\1", line).replace(".reuse", "")
        lines.append(" ".join(line.split()))
    return [line for line in lines if line]


def in_order(excerpt, code):
    """Whether all lines of an excerpt stand in the code, in this order."""
    rest = iter(code)
    return all(line in rest for line in excerpt)


@pytest.mark.slow
@pytest.mark.nvcc
def test_the_page_shows_what_nvcc_and_ptxas_make_of_the_source(tmp_path):
    import triton

    fences = re.findall(
        r"^```text\n(.*?)^```", PAGE.read_text("utf-8"), re.S | re.M
    )
    (ptx,) = (f for f in fences if "ld.global" in f)
    (sass,) = (f for f in fences if "LDG" in f)
    for out, options in {
        "ptx": ["-arch=compute_90a"],
        "cubin": ["-gencode=arch=compute_90a,code=sm_90a"],
    }.items():
        subprocess.run(
            ["nvcc", *options, f"-{out}", SOURCE, "-o", tmp_path / out],
            check=True,
        )
    nvdisasm = triton.knobs.nvidia.nvdisasm.path
    made = subprocess.run(
        [nvdisasm, "-c", tmp_path / "cubin"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    made = re.search(r"\.text\.axpy_once:(.*?)BRA", made, re.S)[1]
    told = (tmp_path / "ptx").read_text()
    told = re.search(r"entry axpy_once\((.*?)^}", told, re.S | re.M)[1]
    assert in_order(squeeze(ptx), squeeze(told))
    assert in_order(squeeze(sass), squeeze(made))
    # the check would see an instruction that is not there
    assert not in_order([*squeeze(sass), "LDG.E R, desc[UR][R.64]"],
                        squeeze(made))  # fmt: skip


@pytest.mark.nvcc
def test_every_kernel_fits_in_registers():
    kernels = compile_cuda(SOURCE)
    for kernel in kernels.values():
        assert kernel.spills == kernel.stack == kernel.shared == 0
    once = kernels["axpy_once"].opcodes
    assert (once["LDG.E"], once["FFMA"], once["STG.E"]) == (2, 1, 1)
    # the loop is unrolled by four, and a remainder is left
    assert kernels["axpy"].opcodes["FFMA"] == 5


# On a GPU


def gpu_touch(box, grid, block):
    owner = torch.full((math.prod(box),), -1, device="cuda")
    visits = torch.zeros(math.prod(box), dtype=torch.int32, device="cuda")
    gpu_kernel("touch")(grid, block, owner, visits, *box)
    return owner.tolist(), visits.tolist()


@pytest.mark.gpu
@pytest.mark.sanitize
def test_the_gpu_touches_what_the_emulator_touches():
    for box, grid, block in [*LAUNCHES, *random_launches(40)]:
        assert gpu_touch(box, grid, block) == touches(touch, box, grid, block)


@pytest.mark.gpu
@pytest.mark.sanitize
@pytest.mark.parametrize("n", [1, 255, 256, 257, 100_000])
def test_axpy_agrees_with_float64(n):
    x, start = torch.randn(n, device="cuda"), torch.randn(n, device="cuda")
    exact = 2.5 * x.double() + start.double()
    # one rounding: the product is not rounded before the sum
    bound = exact.abs() * 2.0**-24 + 2.0**-149
    covering = -(-n // 256)
    for name, grid in (("axpy_once", covering), ("axpy", covering),
                       ("axpy", 1), ("axpy", 3)):  # fmt: skip
        y = start.clone()
        gpu_kernel(name)(grid, 256, 2.5, x, y, n)
        assert ((y.double() - exact).abs() <= bound).all()


@pytest.mark.gpu
def test_more_than_2_to_the_31_elements():
    n = 2**31 + 100
    x, y = torch.ones(n, device="cuda"), torch.zeros(n, device="cuda")
    gpu_kernel("axpy")(1056, 256, 1.0, x, y, n)
    gpu_kernel("axpy_once")(-(-n // 256), 256, 1.0, x, y, n)
    assert (y == 2).all()


@pytest.mark.gpu
@pytest.mark.parametrize(
    "blocks",
    [pytest.param(3, marks=pytest.mark.sanitize), 2**22, 2**22 + 1, 2**22 + 7],
)
def test_an_index_of_32_bits_wraps(blocks):
    last = torch.full((1,), -1, dtype=torch.int32, device="cuda")
    gpu_kernel("index_32_bits")(blocks, 1024, last)
    # the element is number (blocks - 1) * 1024
    assert last.item() % 2**32 == (blocks - 1) * 1024 % 2**32


@pytest.mark.gpu
@pytest.mark.sanitize
def test_a_late_copy_copies():
    x = torch.full((1,), 7, dtype=torch.int32, device="cuda")
    y, times = torch.zeros_like(x), torch.zeros(2, device="cuda").long()
    gpu_kernel("copy_late")(1, 1, x, y, times, 100_000)
    begin, end = times.tolist()
    assert y.item() == 7
    assert end >= begin + 100_000


@pytest.mark.gpu
def test_streams_keep_their_own_order_and_only_events_join_them():
    late = gpu_kernel("copy_late")
    one = torch.ones(1, dtype=torch.int32, device="cuda")
    first, second = torch.cuda.Stream(), torch.cuda.Stream()
    for joined in (False, True):
        x, y = torch.zeros_like(one), torch.full_like(one, -1)
        times = torch.zeros(3, 2, dtype=torch.int64, device="cuda")
        torch.cuda.synchronize()
        with torch.cuda.stream(first):
            late(1, 1, one, x, times[0], 20_000_000)
            late(1, 1, one, x, times[1], 1000)
            filled = torch.cuda.Event()
            filled.record()
        with torch.cuda.stream(second):
            if joined:
                second.wait_event(filled)
            late(1, 1, x, y, times[2], 1000)
        torch.cuda.synchronize()
        (_, end), (begin, last), (reads, _) = times.tolist()
        assert begin >= end  # within a stream
        assert (reads >= last) == joined
        assert y.item() == int(joined)  # without the event it read too early


@pytest.mark.gpu
def test_a_launch_returns_before_the_kernel_has_run():
    one = torch.ones(1, dtype=torch.int32, device="cuda")
    times = torch.zeros(2, dtype=torch.int64, device="cuda")
    gpu_kernel("copy_late")(1, 1, one, one.clone(), times, 0)  # compiled now
    done = torch.cuda.Event()
    gpu_kernel("copy_late")(1, 1, one, one.clone(), times, 500_000_000)
    done.record()
    assert not done.query()
    torch.cuda.synchronize()
    assert done.query()
