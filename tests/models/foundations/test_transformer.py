import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from warpmap import DEVICE
from warpmap.models.attention.grouped_query_attention import causal_mask
from warpmap.models.foundations.transformer import (
    Block,
    Transformer,
)

WIDTH, HEADS, HIDDEN = 24, 4, 56  # no 4 C: a mixed-up shape must not fit


def torch_layer(**changes):
    """PyTorch's layer, in float64, with no weight at its initial value."""
    made = {
        "dim_feedforward": HIDDEN,
        "dropout": 0.0,
        "activation": "gelu",
        "batch_first": True,
        "norm_first": True,
        "dtype": torch.float64,
        "device": DEVICE,
        **changes,
    }
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, **made)
    with torch.no_grad():
        for weight in layer.parameters():
            weight.add_(torch.randn_like(weight) / 4)
    return layer


def hidden_from(T):
    """PyTorch's mask, which says who is *not* seen."""
    seen = torch.ones(T, T, dtype=torch.bool, device=DEVICE).tril()
    return ~seen


# What rounding explains: results here are of size 1 to 100 and sum a few
# hundred products, each off by 1e-16 of itself: some 1e-13 in all.
CLOSE = {"rtol": 1e-10, "atol": 1e-11}


@pytest.mark.parametrize("T", [1, 2, 17])
@pytest.mark.parametrize("causal", [True, False])
def test_block_and_its_gradients_agree_with_torch(T, causal):
    layer = torch_layer()
    block = Block.from_torch(layer)
    x = torch.randn(3, T, WIDTH, dtype=torch.float64, device=DEVICE)
    weights = torch.randn_like(x)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()

    got = block(ours, causal_mask(T, T, x.device) if causal else None)
    want = layer(theirs, src_mask=hidden_from(T) if causal else None)
    torch.testing.assert_close(got, want, **CLOSE)

    (got * weights).sum().backward()
    (want * weights).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, **CLOSE)
    grads = {name: w.grad for name, w in layer.named_parameters()}
    for end in ("weight", "bias"):
        q, k, v = grads[f"self_attn.in_proj_{end}"].chunk(3)
        pairs = {
            "norm1": grads[f"norm1.{end}"],
            "q": q,
            "k": k,
            "v": v,
            "out": grads[f"self_attn.out_proj.{end}"],
            "norm2": grads[f"norm2.{end}"],
            "up": grads[f"linear1.{end}"],
            "down": grads[f"linear2.{end}"],
        }
        for name, grad in pairs.items():
            mine = getattr(getattr(block, name), end).grad
            torch.testing.assert_close(mine, grad, **CLOSE)


def no_residual_after_attention(block, x, mask):
    normal = block.norm1(x)
    x = block.attend(normal, block.k(normal), block.v(normal), mask)
    return x + block.transform(block.norm2(x))


def norm_after_the_sum(block, x, mask):
    x = block.norm1(x + block.attend(x, block.k(x), block.v(x), mask))
    return block.norm2(x + block.transform(x))


def one_norm_for_both(block, x, mask):
    normal = block.norm1(x)
    k, v = block.k(normal), block.v(normal)
    return x + block.attend(normal, k, v, mask) + block.transform(normal)


def keys_from_the_raw_stream(block, x, mask):
    normal = block.norm1(x)
    x = x + block.attend(normal, block.k(x), block.v(normal), mask)
    return x + block.transform(block.norm2(x))


def gelu_by_tanh(block, x, mask):
    block.transform = lambda y: block.down(
        nn.functional.gelu(block.up(y), approximate="tanh")
    )
    return block(x, mask)


def heads_not_split(block, x, mask):
    block.heads = 1
    return block(x, mask)


def queries_and_keys_swapped(block, x, mask):
    block.q, block.k = block.k, block.q
    return block(x, mask)


def sees_the_future(block, x, mask):
    return block(x)


def small_eps(block, x, mask):
    block.norm1.eps = 1e-6
    return block(x / 10, mask)  # a tenth, so that eps matters


FAULTS = [
    no_residual_after_attention,
    norm_after_the_sum,
    one_norm_for_both,
    keys_from_the_raw_stream,
    gelu_by_tanh,
    heads_not_split,
    queries_and_keys_swapped,
    sees_the_future,
    small_eps,
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.__name__)
def test_checks_catch(fault):
    layer = torch_layer()
    x = torch.randn(2, 9, WIDTH, dtype=torch.float64, device=DEVICE)
    wrong = fault(Block.from_torch(layer), x, causal_mask(9, 9, x.device))
    want = layer(x / 10 if fault is small_eps else x, src_mask=hidden_from(9))
    with pytest.raises(AssertionError):
        torch.testing.assert_close(wrong, want, **CLOSE)


