import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from warpmap import DEVICE
from warpmap.models.configs import MODELS
from warpmap.models.experts.mixture_of_experts import (
    MixtureOfExperts,
    dispatch,
    mixture,
    mixture_reference,
    top_k_gate,
)
from warpmap.models.foundations.feed_forward import SwiGLU
from warpmap.models.foundations.parameter_count import count

U = torch.finfo(torch.float64).eps / 2
U32 = torch.finfo(torch.float32).eps / 2
# (N, E, k): one token, none, all experts, one expert, experts without tokens
SHAPES = [(1, 4, 2), (0, 4, 2), (9, 3, 3), (5, 1, 1), (3, 16, 2), (40, 5, 2)]
C, F = 6, 10


def close(got, want, u=U):
    """Whether two results differ by rounding alone.

    No sum here has more than 40 terms, at most four follow one another, and
    their terms add up to less than 100: each errs by 40 u of that at most.
    """
    return got.shape == want.shape and torch.allclose(
        got, want, rtol=0, atol=4 * 40 * u * 100
    )


def inputs(N, E, k):
    x = torch.randn(N, C, dtype=torch.float64, device=DEVICE)
    logits = torch.randn(N, E, dtype=torch.float64, device=DEVICE)
    experts = [SwiGLU(C, F).double().to(DEVICE) for _ in range(E)]
    return x, logits, experts


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(("N", "E", "k"), SHAPES)
def test_gate_is_a_softmax_of_which_the_largest_are_kept(N, E, k, normalize):
    logits = torch.randn(N, E, dtype=torch.float64)
    weights, chosen = top_k_gate(logits, k, normalize)
    assert weights.shape == chosen.shape == (N, k)
    for row, w, c in zip(
        logits.tolist(), weights.tolist(), chosen.tolist(), strict=True
    ):
        assert c == sorted(range(E), key=lambda i: -row[i])[:k]
        counted = c if normalize else range(E)
        total = math.fsum(math.exp(row[i]) for i in counted)
        for weight, i in zip(w, c, strict=True):
            assert abs(weight - math.exp(row[i]) / total) < 40 * U


def test_gate_of_bfloat16_keeps_float32():
    logits = torch.randn(50, 8).bfloat16()
    weights, _ = top_k_gate(logits, 2)
    assert weights.dtype == torch.float32
    assert close(weights.double(), top_k_gate(logits.double(), 2)[0], U32)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients_agree_with_every_expert_on_every_token(shape):
    x, logits, experts = inputs(*shape)
    leaves = [x.requires_grad_(), logits.requires_grad_()]
    leaves += [w for expert in experts for w in expert.parameters()]
    weights, chosen = top_k_gate(logits, shape[2])
    got = mixture(x, weights, chosen, experts)
    want = mixture_reference(x, weights, chosen, experts)
    assert close(got, want)
    grad = torch.randn_like(want)
    ours = torch.autograd.grad(got, leaves, grad, True, allow_unused=True)
    theirs = torch.autograd.grad(want, leaves, grad)
    for a, b in zip(ours, theirs, strict=True):
        assert close(torch.zeros_like(b) if a is None else a, b)


def wrong_mixture(fault, x, weights, chosen, experts):
    """The dispatch, with one line changed."""
    k = chosen.shape[1]
    order, tokens, counts = dispatch(chosen, len(experts))
    if fault == "place taken for token":
        tokens = order % len(x)
    if fault == "unsorted":
        tokens = torch.arange(len(x), device=x.device).repeat_interleave(k)
    if fault == "experts shifted":
        counts = counts.roll(1)
    rows = x[tokens].split(counts.tolist())
    done = torch.cat([e(r) for e, r in zip(experts, rows, strict=True)])
    back = torch.empty_like(done)
    if fault == "sorted twice":
        back = done[order]
    elif fault == "not put back":
        back = done
    else:
        back[order] = done
    if fault == "weights of another choice":
        weights = weights.flip(1)
    if fault == "last choice lost":
        weights = weights * (torch.arange(k, device=x.device) < k - 1)
    return (back.view(len(x), k, -1) * weights[..., None]).sum(1)


@pytest.mark.parametrize(
    "fault",
    [
        None,
        "place taken for token",
        "unsorted",
        "experts shifted",
        "sorted twice",
        "not put back",
        "weights of another choice",
        "last choice lost",
    ],
)
def test_a_wrong_dispatch_is_caught(fault):
    x, logits, experts = inputs(12, 5, 2)
    given = x, *top_k_gate(logits, 2), experts
    wrong = wrong_mixture(fault, *given)
    assert close(wrong, mixture_reference(*given)) == (fault is None)


