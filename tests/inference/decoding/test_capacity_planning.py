"""Plans against limits by hand, random routing, and a simulated server."""

import dataclasses
import math
import random
from pathlib import Path

import pytest

from warpmap.hardware.gpus import gpu
from warpmap.inference.decoding.capacity_planning import (
    CHIPS,
    PRESETS,
    SERVERS,
    at_batch,
    capacity_chart,
    capacity_planning,
    copies,
    decode_seconds,
    memory_of,
    message_seconds,
    prefill_seconds,
    price_per_million,
    server_of,
)
from warpmap.inference.decoding.memory_bound_decoding import (
    memory_bound_decoding,
    operators,
)
from warpmap.inference.decoding.serving_metrics import simulate
from warpmap.models.configs import config
from warpmap.models.foundations.parameter_count import count

ROOT = Path(__file__).parents[3]
PAGE = ROOT / "docs/inference/decoding/capacity_planning.md"

LLAMA = config("Llama 3 8B")
DEEPSEEK = config("DeepSeek-V3")
INFINITE = 1e12


def wide(ranks, **more):
    return server_of(
        "H800 SXM",
        "fp8",
        data_parallel=ranks,
        expert_parallel=True,
        **more,
    )


# -- one GPU is the decoding step of the topic before --------------------------


@pytest.mark.parametrize("name", ["Llama 3 8B", "Qwen3 30B-A3B"])
@pytest.mark.parametrize("batch", [1, 40, 900])
def test_one_gpu_takes_the_step_of_memory_bound_decoding(name, batch):
    plan = at_batch(
        config(name), server_of("H200 SXM", "bf16"), batch, 900, 200
    )
    step = memory_bound_decoding(name, batch, context=1000)
    assert plan.step_ms == pytest.approx(step.step_ms)
    assert plan.decode_tokens_per_s == pytest.approx(step.tokens_per_s)
    assert plan.messages_ms == 0


# -- limits by hand ------------------------------------------------------------


def test_arithmetic_is_the_limit_of_short_contexts():
    server = server_of("H200 SXM", "bf16")
    plan = at_batch(LLAMA, server, 10**7, 1, 2)
    products = sum(o.flops for o in operators(LLAMA, 1, 0))
    assert plan.decode_tokens_per_s == pytest.approx(
        989.4e12 / products,
        rel=5e-3,  # two tokens of attention
    )


def test_the_cache_is_the_limit_of_long_contexts():
    server = server_of("H200 SXM", "bf16")
    plan = at_batch(LLAMA, server, 64, 10**6, 2)
    assert plan.decode_tokens_per_s == pytest.approx(
        4.8e12 / (131072 * (10**6 + 1)), rel=2e-3
    )


def test_the_network_is_the_limit_of_many_gpus():
    """3 bytes for each value and copy: fp8 out, bf16 back; DeepSeek's sum.

    DeepSeek-V3 sends a token to 9 experts, 7K values each: 120.96 µs for 32
    tokens at 50 GB/s, twice as long with two microbatches, 61 layers.
    """
    c = dataclasses.replace(
        DEEPSEEK, hidden_size=7000, experts_per_token=9, dense_layers=0
    )
    server = wide(10**6, gpus_per_node=1)
    once = message_seconds(c, server, 32) / 61
    assert once == pytest.approx(120.96e-6, rel=1e-4)
    assert 2 * 61 * once == pytest.approx(14.76e-3, rel=1e-3)


def test_prefill_of_a_long_prompt_is_arithmetic():
    server = server_of("H200 SXM", "bf16")
    P = 8192
    ops, messages = prefill_seconds(LLAMA, server, P)
    layers = sum(o.flops for o in operators(LLAMA, 1, 0) if o.name != "head")
    causal = sum(4 * 32 * 128 * 32 * i for i in range(1, P + 1))
    # the head is needed once, and only reads its weights
    head = 128256 * 4096 * 2 / 4.8e12
    assert messages == 0
    assert ops == pytest.approx((P * layers + causal) / 989.4e12 + head)


def test_prefill_of_windows_counts_what_they_see():
    server = server_of("H200 SXM", "bf16")
    c = config("Mistral 7B v0.1")
    for P in (100, 4096, 9000):
        with_window = prefill_seconds(c, server, P)[0]
        without = dataclasses.replace(c, window=0, windowed_layers=0)
        seen = sum(min(i, 4096) for i in range(1, P + 1))
        more = P * (P + 1) // 2 - seen
        assert prefill_seconds(without, server, P)[0] - with_window == (
            pytest.approx(more * 4 * 32 * 128 * 32 / 989.4e12, abs=1e-7)
        )