@pytest.fixture(scope="module")
def gpt2():
    """Transformers' GPT-2, small, with random weights."""
    from transformers.models.gpt2.configuration_gpt2 import GPT2Config
    from transformers.models.gpt2.modeling_gpt2 import GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=31,
        n_positions=12,
        n_embd=WIDTH,
        n_layer=3,
        n_head=HEADS,
        activation_function="gelu",
    )
    torch.manual_seed(1)
    model = GPT2LMHeadModel(config).double().eval().to(DEVICE)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) / 4)
    return model


@torch.no_grad()
def copied(gpt2):
    """Our model with the weights of theirs, which lie transposed there."""
    theirs = gpt2.transformer
    model = Transformer(31, WIDTH, 3, HEADS, 12).double().to(DEVICE)
    model.embedding.copy_(theirs.wte.weight)
    model.positions.copy_(theirs.wpe.weight)
    model.norm.load_state_dict(theirs.ln_f.state_dict())
    for ours, block in zip(model.blocks, theirs.h, strict=True):
        ours.norm1.load_state_dict(block.ln_1.state_dict())
        ours.norm2.load_state_dict(block.ln_2.state_dict())
        q, k, v = block.attn.c_attn.weight.chunk(3, dim=1)
        qb, kb, vb = block.attn.c_attn.bias.chunk(3)
        for linear, weight, bias in (
            (ours.q, q, qb),
            (ours.k, k, kb),
            (ours.v, v, vb),
            (ours.out, block.attn.c_proj.weight, block.attn.c_proj.bias),
            (ours.up, block.mlp.c_fc.weight, block.mlp.c_fc.bias),
            (ours.down, block.mlp.c_proj.weight, block.mlp.c_proj.bias),
        ):
            linear.weight.copy_(weight.T)
            linear.bias.copy_(bias)
    return model


def test_the_whole_model_agrees_with_gpt2(gpt2):
    tokens = torch.randint(31, (2, 12), device=DEVICE)
    with torch.no_grad():
        want = gpt2(tokens).logits
        model = copied(gpt2)
        torch.testing.assert_close(model(tokens), want, **CLOSE)
        # and without positions, or without the last norm, it does not
        model.positions.zero_()
        assert not torch.allclose(model(tokens), want, atol=0.1)
        model = copied(gpt2)
        model.norm = nn.Identity()
        assert not torch.allclose(model(tokens), want, atol=0.1)


def test_a_token_depends_on_itself_and_those_before():
    model = Transformer(31, WIDTH, 2, HEADS, 12).to(DEVICE)
    tokens = torch.arange(12, device=DEVICE)[None]
    changed = tokens.clone()
    changed[0, 7] = 30
    for causal, alone in ((True, 7), (False, 0)):
        same = (model(tokens, causal) == model(changed, causal)).all(dim=2)[0]
        assert same.tolist() == [True] * alone + [False] * (12 - alone)


def test_operations_are_those_of_the_table():
    B, T, C = 2, 16, 32
    model = Transformer(100, width=C, layers=3, heads=4, longest=T).to(DEVICE)
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(B, T, dtype=torch.long, device=DEVICE))
    block = 6 * T * C * C + 2 * T * T * C + 2 * T * T * C
    block += 2 * T * C * C + 16 * T * C * C
    assert block == 24 * T * C * C + 4 * T * T * C
    assert counter.get_total_flops() == B * (3 * block + 2 * T * C * 100)


def test_parameters_are_those_of_the_table():
    V, C, L, T = 100, 32, 3, 16
    model = Transformer(V, width=C, layers=L, heads=4, longest=T)
    count = sum(weight.numel() for weight in model.parameters())
    # biases 9 C and norms 4 C a block, 2 C for the last norm
    assert count == V * C + T * C + L * (12 * C * C + 13 * C) + 2 * C
    with torch.device("meta"):
        smallest_gpt2 = Transformer(50257, 768, 12, 12, 1024)
    count = sum(weight.numel() for weight in smallest_gpt2.parameters())
    assert count == 124_439_808


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="multiple of heads, got 24 and 5"):
        Block(24, heads=5, hidden=8)
    with pytest.raises(ValueError, match="layers must be at least 1, got 0"):
        Transformer(9, 8, layers=0, heads=2, longest=4)
    model = Transformer(9, 8, layers=1, heads=2, longest=4)
    with pytest.raises(ValueError, match="5 tokens, but only 4 positions"):
        model(torch.zeros(1, 5, dtype=torch.long))
    with pytest.raises(ValueError, match=r"got torch.float32 of shape \(3,\)"):
        model(torch.zeros(3))
    for wrong in ({"norm_first": False}, {"activation": "relu"}):
        with pytest.raises(ValueError, match="expected norm_first=True and"):
            Block.from_torch(torch_layer(**wrong))