@pytest.mark.parametrize(("N", "E", "k"), SHAPES)
def test_rows_of_an_expert_lie_together_in_the_order_of_tokens(N, E, k):
    chosen = torch.rand(N, E).argsort(dim=1)[:, :k]
    sent = dispatch(chosen, E)
    assert sorted(sent.order.tolist()) == list(range(N * k))
    rows = sent.tokens.split(sent.counts.tolist())
    for expert, tokens in enumerate(rows):
        assert tokens.tolist() == [
            n for n in range(N) if expert in chosen[n].tolist()
        ]
        assert all(a < b for a, b in pairwise(tokens.tolist()))


class Counting(nn.Module):
    """An expert that notes how many tokens it ran each time."""

    def __init__(self):
        super().__init__()
        self.ran = []

    def forward(self, x):
        self.ran.append(len(x))
        return x


def test_an_expert_runs_its_own_tokens_once_and_no_others():
    x, logits, _ = inputs(40, 16, 2)
    weights, chosen = top_k_gate(logits, 2)
    sparse, dense = ([Counting() for _ in range(16)] for _ in range(2))
    mixture(x, weights, chosen, sparse)
    mixture_reference(x, weights, chosen, dense)
    ran = [sum(expert.ran) for expert in sparse]
    assert ran == dispatch(chosen, 16).counts.tolist()
    assert sum(ran) == 40 * 2
    assert sum(sum(expert.ran) for expert in dense) == 40 * 16
    assert max(len(expert.ran) for expert in sparse) == 1


@pytest.fixture(scope="module")
def mixtral():
    """Mixtral's block in float64, and our layer with its weights."""
    from transformers.models.mixtral.configuration_mixtral import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import (
        MixtralSparseMoeBlock,
    )

    torch.manual_seed(0)
    config = MixtralConfig(
        hidden_size=C,
        intermediate_size=F,
        num_local_experts=5,
        num_experts_per_tok=2,
        num_attention_heads=2,
        experts_implementation="eager",
    )
    theirs = MixtralSparseMoeBlock(config).double()
    ours = MixtureOfExperts(C, F, experts=5, per_token=2).double()
    with torch.no_grad():
        for weight in theirs.parameters():
            weight.normal_()
        ours.router.weight.copy_(theirs.gate.weight)
        for i, expert in enumerate(ours.experts):
            gate, up = theirs.experts.gate_up_proj[i].chunk(2)
            expert.gate.weight.copy_(gate)
            expert.up.weight.copy_(up)
            expert.down.weight.copy_(theirs.experts.down_proj[i])
    return theirs, ours


def test_agrees_with_transformers_mixtral(mixtral):
    theirs, ours = mixtral
    x = torch.randn(3, 7, C, dtype=torch.float64)
    _, weights, chosen = theirs.gate(x)
    mine, my_choice = top_k_gate(ours.router(x.flatten(0, 1)), 2)
    # Mixtral rounds logits to float32 before the softmax: the weights differ
    # by that, and by logits of size 30 at most
    assert torch.equal(my_choice, chosen)
    assert (mine - weights).abs().max() < 2 * (30 + 10) * U32

    # given the same weights, float64 agrees to its own rounding; outputs
    # stay below 1e4, in sums of 10 terms
    want = theirs.experts(x.flatten(0, 1), chosen, weights.double())
    got = mixture(x.flatten(0, 1), weights.double(), chosen, list(ours.experts))
    bound = 1e4 * 40 * U
    assert (got - want).abs().max() < bound < 1e-6 < want.abs().max()

    # and the whole block, as far as those weights allow
    assert (ours(x) - theirs(x)).abs().max() < 1e4 * 80 * U32


@pytest.mark.parametrize("fault", ["gate and up swapped", "not normalised"])
def test_a_wrong_mixtral_is_caught(mixtral, fault):
    theirs, ours = mixtral
    x = torch.randn(3, 7, C, dtype=torch.float64)
    wrong = MixtureOfExperts(
        C, F, 5, 2, normalize=fault != "not normalised"
    ).double()
    wrong.load_state_dict(ours.state_dict())
    if fault == "gate and up swapped":
        for expert in wrong.experts:
            expert.gate, expert.up = expert.up, expert.gate
    assert (wrong(x) - theirs(x)).abs().max() > 1e4 * 80 * U32