def test_short_prompts_wait_for_weights():
    server = server_of("H200 SXM", "bf16")
    ops, _ = prefill_seconds(LLAMA, server, 1)
    step, _ = decode_seconds(LLAMA, server, 1, 1)
    assert ops == pytest.approx(step, rel=1e-3)


# -- splitting -----------------------------------------------------------------


def test_tensor_parallel_without_messages_divides_the_step():
    one = server_of("H200 SXM", "bf16")
    eight = dataclasses.replace(
        one, tensor_parallel=8, node_bytes_per_s=INFINITE * 1e9
    )
    ops, messages = decode_seconds(LLAMA, eight, 64, 4000)
    assert messages < 1e-9
    assert ops == pytest.approx(decode_seconds(LLAMA, one, 64, 4000)[0] / 8)


def test_more_gpus_than_heads_hold_copies_of_the_cache():
    for group, part in ((1, 1), (4, 1 / 4), (8, 1 / 8), (16, 1 / 8)):
        server = server_of("H200 SXM", tensor_parallel=group)
        assert memory_of(LLAMA, server, 1000)[1] == part * 131072 * 1000
        # the latent of MLA cannot be divided
        assert memory_of(DEEPSEEK, server, 1000)[1] == 70272 * 1000


def test_all_reduce_by_hand():
    server = server_of("H200 SXM", tensor_parallel=8, start_up=3e-6)
    size = 64 * 4096 * 2
    once = 3e-6 + 2 * 7 / 8 * size / 450e9
    assert message_seconds(LLAMA, server, 64) == pytest.approx(64 * once)
    # a group that spans nodes goes over the network
    server = dataclasses.replace(server, gpus_per_node=4)
    once = 3e-6 + 2 * 7 / 8 * size / 50e9
    assert message_seconds(LLAMA, server, 64) == pytest.approx(64 * once)


def test_groups_that_share_nothing_do_not_matter():
    one = capacity_planning("Mixtral 8x7B", data_parallel=1)
    many = capacity_planning("Mixtral 8x7B", data_parallel=64)
    assert one == many


@pytest.mark.parametrize("ranks", [2, 8, 144])
def test_weights_of_all_gpus_are_the_model_and_its_copies(ranks):
    n = count(DEEPSEEK)
    held, _ = memory_of(DEEPSEEK, wide(ranks), 1)
    shared = n.total - n.routed_experts
    assert held * ranks == pytest.approx(n.routed_experts + ranks * shared)


def test_spread_experts_are_read_once_and_used_by_all():
    """All GPUs together do what one GPU would do with all requests."""
    ranks, batch = 16, 20
    one = server_of("H800 SXM")
    alone = {o.name: o for o in operators(DEEPSEEK, batch, 0, 1)}
    together = {o.name: o for o in operators(DEEPSEEK, ranks * batch, 0, 1)}
    expected = sum(
        max(o.flops / 1978.9e12, o.weight_bytes / 3.35e12)
        for o in alone.values()
        if o.name not in ("experts", "attention")
    )
    e = together["experts"]
    expected += max(e.flops / 1978.9e12, e.weight_bytes / 3.35e12) / ranks
    a = operators(DEEPSEEK, batch, 1000, 1)[1]
    expected += max(a.flops / 989.4e12, a.cache_bytes / 3.35e12)
    ops, _ = decode_seconds(DEEPSEEK, wide(ranks), batch, 1000)
    assert ops == pytest.approx(expected)
    assert ops < decode_seconds(DEEPSEEK, one, batch, 1000)[0]


