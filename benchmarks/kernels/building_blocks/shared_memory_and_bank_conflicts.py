"""Cycles of requests to shared memory, beside the count of wavefronts.

One block of 32 warps keeps one SM busy; each thread repeats its reads for
ever from the same place, with four under way. The clock is the SM's own.
"""

import statistics

import torch

from warpmap.kernels.building_blocks.shared_memory_and_bank_conflicts import (
    THREADS,
    cycles_per_request,
    swizzle,
    wavefronts,
)

REPEATS = 5


def _patterns() -> list[tuple[str, int, list[int]]]:
    """Name, bytes of an access and addresses of every request."""
    found = []
    for width in (4, 8, 16):
        for stride in (1, 2, 3, 4, 8, 16, 32, 33):
            wanted = [width * stride * t for t in range(THREADS)]
            found.append((f"stride {stride}", width, wanted))
        column = [128 * row for row in range(THREADS)]
        base = width.bit_length() - 1  # keeps an access together
        bits = 7 - base
        moved = [swizzle(a, bits, base, bits) for a in column]
        padded = [(128 + width) * row for row in range(THREADS)]
        found += [
            ("column", width, column),
            ("column, padded", width, padded),
            (f"column, Swizzle<{bits},{base},{bits}>", width, moved),
            # threads that share: the last two are more than the count knows
            ("all the same", width, [0] * THREADS),
            ("pairs the same", width, [t // 2 * width for t in range(THREADS)]),
        ]
    return found


def rows() -> list[dict]:
    """Time every request.

    Returns:
        A row for each: the wavefronts predicted, the cycles measured, and the
        ways, which are both over those of a request without conflicts.

    Raises:
        RuntimeError: If there is no GPU, or a thread read a wrong word.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("this benchmark needs one NVIDIA GPU")
    found = []
    for name, width, wanted in _patterns():
        cycles = statistics.median(
            cycles_per_request(wanted, width) for _ in range(REPEATS)
        )
        predicted = wavefronts(wanted, width)
        phases = width // 4
        found.append(
            {
                "access_bytes": width,
                "request": name,
                "predicted_ways": predicted // phases,
                "predicted_wavefronts": predicted,
                "measured_cycles": round(cycles, 2),
                "measured_ways": round(cycles / phases, 2),
                "measured_bytes_per_cycle": round(THREADS * width / cycles, 1),
            }
        )
    return found
