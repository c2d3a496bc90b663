import math
import random
from fractions import Fraction

import pytest
import torch

from warpmap.models.experts import _balance
from warpmap.models.experts._balance import balance_trace, train
from warpmap.models.experts.moe_routing import (
    best,
    expert_capacity,
    expert_choice,
    grouped_gate,
    loads,
    switch_loss,
    token_choice,
    update_bias,
)

U = torch.finfo(torch.float64).eps / 2


def some_scores(rng, tokens=9, experts=5, levels=1000):
    return [
        [rng.randrange(levels) / levels for _ in range(experts)]
        for _ in range(tokens)
    ]


def added(scores, bias):
    return [s + b for s, b in zip(scores, bias, strict=True)]


# -- who chooses ---------------------------------------------------------------


@pytest.mark.parametrize("k", [0, 1, 3, 5])
def test_token_choice_is_torch_topk_where_there_is_room(k):
    scores = torch.rand(30, 5, dtype=torch.float64)
    chosen = token_choice(scores.tolist(), k)
    assert chosen == scores.topk(k, dim=1).indices.tolist()


@pytest.mark.parametrize("capacity", [0, 1, 4, 9])
def test_expert_choice_is_torch_topk_of_each_column(capacity):
    scores = torch.rand(9, 5, dtype=torch.float64)
    chosen = expert_choice(scores.tolist(), capacity)
    rows = scores.topk(capacity, dim=0).indices.tolist()  # (capacity, E)
    taken = {(token, i) for row in rows for i, token in enumerate(row)}
    assert {(n, i) for n, mine in enumerate(chosen) for i in mine} == taken
    assert loads(chosen, 5) == [capacity] * 5


def served(scores, k, capacity):
    """Who is served, said otherwise: by counting who came before."""
    wish = [best(row, k) for row in scores]
    queue = [(rank, n) for rank in range(k) for n in range(len(scores))]
    before = {
        (rank, n): sum(
            wish[m][r] == wish[n][rank] for r, m in queue if (r, m) < (rank, n)
        )
        for rank, n in queue
    }
    return [
        [w for rank, w in enumerate(wish[n]) if before[rank, n] < capacity]
        for n in range(len(scores))
    ]


@pytest.mark.parametrize("levels", [3, 1000], ids=["ties", "no ties"])
@pytest.mark.parametrize("k", [1, 2, 5])
def test_full_experts_turn_away_whoever_comes_late(k, levels):
    rng, turned_away = random.Random(0), 0
    for _ in range(50):
        scores = some_scores(rng, levels=levels)
        capacity = rng.randrange(6)
        chosen = token_choice(scores, k, capacity)
        assert chosen == served(scores, k, capacity)
        assert max(loads(chosen, 5)) <= capacity
        turned_away += 9 * k - sum(map(len, chosen))
    assert turned_away > 100


def test_second_choices_wait_for_all_first_ones():
    scores = [[0.9, 0.8], [0.1, 0.9]]
    assert token_choice(scores, k=2, capacity=1) == [[0], [1]]
    # token by token, the first would take both places
    token_by_token = [[0, 1], []]
    assert token_by_token != served(scores, 2, 1)


@pytest.mark.parametrize(
    ("tokens", "experts", "k", "factor"),
    [(64, 8, 1, 1.25), (10, 4, 2, 1.0), (7, 3, 1, 1.5), (1, 64, 1, 1.0)],
)
def test_capacity_is_an_equal_share_times_the_factor(
    tokens, experts, k, factor
):
    got = expert_capacity(tokens, experts, k, factor)
    share = Fraction(tokens * k, experts) * Fraction(factor)
    assert got - 1 < share <= got


def depends(route, tokens=6):
    """Which tokens a token's experts depend on: change one, and look."""
    rng, found = random.Random(1), set()
    for _ in range(300):
        scores = some_scores(rng, tokens, experts=3)
        changed = rng.randrange(tokens)
        other = list(scores)
        other[changed] = [rng.random() for _ in range(3)]
        for n, (a, b) in enumerate(
            zip(route(scores), route(other), strict=True)
        ):
            if a != b:
                found.add((n > changed) - (n < changed))
    return found