@pytest.mark.parametrize(("ranks", "node"), [(8, 8), (32, 8), (72, 8), (6, 1)])
def test_copies_are_those_of_random_choices(ranks, node):
    away = near = 0
    rounds = 8000
    for _ in range(rounds):
        mine = random.randrange(ranks)
        gpus = {random.randrange(ranks) for _ in range(8)} - {mine}
        nodes = {g // node for g in gpus} - {mine // node}
        away += len(nodes)
        # the first copy in another node need not be forwarded
        near += len(gpus) - len(nodes)
    found = copies(8, ranks, node)
    # nodes and GPUs drawn apart: no node is left out that holds only me
    assert found[0] == pytest.approx(away / rounds, rel=0.02, abs=1e-9)
    assert found[1] == pytest.approx(near / rounds, rel=0.04, abs=1e-9)


def test_overlap_hides_the_shorter():
    apart = at_batch(DEEPSEEK, wide(32), 60, 2000, 500)
    hidden = at_batch(DEEPSEEK, wide(32, overlap=True), 60, 2000, 500)
    both = apart.operators_ms + apart.messages_ms
    assert apart.step_ms == pytest.approx(both)
    assert hidden.step_ms == max(hidden.operators_ms, hidden.messages_ms)


# -- a server in time ----------------------------------------------------------


def served(plan, output_tokens, arrivals):
    return simulate(
        arrivals,
        output_tokens,
        plan.prefill_ms / 1e3,
        plan.step_ms / 1e3,
        0.0,
        plan.batch,
    )


@pytest.mark.parametrize(("prompt", "output"), [(300, 200), (4000, 50)])
def test_throughput_is_that_of_a_simulated_server(prompt, output):
    """As many requests as it can take: the batch is full in every step."""
    plan = at_batch(
        LLAMA, server_of("H200 SXM"), 24, prompt, output, separate_prefill=False
    )
    log = served(plan, output, [0.0] * (24 * 20))
    seconds = max(r.tokens[-1] for r in log)
    assert plan.tokens_per_s == pytest.approx(len(log) * output / seconds)


@pytest.mark.parametrize("batch", [2, 3, 24])
@pytest.mark.parametrize(("prompt", "output"), [(3000, 200), (4000, 50)])
def test_time_per_token_is_that_of_a_simulated_server(prompt, output, batch):
    """Requests come one by one, as often as they can just be served."""
    server = server_of("H200 SXM")
    plan = at_batch(
        LLAMA, server, batch, prompt, output, separate_prefill=False
    )
    apart = output / plan.tokens_per_s
    log = served(plan, output, [n * apart for n in range(batch * 60)])
    later = log[batch * 20 : batch * 40]
    stall = sum(r.tpot for r in later) / len(later) * 1e3 - plan.step_ms
    assert stall == pytest.approx(plan.tpot_ms - plan.step_ms, rel=0.06)


def test_separate_prefill_costs_the_same_time_and_stalls_nobody():
    server = server_of("H200 SXM")
    one = at_batch(LLAMA, server, 24, 4000, 50, separate_prefill=False)
    two = at_batch(LLAMA, server, 24, 4000, 50, separate_prefill=True)
    assert one.tokens_per_s == two.tokens_per_s
    assert one.tpot_ms > two.tpot_ms == two.step_ms


# -- the largest batch ---------------------------------------------------------


@pytest.mark.parametrize("separate", [True, False])
@pytest.mark.parametrize("limit", [8.0, 20.0, 1000.0])
def test_batch_is_the_largest_that_keeps_the_limits(limit, separate):
    plan = capacity_planning(
        "Llama 3 8B",
        tensor_parallel=1,
        tpot_limit_ms=limit,
        separate_prefill=separate,
    )
    server = server_of("H200 SXM")
    context = 2000 + 250
    more = at_batch(LLAMA, server, plan.batch + 1, 2000, 500, separate)
    held, cache = memory_of(LLAMA, server, context)
    room = server.memory_bytes - held
    assert plan.tpot_ms <= limit
    assert plan.batch * cache <= room
    if plan.limited_by == "memory":
        assert (plan.batch + 1) * cache > room
    else:
        assert more.tpot_ms > limit


def test_faster_answers_cost_more():
    limits = (8, 15, 25, 50)
    prices = [
        round(capacity_planning(tpot_limit_ms=t).dollars_per_million_output, 9)
        for t in limits
    ]
    assert prices == sorted(prices, reverse=True)
    assert prices[0] > 2 * prices[-1]


# -- beside published figures --------------------------------------------------

# DeepSeek-V3/R1 Inference System Overview, Open Infra Index, 1 March 2025
NODES, INPUT, CACHED, OUTPUT = 226.75, 608e9, 342e9, 168e9
NODE_INPUT, NODE_OUTPUT, CONTEXT = 73.7e3, 14.8e3, 4989


def test_published_figures_fit_together():
    """Tokens over rates give the nodes; context gives the lengths."""
    busy = INPUT / NODE_INPUT + OUTPUT / NODE_OUTPUT
    assert busy / 86400 == pytest.approx(NODES, rel=2e-3)
    assert pytest.approx(87072) == NODES * 8 * 24 * 2
    output = CONTEXT / (INPUT / OUTPUT + 1 / 2)
    prompt = output * INPUT / OUTPUT
    mix = SERVERS["DeepSeek-V3 as published"]
    assert (round(prompt), round(output)) == (4383, 1211)
    assert mix["prompt_tokens"] == 4383
    assert mix["output_tokens"] == 1211


def test_published_rates_stay_below_the_bound():
    best = capacity_planning(**SERVERS["DeepSeek-V3 as published"])
    assert NODE_OUTPUT / 8 < best.decode_tokens_per_s < 5 * NODE_OUTPUT / 8
    ops, messages = prefill_seconds(DEEPSEEK, wide(32), 4383)
    computed = NODE_INPUT / 8 * (1 - CACHED / INPUT)
    assert computed < 4383 / (ops + messages) < 3 * computed


def test_measured_exchange_stays_below_the_bound():
    """DeepEP's README: 192 + 369 µs for 128 tokens over 128 H800."""
    bound = message_seconds(DEEPSEEK, wide(128), 128) / 58
    assert bound < (192 + 369) * 1e-6 < 2 * bound


def test_page_numbers():
    page = " ".join(PAGE.read_text("utf-8").split())
    batch = 88
    apart = at_batch(DEEPSEEK, wide(144), batch, 4383, 1211)
    ops, messages = prefill_seconds(DEEPSEEK, wide(32), 4383)
    attention = operators(DEEPSEEK, batch, CONTEXT, 1)[1]
    weights = memory_of(DEEPSEEK, wide(144), 1)[0]
    read = weights - DEEPSEEK.vocab_size * DEEPSEEK.hidden_size
    best = capacity_planning(**SERVERS["DeepSeek-V3 as published"])
    tokens = NODE_OUTPUT / 8
    published = batch / tokens * 1e3
    exchange = (192 + 369) * 1e-3 * 58 * batch / 128
    bound = message_seconds(DEEPSEEK, wide(128), 128) / 58
    in_turn, hidden = (
        8 * 4383 / s / 1e3 for s in (ops + messages, max(ops, messages))
    )
    for number in (
        f"{tokens:,.0f} tokens a second",
        f"{tokens / 21:.0f} requests",
        f"{published:.1f} ms",
        f"{apart.operators_ms:.1f} ms",
        f"{apart.messages_ms:.1f} ms",
        f"{apart.step_ms:.1f} ms",
        f"{published / apart.step_ms:.1f} times",
        f"{published / apart.operators_ms:.1f} times",
        f"{bound * 1e6:.0f} µs",
        f"{exchange:.1f} ms instead of {apart.messages_ms:.1f}",
        f"{attention.flops / 580e9:.1f} ms instead of "
        f"{attention.cache_bytes / 3.35e9:.1f}",
        f"{read / 3.35e9:.1f} ms",
        f"{best.batch} requests",
        f"{best.tpot_ms:.1f} ms",
        f"{8 * best.decode_tokens_per_s / 1e3:.1f}k",
        f"{NODE_INPUT * (1 - CACHED / INPUT) / 1e3:.1f}k",
        f"{in_turn:.0f}k",
        f"{hidden:.0f}k",
        f"${price_per_million(tokens, 2):.2f}",
        f"${price_per_million(NODE_INPUT / 8, 2):.2f}",
        f"${NODES * 8 * 24 * 2 / OUTPUT * 1e6:.2f}",
        f"${best.dollars_per_million_output:.3f}",
    ):
        assert number in page, number


# -- the calculator ------------------------------------------------------------


def test_chart_passes_through_the_readers_point():
    chart = capacity_chart(tpot_limit_ms=20.0)
    plan = capacity_planning(tpot_limit_ms=20.0)
    here = chart.points[0]
    assert (here.x, here.y) == (plan.tpot_ms, plan.decode_tokens_per_s)
    assert (here.x, here.y) in chart.lines[0].points


def test_menus_fit():
    for preset in SERVERS.values():
        capacity_planning(**preset)
        capacity_chart(**preset)
    for preset in PRESETS.values():
        plenty = {"tensor_parallel": 8, "gpu": "GB200", "weights": "fp8"}
        capacity_planning(**preset, **plenty)
    for name, preset in CHIPS.items():
        plan = capacity_planning(
            "Qwen3 0.6B", **preset, tensor_parallel=1, tpot_limit_ms=1000.0
        )
        assert plan.weights_gb < gpu(name).memory_gb


def test_price():
    assert price_per_million(1850, 2) == pytest.approx(2 / (1850 * 3600 / 1e6))


@pytest.mark.parametrize(
    "wrong",
    [
        {"model": "Llama 9"},
        {"gpu": "H900"},
        {"gpu": "L4"},  # too small
        {"weights": "fp4"},
        {"gpu": "A100 80GB SXM"},  # weights: no fp8
        {"tensor_parallel": 0},
        {"tensor_parallel": 3},
        {"data_parallel": -1},
        {"expert_parallel": True},
        {"gpus_per_node": 0},
        {"network_gb_s": 0.0},
        {"start_up_us": -1.0},
        {"start_up_us": math.nan},
        {"prompt_tokens": 0},
        {"output_tokens": 1},
        {"tpot_limit_ms": 0.1},
        {"tpot_limit_ms": math.inf},
        {"cache_bytes": 0.0},
        {"dollars_per_hour": -2.0},
    ],
    ids=str,
)
def test_bad_input_is_named(wrong):
    named = next(iter(wrong))
    if wrong == {"gpu": "A100 80GB SXM"}:
        named = "weights"
    with pytest.raises(ValueError, match=named):
        capacity_planning(**wrong)
