"""Against Transformers' processors, against enumeration, against chance."""

import inspect
import itertools
import math
import re
from fractions import Fraction
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch

from warpmap.inference.generation import sampling
from warpmap.inference.generation._step_by_step import LOGITS, sampling_trace
from warpmap.inference.generation.sampling import (
    ORDERS,
    Settings,
    add_bias,
    apply_temperature,
    gumbel_max,
    inverse_cdf,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    penalize_frequency,
    penalize_presence,
    penalize_repetition,
    probabilities,
    process,
)
from warpmap.models.families.house_model import house_model, house_tokenizer
from warpmap_site.traces import check, impure_imports

PROMPT, OUTPUT = [3, 3, 8, 17], [4, 8, 4, 4]
REQUESTS = [
    Settings(),
    Settings(temperature=0.7, top_p=0.9),
    Settings(temperature=1.5, top_k=12, top_p=0.8, min_p=0.1),
    Settings(
        bias={1: 2.5, 3: -1.25, 8: -math.inf},
        repetition_penalty=1.3,
        frequency_penalty=0.5,
        presence_penalty=0.25,
        temperature=1.25,
        top_p=0.85,
        min_p=0.05,
    ),
]


def row(seed, size=40):
    return (np.random.default_rng(seed).normal(size=size) * 2).tolist()


def softmax(x):
    weights = np.exp(np.asarray(x) - np.max(x))
    return weights / weights.sum()


@pytest.fixture(scope="module")
def hugging_face():
    """The processors that Transformers itself lines up for a request."""
    from transformers import GenerationConfig, LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaForCausalLM

    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=8,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
        )
    )

    def lined_up(s):
        bias = [[[token], float(x)] for token, x in s.bias.items()]
        config = GenerationConfig(
            do_sample=True,
            sequence_bias=bias or None,
            repetition_penalty=float(s.repetition_penalty),
            temperature=float(s.temperature),
            top_k=s.top_k,
            top_p=s.top_p,
            min_p=s.min_p,
        )
        return model._get_logits_processor(config, input_ids_seq_length=8)

    return lined_up


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("request_", REQUESTS)
def test_agrees_with_transformers(hugging_face, request_, seed):
    text = torch.tensor([PROMPT + OUTPUT])
    x = torch.tensor([row(seed)], dtype=torch.float64)
    theirs = hugging_face(request_)(text, x).softmax(dim=-1)[0].numpy()
    order = ORDERS["Transformers"]
    ours = process(row(seed), request_, PROMPT, OUTPUT, order)
    np.testing.assert_allclose(probabilities(ours), theirs, rtol=1e-12)


def test_transformers_lines_them_up_as_the_page_says(hugging_face):
    everything = Settings({1: 1.0}, 1.3, 0, 0, 1.5, 12, 0.9, 0.1)
    names = [type(step).__name__ for step in hugging_face(everything)]
    assert names == [
        "SequenceBiasLogitsProcessor",
        "RepetitionPenaltyLogitsProcessor",
        "TemperatureLogitsWarper",
        "TopKLogitsWarper",
        "TopPLogitsWarper",
        "MinPLogitsWarper",
    ]


def shifted(x, s):
    """Bias and penalties, which vLLM and llama.cpp share; token by token."""
    out = []
    for token, logit in enumerate(x):
        logit += s.bias.get(token, 0.0)
        if token in PROMPT + OUTPUT:
            factor = s.repetition_penalty
            logit = logit * factor if logit < 0 else logit / factor
        times = OUTPUT.count(token)
        logit -= times * s.frequency_penalty + (times > 0) * s.presence_penalty
        out.append(logit)
    return np.array(out)


def vllm(x, s):
    """Filters mask a row in place; top-p sums from the smallest up."""
    x = shifted(x, s) / s.temperature
    p = softmax(x)
    x[p < s.min_p * p.max()] = -np.inf
    rising = np.argsort(x)
    if s.top_k:
        x[rising[: len(x) - s.top_k]] = -np.inf
    if s.top_p < 1:
        below = np.cumsum(softmax(x)[rising]) <= 1 - s.top_p
        x[rising[below]] = -np.inf
    return softmax(x)