def test_who_chooses_decides_what_a_token_depends_on():
    """0: on itself. 1: on earlier tokens. -1: on later ones."""
    assert depends(lambda s: token_choice(s, 1)) == {0}
    assert depends(lambda s: token_choice(s, 1, capacity=2)) == {0, 1}
    assert depends(lambda s: expert_choice(s, capacity=2)) == {-1, 0, 1}
    # with two choices, a later token's first goes before an earlier's second
    assert depends(lambda s: token_choice(s, 2, capacity=3)) == {-1, 0, 1}


# -- the Switch loss -----------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2])
def test_loss_agrees_with_transformers_up_to_k(k):
    from transformers.models.mixtral.modeling_mixtral import (
        load_balancing_loss_func,
    )

    logits = torch.randn(40, 6, dtype=torch.float64)
    theirs = load_balancing_loss_func((logits,), num_experts=6, top_k=k)
    probs = logits.softmax(dim=1).tolist()
    ours = switch_loss(probs, token_choice(probs, k))
    # there every choice counts whole, here a token's choices share 1; and
    # there means are in float32, of 40 numbers up to 1
    assert abs(k * ours - theirs) < 6 * 50 * 2**-24
    assert abs(ours + 0.01 - theirs / k) > 6 * 50 * 2**-24


def test_loss_is_1_where_even_and_the_number_of_experts_where_not():
    even = [[0.25] * 4] * 8
    assert switch_loss(even, [[n % 4] for n in range(8)]) == 1
    assert switch_loss(even, [[0]] * 8) == 1  # probabilities alone are even
    assert switch_loss([[1.0, 0, 0, 0]] * 8, [[0]] * 8) == 4
    # not a minimum: choices and probabilities may disagree, as with a bias
    assert switch_loss([[1.0, 0]] * 2, [[1], [1]]) == 0


def test_slope_of_the_loss_is_the_share_of_choices():
    rng = random.Random(0)
    probs = [[x / sum(row) for x in row] for row in some_scores(rng)]
    chosen = token_choice(probs, 1)
    load = loads(chosen, 5)
    for n, i in [(0, 0), (3, 4), (8, 2)]:
        moved = [list(row) for row in probs]
        moved[n][i] += 2.0**-20
        slope = (
            switch_loss(moved, chosen) - switch_loss(probs, chosen)
        ) * 2**20
        # the loss is linear in each probability: only rounding is left
        assert abs(slope - 5 / 9 * load[i] / 9) < 2**20 * 20 * U


# -- biases --------------------------------------------------------------------


def test_bias_moves_by_the_sign_of_the_load_alone():
    bias = [0.5, 0.0, -0.25, 0.0]
    moved = [0.375, 0.125, -0.125, 0.125]
    assert update_bias(bias, [100, 3, 0, 1], 0.125) == moved
    assert update_bias(bias, [2, 2, 2, 2], 0.125) == bias


def test_fixed_scores_come_to_an_even_load():
    """256 tokens who all prefer the first of four experts."""
    rng = random.Random(0)
    scores = [
        [rng.random() + 0.2 * (3 - i) for i in range(4)] for _ in range(256)
    ]
    bias, loads_seen = [0.0] * 4, []
    for _ in range(400):
        biased = [added(row, bias) for row in scores]
        loads_seen.append(loads(token_choice(biased, 1), 4))
        bias = update_bias(bias, loads_seen[-1], rate=0.002)
    assert loads_seen[0][0] > 128
    assert loads_seen[0][3] < 26
    # a step moves two experts apart by 0.004, across few of 256 tokens
    assert all(abs(n - 64) < 8 for load in loads_seen[-50:] for n in load)


# -- DeepSeek-V3's gate --------------------------------------------------------