@pytest.mark.parametrize("shared", [0, 1, 3])
def test_active_parameters_are_those_with_a_gradient(shared):
    layer = MixtureOfExperts(C, F, experts=7, per_token=2, shared=shared)
    layer(torch.randn(1, C)).sum().backward()
    met = sum(w.numel() for w in layer.parameters() if w.grad is not None)
    assert layer.active_parameters() == met == C * 7 + (2 + shared) * 3 * C * F


@pytest.mark.parametrize("name", ["Mixtral 8x7B", "DeepSeek-V3"])
def test_layers_of_published_models_weigh_what_was_published(name):
    model = MODELS[name]
    with torch.device("meta"):
        layer = MixtureOfExperts(
            model.hidden_size,
            model.moe_intermediate_size,
            model.experts,
            model.experts_per_token,
            model.shared_experts,
        )
    parts, layers = count(model), model.layers - model.dense_layers
    # a bias an expert, which DeepSeek-V3 counts among its routers
    bias = model.experts * layers if model.router_bias else 0
    total = sum(w.numel() for w in layer.parameters())
    around = parts.routers - bias + parts.shared_experts
    assert total * layers == parts.routed_experts + around
    assert layer.active_parameters() * layers == parts.chosen_experts + around


def test_shared_experts_side_by_side_are_one_wide_expert():
    layer = MixtureOfExperts(C, F, experts=4, per_token=1, shared=3).double()
    x = torch.randn(2, 5, C, dtype=torch.float64)
    wide = layer.shared
    parts = torch.zeros_like(x)
    for n in range(3):
        mine = slice(n * F, (n + 1) * F)
        one = SwiGLU(C, F).double()
        one.gate.weight = nn.Parameter(wide.gate.weight[mine])
        one.up.weight = nn.Parameter(wide.up.weight[mine])
        one.down.weight = nn.Parameter(wide.down.weight[:, mine])
        parts += one(x)
    with_shared = layer(x)
    layer.shared = None
    assert close(with_shared, layer(x) + parts)
    assert not close(with_shared, layer(x))


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("pieces", [1, 2, 5])
def test_finer_experts_start_as_the_same_function(pieces, normalize):
    layer = MixtureOfExperts(C, F, 4, 2, shared=1, normalize=normalize).double()
    x = torch.randn(3, 5, C, dtype=torch.float64)
    fine = layer.fine_grained(pieces)
    assert close(fine(x), layer(x))
    assert (len(fine.experts), fine.per_token) == (4 * pieces, 2 * pieces)
    # the same weights run, but for the router's new rows
    more = fine.active_parameters() - layer.active_parameters()
    assert more == C * 4 * (pieces - 1)
    if pieces > 1:
        fine.per_token = 2  # forgotten: only a part of each expert runs
        assert not close(fine(x), layer(x))


def test_a_single_normalised_choice_teaches_the_router_nothing():
    x = torch.randn(9, C)
    slopes = []
    for normalize in (True, False):
        torch.manual_seed(0)
        layer = MixtureOfExperts(C, F, 4, per_token=1, normalize=normalize)
        layer(x).square().sum().backward()
        slopes.append(float(layer.router.weight.grad.abs().max()))
    # w / w is 1, whatever the router says
    assert slopes[0] < 1e-6 < 1e-3 < slopes[1]


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"per_token must be 1 to 4, .* got 5"):
        MixtureOfExperts(C, F, experts=4, per_token=5)
    with pytest.raises(ValueError, match="shared must be at least 0, got -1"):
        MixtureOfExperts(C, F, experts=4, per_token=2, shared=-1)
    with pytest.raises(ValueError, match="pieces must divide hidden, 10, got"):
        MixtureOfExperts(C, F, experts=4, per_token=2).fine_grained(3)
    for bad in [(torch.ones(4), 1), (torch.ones(2, 4), 5)]:
        with pytest.raises(ValueError, match=r"logits \(N, E\) and k from 1"):
            top_k_gate(*bad)
    x, weights, experts = torch.ones(2, C), torch.ones(2, 1), [nn.Identity()]
    chosen = torch.zeros(2, 1, dtype=torch.int64)
    for bad in [(x[0], weights, chosen), (x, weights[:1], chosen)]:
        with pytest.raises(ValueError, match=r"expected x \(N, C\)"):
            mixture(*bad, experts)
    with pytest.raises(ValueError, match="the same N"):
        mixture(x[:1], weights, chosen, experts)
    for number in (1, -1):
        with pytest.raises(ValueError, match=f"from 0 to 0, got {number}"):
            mixture(x, weights, chosen + number, experts)