def llama_cpp(x, s):
    """A list of candidates, best first, that gets shorter and shorter."""
    x = shifted(x, s)
    best = sorted(range(len(x)), key=lambda i: -x[i])
    best = best[: s.top_k or None]
    if s.top_p < 1:
        sums = np.cumsum(softmax(x[best]))
        best = best[: int(np.argmax(sums >= s.top_p)) + 1]
    if s.min_p:
        best = [i for i in best if x[i] >= x[best[0]] + math.log(s.min_p)]
    out = np.zeros(len(x))
    out[best] = softmax(x[best] / s.temperature)
    return out


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("request_", REQUESTS)
@pytest.mark.parametrize("engine", [vllm, llama_cpp])
def test_agrees_with_arrays_in_the_other_orders(engine, request_, seed):
    order = ORDERS[{"vllm": "vLLM", "llama_cpp": "llama.cpp"}[engine.__name__]]
    ours = process(row(seed), request_, PROMPT, OUTPUT, order)
    want = engine(row(seed), request_)
    np.testing.assert_allclose(probabilities(ours), want, rtol=1e-12)
    if request_.min_p:  # and another order is not the same
        swapped = process(row(seed), request_, PROMPT, OUTPUT, order[::-1])
        assert not np.allclose(probabilities(swapped), want, rtol=1e-3)


def allowed(weights, k, p, m):
    """Exactly: one token at a time, in fractions, judged by its definition."""
    total, best = sum(weights), max(weights)
    above = [sum(v for v in weights if v > w) for w in weights]
    more = [sum(v > w for v in weights) for w in weights]
    return (
        [n < k for n in more],
        [Fraction(a, total) < p for a in above],
        [Fraction(w, best) >= m for w in weights],
    )


def drops_the_one_that_crosses(x, p):
    best = sorted(range(len(x)), key=lambda i: -x[i])
    sums = np.cumsum([probabilities(x)[i] for i in best])
    kept = {i for i, c in zip(best, sums, strict=True) if c <= p} | {best[0]}
    return [v if i in kept else -math.inf for i, v in enumerate(x)]


def splits_ties(x, k):
    best = sorted(range(len(x)), key=lambda i: -x[i])[:k]
    return [v if i in best else -math.inf for i, v in enumerate(x)]


def absolute(x, m):
    shares = probabilities(x)
    return [v if p >= m else -math.inf for v, p in zip(x, shares, strict=True)]


def test_every_row_of_small_weights_keeps_what_the_definitions_say():
    # sums are at most 32 and weights 8: no token is just on the border
    k, p, m = 2, Fraction(27, 37), Fraction(2, 9)
    right = keep_top_k, keep_top_p, keep_min_p
    wrong = splits_ties, drops_the_one_that_crosses, absolute
    caught = [False] * 3
    for weights in itertools.product((1, 2, 3, 5, 8), repeat=4):
        x = [math.log(w) for w in weights]
        want = allowed(weights, k, p, m)
        for i, setting in enumerate((k, float(p), float(m))):
            assert [v > -math.inf for v in right[i](x, setting)] == want[i]
            other = [v > -math.inf for v in wrong[i](x, setting)]
            caught[i] |= other != want[i]
    assert all(caught)


def test_a_share_of_one_keeps_tokens_that_rounding_would_lose():
    logits = [0.0, -40.0, -80.0]  # exp(-40) is lost in a sum with 1
    assert keep_top_p(logits, 1.0) == logits
    assert keep_top_p(logits, 1 - 1e-9) == [0.0, -math.inf, -math.inf]


def test_what_can_be_swapped():
    x, seen = row(0), {1, 5, 9}
    for a, b in (
        (lambda y: penalize_repetition(y, seen, 1.5),
         lambda y: apply_temperature(y, 2.0)),
        (lambda y: keep_top_k(y, 7), lambda y: apply_temperature(y, 2.0)),
        (lambda y: add_bias(y, {3: 1.5}),
         lambda y: penalize_frequency(y, [1, 1, 3], 0.5)),
    ):  # fmt: skip
        np.testing.assert_allclose(a(b(x)), b(a(x)), rtol=1e-15)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (lambda y: keep_top_p(y, 0.8), lambda y: apply_temperature(y, 2.0)),
        (lambda y: keep_min_p(y, 0.1), lambda y: apply_temperature(y, 2.0)),
        (lambda y: keep_min_p(y, 0.03), lambda y: keep_top_p(y, 0.95)),
        (lambda y: keep_top_k(y, 9), lambda y: keep_top_p(y, 0.95)),
        (lambda y: penalize_presence(y, [0, 1, 2], 1.0),
         lambda y: apply_temperature(y, 2.0)),
        (lambda y: penalize_repetition(y, {1, 2}, 2.0),
         lambda y: add_bias(y, {1: 3.0, 2: -3.0})),
    ],
)  # fmt: skip
def test_what_cannot(a, b):
    assert a(b(row(1))) != b(a(row(1)))


