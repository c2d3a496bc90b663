import math
from pathlib import Path

import pytest

from warpmap.models.positions._longer_texts import (
    METHODS,
    PRESETS,
    context_extension,
    slowdown_chart,
    unseen,
)
from warpmap.models.positions.context_extension import (
    attention_factor,
    by_parts,
    interpolated,
    inverse_frequencies,
    ntk_aware,
    yarn,
)

DOCS = Path(__file__).parents[3] / "docs/models/positions"
TURN = 2 * math.pi
EXACT = 1e-14  # a power and a few products: some 20 roundings in float64
# (D, base, trained, factor): Llama 2, Llama 3, Qwen3, DeepSeek's rotary part
MODELS = [
    (128, 1e4, 4096, 4.0),
    (128, 5e5, 8192, 8.0),
    (128, 1e6, 32768, 4.0),
    (64, 1e4, 4096, 40.0),
    (16, 1e4, 256, 2.5),
]


@pytest.fixture(scope="module")
def peer():
    """Angles and factor by a rule of transformers, which has float32 only."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.llama.configuration_llama import LlamaConfig

    def rule(kind, D, base, trained, factor, length=None, **settings):
        if kind in ("yarn", "llama3"):
            settings["original_max_position_embeddings"] = trained
        longest = trained if kind == "dynamic" else int(trained * factor)
        config = LlamaConfig(
            hidden_size=D,
            num_attention_heads=1,
            num_key_value_heads=1,
            head_dim=D,
            max_position_embeddings=longest,
            rope_parameters={
                "rope_type": kind,
                "rope_theta": base,
                "factor": factor,
                **settings,
            },
        )
        angles, scale = ROPE_INIT_FUNCTIONS[kind](config, seq_len=length)
        return angles.tolist(), scale

    return rule


def agree(ours, theirs):
    """Equal but for float32.

    The exponent of ``base`` is rounded to 24 bits, which moves the logarithm
    of an angle, up to 14, by as much of itself; then come a few roundings. A
    ramp over turns repeats the angle's error some 4 times.
    """
    bound = 5 * (14 + 4) * 2**-24
    return ours == pytest.approx(theirs, rel=bound)


@pytest.mark.parametrize("model", MODELS)
def test_rules_agree_with_transformers(peer, model):
    D, base, trained, factor = model
    angles, scale = peer("linear", D, base, trained, factor)
    assert agree(interpolated(D, base, factor), angles)
    assert scale == 1

    angles, _ = peer("linear", D, base, trained, 1.0)
    assert agree(inverse_frequencies(D, base), angles)

    # its factor is counted from the length of the text at hand
    angles, _ = peer("dynamic", D, base, trained, 1.0, int(trained * factor))
    assert agree(ntk_aware(D, base, factor), angles)
    angles, _ = peer("dynamic", D, base, trained, factor, 2 * trained)
    assert agree(ntk_aware(D, base, 2 * factor - (factor - 1)), angles)

    angles, scale = peer("yarn", D, base, trained, factor)
    assert agree(yarn(D, base, factor, trained), angles)
    assert scale == pytest.approx(attention_factor(factor), rel=EXACT)
    angles, _ = peer("yarn", D, base, trained, factor, truncate=False)
    assert agree(yarn(D, base, factor, trained, truncate=False), angles)
    angles, _ = peer(
        "yarn", D, base, trained, factor, beta_fast=16, beta_slow=2
    )
    assert agree(yarn(D, base, factor, trained, 16, 2), angles)

    angles, _ = peer(
        "llama3",
        *(D, base, trained, factor),
        low_freq_factor=1.0,
        high_freq_factor=4.0,
    )
    assert agree(by_parts(D, base, factor, trained, 4, 1), angles)


FAULTS = {
    "ramp over turns": by_parts,
    "ends not rounded": lambda D, b, f, t: yarn(D, b, f, t, truncate=False),
    "ends swapped with entries": lambda D, b, f, t: yarn(D, b, f, t, 64, 2),
    "everything slowed": lambda D, b, f, t: interpolated(D, b, f),
    "nothing slowed": lambda D, b, f, t: inverse_frequencies(D, b),
    "base times factor": lambda D, b, f, t: inverse_frequencies(D, b * f),
    "trained and target mixed": lambda D, b, f, t: yarn(D, b, f, int(t * f)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_transformers_catches(peer, fault):
    D, base, trained, factor = MODELS[0]
    wrong = FAULTS[fault](D, base, factor, trained)
    angles, _ = peer("yarn", D, base, trained, factor)
    assert not agree(wrong, angles)
    angles, _ = peer("dynamic", D, base, trained, 1.0, int(trained * factor))
    assert not agree(wrong, angles)


def slower(after, before):
    return [b / a for a, b in zip(after, before, strict=True)]


@pytest.mark.parametrize("model", MODELS)
def test_ends_are_what_the_papers_say(model):
    D, base, trained, factor = model
    before = inverse_frequencies(D, base)
    assert before[0] == 1
    assert slower(interpolated(D, base, factor), before) == pytest.approx(
        [factor] * (D // 2), rel=EXACT
    )
    by = slower(ntk_aware(D, base, factor), before)
    # 1 at the first pair, the factor at the last, a geometric row between
    steps = [factor ** (2 * i / (D - 2)) for i in range(D // 2)]
    assert by == pytest.approx(steps, rel=EXACT)

    for a, now in zip(before, by_parts(D, base, factor, trained), strict=True):
        if trained * a / TURN > 32:
            assert now == pytest.approx(a, rel=EXACT)
        if trained * a / TURN < 1:
            assert now == pytest.approx(a / factor, rel=EXACT)


def test_blend_is_the_paper_s_formula_by_hand():
    """Eq. 12 and 13: one pair with 16.5 turns, half-way from 1 to 32."""
    trained = round(16.5 * TURN * 100)  # of the second pair, 0.01 a token
    angles = by_parts(4, 1e4, 4.0, trained)
    half = (trained * 0.01 / TURN - 1) / 31
    assert half == pytest.approx(0.5, abs=1e-3)
    assert angles[1] == pytest.approx(
        (1 - half) * 0.01 / 4 + half * 0.01, rel=EXACT
    )


def brute_force_unseen(after, before, target, trained):
    """Arcs as sets of whole degrees, reached by walking."""
    pairs = []
    for now, then in zip(after, before, strict=True):
        new, old = (
            {
                int(math.degrees(p * angle / 64)) % 360
                for p in range(64 * length)
            }
            for angle, length in ((now, target), (then, trained))
        )
        pairs.append(len(new - old))
    return pairs


@pytest.mark.parametrize("method", METHODS)
def test_unseen_angles_agree_with_walking(method):
    settings = {"trained": 64, "target": 192, "factor": 3.0, "head_size": 16}
    before = inverse_frequencies(16, 1e4)
    after = {
        "none": before,
        "interpolation": interpolated(16, 1e4, 3.0),
        "NTK-aware": ntk_aware(16, 1e4, 3.0),
        "by parts": by_parts(16, 1e4, 3.0, 64, 8, 1),
        "YaRN": yarn(16, 1e4, 3.0, 64, 8, 1),
        "new base": inverse_frequencies(16, 3e4),
    }[method]
    walked = brute_force_unseen(after, before, 192, 64)
    for gap, degrees in zip(
        unseen(after, before, 192, 64), walked, strict=True
    ):
        # the last step of either walk may stop within a degree
        assert math.degrees(gap) == pytest.approx(degrees, abs=2)
    got = context_extension(method, **settings, new_base=3e4, fast=8.0)
    assert got.unseen_degrees == pytest.approx(max(walked), abs=2)


def test_critical_dimension_of_llama_2():
    """Liu et al.: 92 of 128 entries complete a turn within 4096 tokens."""
    assert 2 * context_extension().full_turn_pairs == 92


@pytest.mark.parametrize("model", MODELS)
def test_safe_base_is_the_smallest(model):
    D, base, trained, factor = model
    settings = {
        "trained": trained,
        "target": int(factor * trained),
        "head_size": D,
        "base": base,
    }
    safe = context_extension("new base", **settings).safe_base
    assert safe > base
    at = context_extension("new base", new_base=1.001 * safe, **settings)
    assert at.unseen_pairs == 0
    below = context_extension("new base", new_base=0.999 * safe, **settings)
    assert below.unseen_pairs > 0


def test_score_scale_is_what_deepseek_multiplies_its_scores_with():
    """Its softmax scale has (0.1 ln 40 + 1)^2 instead of larger tables."""
    got = context_extension(**PRESETS["DeepSeek-V3"])
    assert got.score_scale == pytest.approx(1.8738542070926265, rel=EXACT)


@pytest.mark.parametrize("name", PRESETS)
def test_chart_shows_how_much_slower_pairs_are(name):
    settings = PRESETS[name]
    rule, needed = slowdown_chart(**settings).lines
    got = context_extension(**settings)
    assert len(rule.points) == len(needed.points) == got.pairs
    ratio = settings["target"] / settings["trained"]
    assert [y for _, y in needed.points].count(ratio) == (
        got.pairs - got.full_turn_pairs
    )
    both = zip(rule.points, needed.points, strict=True)
    short = sum(y < n * (1 - 1e-9) for (_, y), (_, n) in both)
    assert short == got.unseen_pairs


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"factor": 0.5}, "factor must be from 1 to 1e6, got 0.5"),
        ({"factor": float("nan")}, "factor must be"),
        ({"head_size": 5}, "head_size must be even, at least 4, got 5"),
        ({"head_size": 2}, "head_size must be"),
        ({"base": 1.0}, "base must be above 1"),
        ({"method": "new base", "new_base": 0.0}, "new_base must be"),
        ({"trained": 6}, "trained must be at least 7"),
        ({"target": 4095}, "target must be at least 4096, got 4095"),
        ({"fast": 1.0}, "fast must be more than slow 1.0, got 1.0"),
        ({"slow": 0.0}, "slow must be more than 0"),
        ({"slow": 700.0, "fast": 800.0}, "slow must be .* at most 651.9"),
        ({"method": "LongRoPE"}, "method must be one of .* got 'LongRoPE'"),
    ],
)
def test_bad_numbers_are_named(wrong, says):
    with pytest.raises(ValueError, match=says):
        context_extension(**wrong)


def test_page_table_agrees():
    page = (DOCS / "context_extension.md").read_text("utf-8")
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in page.splitlines()
        if line.startswith("| ") and line.endswith("° |")
    ]
    assert len(rows) == 7
    for rule, *shown in rows:
        method, _, number = rule.partition(", ")
        factor = float(number.split()[1]) if "factor" in number else 4.0
        got = context_extension(method, factor=factor)
        degrees = f"{got.neighbour_degrees:.1f}°"
        want = [str(got.unseen_pairs), str(got.slowed_pairs), degrees]
        assert shown == want
