"""The steps of a request on eight words, where every number can be watched."""

import math

from warpmap.inference.generation.sampling import (
    ORDERS,
    Settings,
    inverse_cdf,
    probabilities,
    process,
)
from warpmap.trace import Cell, Frame, Grid, Lanes, Mark, Span, Trace

PROMPT = "the dog hid the"
LOGITS = {
    "bone": 3.0,
    "shoe": 2.5,
    "cake": 2.0,
    "ball": 1.5,
    "dog": 0.5,
    "moon": -0.5,
    "the": -1.0,
    "of": -2.0,
}
"""What a model might say of the next word; made by hand."""


def sampling_trace(
    order: str = "vLLM",
    repetition_penalty: float = 1.2,
    frequency_penalty: float = 0.5,
    presence_penalty: float = 0.0,
    temperature: float = 2.0,
    top_k: int = 0,
    top_p: float = 0.9,
    min_p: float = 0.2,
    written: str = "bone , the shoe and the",
    u: float = 0.74,
) -> Trace:
    """One word is drawn after "the dog hid the", step by step.

    Args:
        order: vLLM, Transformers or llama.cpp; or steps in an order of your
            own, as "top_p temperature".
        repetition_penalty: Divides what was read or written; 1 is off.
        frequency_penalty: Subtracted for each time that a word was written.
        presence_penalty: Subtracted once from a word that was written.
        temperature: What logits are divided by; 0 takes the largest.
        top_k: Words to keep; 0 keeps all.
        top_p: Share of the probability to keep.
        min_p: Share of the likeliest word's probability that a word needs.
        written: What the model has written after the prompt.
        u: A random number from 0 to below 1.

    Returns:
        A frame for the logits, for each step that is on, and for the draw.

    Raises:
        ValueError: If a setting is out of range, or a step unknown.

    Examples:
        >>> print(sampling_trace("vLLM")[-1].caption)
        0.74 falls on the stretch of ball: it is drawn.
        >>> print(sampling_trace("llama.cpp")[-1].caption)
        0.74 falls on the stretch of cake: it is drawn.
    """
    words = list(LOGITS)
    settings = Settings(
        repetition_penalty=repetition_penalty,
        frequency_penalty=frequency_penalty,
        presence_penalty=presence_penalty,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
    )
    steps = ORDERS.get(order.strip()) or tuple(order.replace(",", " ").split())
    before = list(LOGITS.values())
    trace: Trace = []

    def add(caption: str, logits: list[float], lit: dict[int, Mark]) -> None:
        shares = probabilities(logits)
        grid = Grid(
            [
                (
                    "logit",
                    [
                        Cell(f"{x:.1f}", lit.get(i, ""))
                        for i, x in enumerate(logits)
                    ],
                ),
                (
                    "share",
                    [
                        Cell(f"{p:.0%}" if p else "", lit.get(i, ""))
                        for i, p in enumerate(shares)
                    ],
                ),
            ],
            words,
        )
        spans, start = [], 0.0
        for i, p in enumerate(shares):
            end = min(start + p, 1.0)
            if p:
                # a name where there is room for it, even on a phone
                name = words[i] if p > 0.12 else ""
                drawn: Mark = "on" if lit.get(i) == "on" else ""
                spans.append(Span(start, end, name, drawn))
            start = end
        line = Lanes([("draw", spans)], "", 1.0, u)
        trace.append(Frame(caption, grid, line))

    def record(name: str, logits: list[float]) -> None:
        nonlocal before
        value = getattr(settings, name)
        if value == getattr(Settings(), name):
            return
        changed = [i for i, x in enumerate(logits) if x != before[i]]
        cut = [i for i in changed if logits[i] == -math.inf]
        named = ", ".join(words[i] for i in cut or changed)
        if not changed:
            said = "nothing changes"
        elif cut:
            said = f"cuts {named}, and the others share what they had"
        elif len(changed) == len([x for x in before if x > -math.inf]):
            said = "all logits are divided"
        else:
            said = f"lowers {named}" if value > 0 else f"raises {named}"
        lit: dict[int, Mark] = dict.fromkeys(changed, "gone" if cut else "new")
        add(f"{name} {value:g}: {said}.", logits, lit)
        before = logits

    def tokens(text: str) -> list[int]:
        return [words.index(word) for word in text.split() if word in LOGITS]

    if not 0 <= u < 1:
        raise ValueError(f"u must be from 0 to below 1, got {u}")
    add(f"What follows? {PROMPT} {written} ...", before, {})
    logits = process(
        before, settings, tokens(PROMPT), tokens(written), steps, record
    )
    token = inverse_cdf(logits, u)
    add(
        f"{u:g} falls on the stretch of {words[token]}: it is drawn.",
        logits,
        {token: "on"},
    )
    return trace