@pytest.mark.parametrize("temperature", [0.5, 1.5, 3.0])
def test_min_p_before_the_temperature_is_its_power_after(temperature):
    x = row(2)
    after = keep_min_p(apply_temperature(x, temperature), 0.1)
    before = apply_temperature(keep_min_p(x, 0.1**temperature), temperature)
    assert after == before


def test_only_the_repetition_penalty_feels_a_constant():
    x, up = row(3), [v + 5.0 for v in row(3)]
    tokens = [0, 1, 1, 2, 5]
    for step in (
        lambda y: penalize_frequency(y, tokens, 0.5),
        lambda y: penalize_presence(y, tokens, 0.5),
        lambda y: add_bias(y, {4: 1.0}),
        lambda y: keep_top_p(apply_temperature(y, 0.8), 0.9),
        lambda y: keep_min_p(keep_top_k(y, 20), 0.1),
    ):
        assert probabilities(step(up)) == pytest.approx(probabilities(step(x)))
    plain = probabilities(penalize_repetition(x, tokens, 1.5))
    moved = probabilities(penalize_repetition(up, tokens, 1.5))
    assert moved != pytest.approx(plain, rel=0.1)


@pytest.mark.parametrize("order", ORDERS.values(), ids=list(ORDERS))
def test_temperature_zero_takes_the_likeliest_after_the_penalties(order):
    x = [3.0, 2.5, 2.5, -1.0]
    greedy = Settings(temperature=0, repetition_penalty=2.0, top_p=0.5)
    kept = process(x, greedy, output=[0], order=order)
    assert probabilities(kept) == [0, 1, 0, 0]
    nearly = Settings(temperature=1e-3)
    assert probabilities(process(x, nearly, order=order))[0] == 1


FEW = [math.log(p) for p in (0.4, 0.25, 0.15, 0.1, 0.06, 0.04)] + [-math.inf]


def off_by_one(logits, u):
    running = np.cumsum(probabilities(logits))
    return int(np.searchsorted(running, u)) + 1


def not_normalised(logits, u):
    running = np.cumsum(np.exp(np.array(logits) + 0.2))
    return int(np.searchsorted(running, u, side="right"))


def test_each_token_owns_a_stretch_as_long_as_its_probability():
    def worst(draw, logits):
        grid = [draw(logits, (i + 0.5) / 1000) for i in range(1000)]
        return max(
            abs(grid.count(i) - 1000 * p)
            for i, p in enumerate(probabilities(logits))
        )

    shuffled = [-math.inf, *FEW[::-1], 0.3]
    for logits in (FEW, shuffled):
        assert worst(inverse_cdf, logits) <= 1
        assert worst(off_by_one, logits) > 1
        assert worst(not_normalised, logits) > 1
        # the ends, where a token of no probability could slip in
        ends = {inverse_cdf(logits, 0.0), inverse_cdf(logits, 1 - 2**-53)}
        assert all(logits[i] > -math.inf for i in ends)


def chi_square(draw, logits, draws=4000):
    """Squared deviations, in units of what chance explains: 5 on average."""
    rng = Random(1)
    counts = [0] * len(logits)
    for _ in range(draws):
        counts[draw(logits, rng)] += 1
    expected = [draws * p for p in probabilities(logits)]
    assert all(c == 0 for c, e in zip(counts, expected, strict=True) if e == 0)
    return sum(
        (c - e) ** 2 / e for c, e in zip(counts, expected, strict=True) if e
    )


def normal_noise(logits, rng):
    return max(range(len(logits)), key=lambda i: logits[i] + rng.gauss(0, 1.28))


def one_noise_for_all(logits, rng):
    noise = -math.log(rng.expovariate(1.0))
    return max(range(len(logits)), key=lambda i: logits[i] + noise)


def noise_upside_down(logits, rng):
    return max(
        range(len(logits)),
        key=lambda i: logits[i] + math.log(rng.expovariate(1.0)),
    )