@pytest.fixture(scope="module")
def router():
    """A router of transformers with 16 experts in 4 groups, biased."""
    from transformers.models.deepseek_v3.configuration_deepseek_v3 import (
        DeepseekV3Config,
    )
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
        DeepseekV3TopkRouter,
    )

    torch.manual_seed(0)
    router = DeepseekV3TopkRouter(
        DeepseekV3Config(
            hidden_size=8,
            n_routed_experts=16,
            n_group=4,
            topk_group=2,
            num_experts_per_tok=4,
            routed_scaling_factor=2.5,
            norm_topk_prob=True,
        )
    )
    with torch.no_grad():
        router.weight.normal_()
        # negative on the whole, which masking by 0 does not survive
        router.e_score_correction_bias.normal_(mean=-0.5, std=0.3)
    return router


def wrong_gate(fault, logits, bias, k, groups, kept, scale=2.5):
    """The gate, with one line changed."""
    E, size = len(logits), len(logits) // groups
    scores = [1 / (1 + math.exp(-z)) for z in logits]
    if fault == "softmax":
        scores = torch.tensor(logits).softmax(0).tolist()
    biased = added(scores, bias)
    sizes = {"groups by their best": 1, "groups by their sum": size}
    take = sizes.get(fault, 2)
    worth = [
        sum(sorted(biased[g * size : (g + 1) * size])[-take:])
        for g in range(groups)
    ]
    open_groups = best(worth, kept)
    shut = 0.0 if fault == "masked by 0" else -math.inf
    group = [
        i % groups if fault == "groups strided" else i // size for i in range(E)
    ]
    if fault == "no groups":
        open_groups = range(groups)
    experts = best(
        [
            b if g in open_groups else shut
            for b, g in zip(biased, group, strict=True)
        ],
        k,
    )
    weights = biased if fault == "weighed with the bias" else scores
    total = 1 if fault == "not normalised" else sum(weights[i] for i in experts)
    return experts, [scale * weights[i] / total for i in experts]


FAULTS = [
    "softmax",
    "groups by their best",
    "groups by their sum",
    "groups strided",
    "masked by 0",
    "no groups",
    "weighed with the bias",
    "not normalised",
]


def agree(gate, router, x):
    """Whether experts and weights are those of transformers, as sets."""
    logits, weights, experts = router(x)
    for row, w, e in zip(
        logits.tolist(), weights.tolist(), experts.tolist(), strict=True
    ):
        mine = gate(row, router.e_score_correction_bias.tolist(), 4, 4, 2)
        theirs = dict(zip(e, w, strict=True))
        ours = dict(zip(*mine, strict=True))
        # theirs is float32: a sigmoid, a sum of 4, a division, a product
        if ours.keys() != theirs.keys() or any(
            abs(ours[i] - theirs[i]) > 10 * 2**-24 * 2.5 for i in ours
        ):
            return False
    return True


def test_gate_agrees_with_transformers_deepseek_v3(router):
    assert agree(grouped_gate, router, torch.randn(500, 8))


@pytest.mark.parametrize("fault", [None, *FAULTS])
def test_a_wrong_gate_is_caught(router, fault):
    def gate(*given):
        return wrong_gate(fault, *given)

    assert agree(gate, router, torch.randn(500, 8)) == (fault is None)


# -- the small mixture ---------------------------------------------------------


def torch_train(balancing, strength, capacity_factor, seed, steps):
    """The same training, with gradients from PyTorch."""
    rng = random.Random(seed)
    numbers = [rng.gauss(0, 0.3) for _ in range(8 * 5)]
    numbers += [rng.gauss(0, 1) for _ in range(64 * 2)]
    drawn = torch.tensor(numbers, dtype=torch.float64)
    router, values, x = drawn.split([24, 16, 128])
    router, values, x = router.view(8, 3), values.view(8, 2), x.view(64, 2)
    bias = torch.zeros(8, dtype=torch.float64)
    errors = []
    for _ in range(steps):
        router.requires_grad_()
        values.requires_grad_()
        s = torch.sigmoid(x @ router[:, :2].T + router[:, 2])
        choice = (s + bias).argmax(dim=1)
        one_hot = torch.nn.functional.one_hot(choice, 8).double()
        load = one_hot.sum(0)
        room = math.ceil(capacity_factor * 8)
        kept = one_hot * (one_hot.cumsum(0) <= room)
        error = ((kept * s) @ values - (x + 1)).square().sum() / 64
        loss = error
        if balancing == "Switch loss":
            probs = s / s.sum(dim=1, keepdim=True)
            loss = loss + strength * 8 * (load / 64 * probs.mean(0)).sum()
        errors.append(error.item())
        slopes = torch.autograd.grad(loss, [router, values])
        router, values = (
            (w - 0.5 * d).detach()
            for w, d in zip((router, values), slopes, strict=True)
        )
        if balancing == "bias":
            bias = bias + strength * (load.mean() - load).sign()
    return errors