def test_draws_are_as_frequent_as_they_should_be():
    # of 5 degrees of freedom, more than 25.7 happens once in 10,000 runs
    assert chi_square(gumbel_max, FEW) < 25.7
    assert chi_square(lambda x, r: inverse_cdf(x, r.random()), FEW) < 25.7
    for wrong in (normal_noise, one_noise_for_all, noise_upside_down):
        assert chi_square(wrong, FEW) > 25.7, wrong.__name__


def test_with_the_same_noise_a_filter_changes_refused_draws_only():
    cut = keep_top_k(FEW, 3)
    for seed in range(300):
        whole = gumbel_max(FEW, Random(seed))
        if cut[whole] > -math.inf:
            assert gumbel_max(cut, Random(seed)) == whole


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ({"temperature": -1.0}, "temperature must be 0 or more, got -1"),
        ({"top_k": -1}, "top_k must be 0 or more, got -1"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1, got 0"),
        ({"min_p": 1.5}, "min_p must be from 0 to 1, got 1.5"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be above 0"),
        ({"frequency_penalty": math.nan}, "frequency_penalty must be finite"),
        ({"presence_penalty": math.inf}, "presence_penalty must be finite"),
        ({"bias": {9: 1.0}}, r"bias must name tokens from 0 to 2, got \[9\]"),
    ],
)
def test_bad_settings_are_named(setting, says):
    with pytest.raises(ValueError, match=says):
        process([1.0, 2.0, 3.0], Settings(**setting))


@pytest.mark.parametrize(
    "bad", [[], [-math.inf] * 2, [math.nan, 1], [math.inf]]
)
def test_logits_without_a_token_to_draw_are_refused(bad):
    for use in (
        lambda: process(bad, Settings()),
        lambda: inverse_cdf(bad, 0.5),
        lambda: gumbel_max(bad, Random(0)),
    ):
        with pytest.raises(ValueError, match="logits must be below inf"):
            use()


@pytest.mark.parametrize("order", ["top_p top_p", "top_q", "top_p, heat"])
def test_bad_orders_are_named(order):
    with pytest.raises(ValueError, match="order must name steps once"):
        sampling_trace(order=order)
    with pytest.raises(ValueError, match="u must be from 0 to below 1"):
        sampling_trace(u=1.0)


@pytest.mark.parametrize("order", [*ORDERS, "top_p, temperature"])
def test_the_trace_draws_what_the_functions_draw(order):
    parameters = inspect.signature(sampling_trace).parameters
    defaults = {name: p.default for name, p in parameters.items()}
    steps = ORDERS.get(order) or order.split(", ")
    logits = process(
        list(LOGITS.values()),
        Settings(**{
            name: value
            for name, value in defaults.items()
            if name in Settings.__dataclass_fields__
        }),
        prompt=[4, 6],
        output=[0, 6, 1, 6],
        order=steps,
    )  # fmt: skip
    frames = check("sampling_trace", sampling_trace(order))
    word = list(LOGITS)[inverse_cdf(logits, defaults["u"])]
    assert frames[-1].caption.endswith(f"{word}: it is drawn.")
    shown = [cell.text for cell in frames[-1].picture.rows[1][1]]
    assert shown == [f"{p:.0%}" if p else "" for p in probabilities(logits)]


def test_the_engines_differ_in_the_trace():
    ends = [sampling_trace(order)[-1].picture for order in ORDERS]
    assert len({str(picture) for picture in ends}) == 3
    assert impure_imports("warpmap.inference.generation._step_by_step") == []
    assert impure_imports(sampling.__name__) == []


def test_page_counts_what_the_filters_leave_of_a_real_model():
    page = Path(__file__).parents[3] / "docs/inference/generation/sampling.md"
    rows = re.findall(
        r"^\| `(.*)` \| (\d+) \| (\d+) \| (\d+) \|$",
        page.read_text("utf-8"),
        re.M,
    )
    assert len(rows) == 4
    tokenizer, model = house_tokenizer(), house_model().double()
    for prompt, *counts in rows:
        ids = [tokenizer.end_of_text, *tokenizer.encode(prompt)]
        with torch.no_grad():
            logits = model(torch.tensor([ids]))[0, -1].tolist()
        found = [
            len(logits) - process(logits, settings, order=o).count(-math.inf)
            for settings, o in [
                (Settings(top_p=0.9), ORDERS["vLLM"]),
                (Settings(temperature=1.5, top_p=0.9), ORDERS["vLLM"]),
                (Settings(temperature=1.5, top_p=0.9), ORDERS["llama.cpp"]),
            ]
        ]
        assert found == [int(count) for count in counts], prompt