MODES = [("nothing", 0.0), ("Switch loss", 1.0), ("bias", 0.003)]


@pytest.mark.slow
@pytest.mark.parametrize(("balancing", "strength"), MODES)
@pytest.mark.parametrize("factor", [1.5, 8.0])
def test_small_mixture_follows_the_gradients_of_torch(
    balancing, strength, factor
):
    errors = []
    train(
        *(balancing, strength, factor, 3),
        lambda *now: errors.append(now[2]),
        steps=20,
    )
    want = torch_train(balancing, strength, factor, 3, steps=21)
    # rounding grows from step to step; twenty leave it far below 1e-9
    for a, b in zip(errors, want, strict=True):
        assert abs(a - b) < 1e-9


@pytest.mark.slow
def test_without_balance_experts_idle_and_with_it_none_does():
    ends = {mode: train(mode, strength)[-1] for mode, strength in MODES}
    assert all(sum(load) == 64 for load in ends.values())
    assert max(ends["nothing"]) > 3 * 8
    assert ends["nothing"].count(0) >= 3
    for mode in ("Switch loss", "bias"):
        assert max(ends[mode]) < 2 * 8
        assert ends[mode].count(0) <= 1


def test_a_trace_shows_the_loads_and_what_is_dropped():
    plain = train("bias", 0.003, 1.5)
    trace = balance_trace("bias")
    assert 10 <= len(trace) <= 40
    for frame, load in zip(trace, plain[:: _balance.EVERY], strict=True):
        rows = [cells for _, cells in frame.picture.rows]
        bars = [
            [cell for cell in column if cell.mark]
            for column in zip(*rows, strict=True)
        ]
        assert [int(bar[0].text) if bar else 0 for bar in bars] == load
        # over 12 tokens, three cells, all is dropped
        gone = [sum(cell.mark == "gone" for cell in bar) for bar in bars]
        assert gone == [max(0, -(-n // 4) - 3) for n in load]
        said = f"from {min(load)} to {max(load)}"
        assert said in frame.caption


FOUR = [0.0] * 4


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: best([1.0], 2), "k must be 0 to 1, got 2"),
        (lambda: token_choice([[1.0]], 2), "k must be 0 to 1, got 2"),
        (lambda: token_choice([[1.0]], 1, -1), "capacity must be at least 0"),
        (lambda: expert_choice([[1.0]], 2), "capacity must be 0 to 1"),
        (lambda: expert_choice([[1.0], []], 1), r"got rows of \[0, 1\]"),
        (lambda: expert_capacity(8, 0), "experts must be positive, got 0"),
        (lambda: switch_loss([[1.0]], [[]]), "at least one choice, got none"),
        (lambda: grouped_gate(FOUR, [0.0], 1, 2, 1), "bias must hold 4"),
        (lambda: grouped_gate(FOUR, FOUR, 1, 3, 1), "groups must"),
        (lambda: grouped_gate(FOUR, FOUR, 1, 4, 1), "groups must"),
        (lambda: grouped_gate(FOUR, FOUR, 1, 2, 3), "kept must be 1"),
        (lambda: grouped_gate(FOUR, FOUR, 3, 2, 1), "k must be 1 to 2"),
        (lambda: balance_trace(bias_step=2.0), "bias_step must be 0 to 1"),
        (lambda: balance_trace(loss_weight=-1.0), "loss_weight must be 0"),
        (lambda: balance_trace(capacity_factor=0.1), "capacity_factor must"),
    ],
)
def test_bad_input_is_named(call, says):
    with pytest.raises(ValueError, match=says):
        call()
