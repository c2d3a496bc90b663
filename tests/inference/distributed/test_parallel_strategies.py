"""Counts against real processes: tiny models, cut in every direction."""

import itertools
import math
from collections import defaultdict
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.nn.functional import silu
from torch.utils.flop_counter import FlopCounterMode

from warpmap.chart import LineChart
from warpmap.inference.decoding.memory_bound_decoding import (
    memory_bound_decoding,
)
from warpmap.inference.distributed import _stages
from warpmap.inference.distributed._side_by_side import (
    events,
    pieces,
    side_by_side,
)
from warpmap.inference.distributed._stages import Split, share_out, stages
from warpmap.inference.distributed.parallel_strategies import (
    CHIPS,
    DIRECTIONS,
    PRESETS,
    SPLITS,
    front_chart,
    parallel_strategies,
    splits,
    timeline,
)
from warpmap.models.configs import MODELS, ModelConfig, config
from warpmap.models.foundations.parameter_count import count
from warpmap.training.sharding.collective_operations import (
    ring_all_gather,
    ring_all_reduce,
)

PAGE = Path(__file__).parents[3] / "docs/inference/distributed"
BATCH, PROMPT = 8, 4
DENSE = ModelConfig(
    name="dense",
    source=("", ""),
    layers=4,
    hidden_size=16,
    heads=4,
    kv_heads=2,
    vocab_size=24,
    max_context=99,
    head_dim=4,
    intermediate_size=32,
)
TINY = {
    "dense": DENSE,
    "tied": replace(DENSE, tied_embeddings=True),
    "experts": replace(
        DENSE,
        experts=4,
        experts_per_token=2,
        moe_intermediate_size=8,
        shared_experts=1,
        dense_layers=1,
    ),
    "latent": replace(
        DENSE,
        kv_heads=4,
        head_dim=0,
        q_lora_rank=12,
        kv_lora_rank=8,
        qk_nope_head_dim=4,
        qk_rope_head_dim=2,
        v_head_dim=4,
    ),
}


# -- a model in one process ----------------------------------------------------


def make_weights(c):
    """All matrices as (in, out), in float64."""
    g = torch.Generator().manual_seed(1)

    def make(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64) / 3

    def ffn(width):
        C = c.hidden_size
        return {"up": make(C, width), "gate": make(C, width)} | {
            "down": make(width, C)
        }

    C, H = c.hidden_size, c.heads
    layers = []
    for n in range(c.layers):
        layer = {"norm": make(C), "norm_2": make(C)}
        if c.kv_lora_rank:
            rope, nope = c.qk_rope_head_dim, c.qk_nope_head_dim
            layer |= {
                "q_down": make(C, c.q_lora_rank),
                "q_norm": make(c.q_lora_rank),
                "kv_down": make(C, c.kv_lora_rank + rope),
                "kv_norm": make(c.kv_lora_rank),
                "q": make(c.q_lora_rank, H, nope + rope),
                "k": make(c.kv_lora_rank, H, nope),
                "v": make(c.kv_lora_rank, H, c.v_head_dim),
                "o": make(H, c.v_head_dim, C),
            }
        else:
            layer |= {
                "q": make(C, H, c.head_dim),
                "k": make(C, c.kv_heads, c.head_dim),
                "v": make(C, c.kv_heads, c.head_dim),
                "o": make(H, c.head_dim, C),
            }
        if c.experts and n >= c.dense_layers:
            layer["router"] = make(C, c.experts)
            layer["experts"] = [
                ffn(c.moe_intermediate_size) for _ in range(c.experts)
            ]
            layer["shared"] = ffn(c.shared_experts * c.moe_intermediate_size)
        else:
            layer["dense"] = ffn(c.intermediate_size)
        layers.append(layer)
    w = {"layers": layers, "embedding": make(c.vocab_size, C)}
    w["norm"] = make(C)
    w["head"] = w["embedding"] if c.tied_embeddings else make(c.vocab_size, C)
    return w


def norm(x, weight):
    return x * x.square().mean(-1, keepdim=True).rsqrt() * weight


def gated(x, w):
    return (silu(x @ w["gate"]) * (x @ w["up"])) @ w["down"]


def flat(w):
    return w.reshape(w.shape[0], -1)


def choose(c, scores, index, routing):
    """Experts of each token: the best ones, or all in turn."""
    if routing == "best":
        return scores.topk(c.experts_per_token).indices
    turns = torch.arange(c.experts_per_token)
    return (index[:, None] * c.experts_per_token + turns) % c.experts


def attend(q, k, v, offset):
    """Causal: (B, T, H, D) on (B, S, H, D)."""
    T, S = q.shape[1], k.shape[1]
    mask = torch.arange(S) > offset + torch.arange(T)[:, None]
    scores = q.transpose(1, 2) @ k.permute(0, 2, 3, 1)
    scores = scores / q.shape[-1] ** 0.5
    p = scores.masked_fill(mask, -math.inf).softmax(-1)
    return (p @ v.transpose(1, 2)).transpose(1, 2)


def tokens_of(c):
    g = torch.Generator().manual_seed(2)
    return torch.randint(c.vocab_size, (BATCH, PROMPT + 1), generator=g)


def index_of(requests, tokens):
    """A number for each new token, by which experts take turns."""
    return (requests[:, None] * tokens + torch.arange(tokens)).flatten()


def in_one_process(c, routing):
    """Logits after the prompt, and after one more token; nothing is cut."""
    w, ids = make_weights(c), tokens_of(c)
    everyone = torch.arange(BATCH)
    index = torch.cat(
        [
            index_of(everyone, PROMPT).view(BATCH, PROMPT),
            index_of(everyone, 1).view(BATCH, 1),
        ],
        dim=1,
    ).flatten()
    x = w["embedding"][ids]  # (B, T, C)
    for layer in w["layers"]:
        y = norm(x, layer["norm"])
        if c.kv_lora_rank:
            nope = c.qk_nope_head_dim
            q = norm(y @ layer["q_down"], layer["q_norm"])
            latent = y @ layer["kv_down"]
            rope = latent[..., c.kv_lora_rank :]
            latent = norm(latent[..., : c.kv_lora_rank], layer["kv_norm"])
            q = torch.einsum("btr,rhd->bthd", q, layer["q"])
            k = torch.einsum("btr,rhd->bthd", latent, layer["k"])
            v = torch.einsum("btr,rhd->bthd", latent, layer["v"])
            rope = rope[:, :, None].expand(-1, -1, c.heads, -1)
            assert q.shape[-1] == nope + rope.shape[-1]
            k = torch.cat([k, rope], dim=-1)
        else:
            q, k, v = (
                torch.einsum("btc,chd->bthd", y, layer[n]) for n in "qkv"
            )
            k, v = (
                z.repeat_interleave(c.heads // c.kv_heads, 2) for z in (k, v)
            )
        y = attend(q, k, v, 0)
        x = x + torch.einsum("bthd,hdc->btc", y, layer["o"])
        y = norm(x, layer["norm_2"])
        if "dense" in layer:
            x = x + gated(y, layer["dense"])
            continue
        rows = y.flatten(0, 1)
        scores = (rows @ layer["router"]).softmax(-1)
        chosen = choose(c, scores, index, routing)
        out = gated(rows, layer["shared"])
        for n in range(len(rows)):
            for e in chosen[n].tolist():
                out[n] += scores[n, e] * gated(rows[n], layer["experts"][e])
        x = x + out.view_as(x)
    logits = norm(x, w["norm"]) @ w["head"].T
    return logits[:, -2], logits[:, -1]


# -- the same model on ranks ---------------------------------------------------


class Rank:
    """One GPU's shard, and all that it sends."""

    def __init__(self, c, split, routing, fault):
        self.c, self.routing, self.fault = c, routing, fault
        ways = asdict(split)
        sizes = [ways[name] for name in ways]
        grid = torch.arange(split.gpus).view(sizes)
        self.ways = ways
        self.at, self.group = {}, {}
        for axis, name in enumerate(ways):
            self.at[name] = 0
            if sizes[axis] == 1:
                continue
            rows = grid.movedim(axis, -1).reshape(-1, sizes[axis])
            for row in rows.tolist():  # every rank makes every group
                group = dist.new_group(row)
                if dist.get_rank() in row:
                    self.at[name] = row.index(dist.get_rank())
                    self.group[name] = group
        self.sent = defaultdict(int)
        p, at = ways["pipeline"], self.at["pipeline"]
        self.first = c.layers * at // p
        self.last = c.layers * (at + 1) // p
        self.shard(make_weights(c))
        self.cache = defaultdict(list)

    def part(self, tensor, dim, name):
        """This rank's slice of a tensor, by one direction."""
        return tensor.chunk(self.ways[name], dim)[self.at[name]].clone()

    def kv_heads(self, heads, ways, at):
        """Which of the heads a rank needs; with few heads, a copy."""
        if heads >= ways:
            width = heads // ways
            return slice(at * width, (at + 1) * width)
        return slice(at * heads // ways, at * heads // ways + 1)

    def cut_ffn(self, w):
        return {
            name: self.part(m, 0 if name == "down" else 1, "tensor")
            for name, m in w.items()
        }

    def shard(self, w):
        c, t, at = self.c, self.ways["tensor"], self.at["tensor"]
        if self.fault == "another rank's heads":
            at = (at + 1) % t
        self.w = {}
        if self.first == 0:
            self.w["embedding"] = self.part(w["embedding"], 0, "tensor")
        if self.last == c.layers:
            self.w["norm"] = w["norm"]
            tied = c.tied_embeddings and self.first == 0
            self.w["head"] = (
                self.w["embedding"]
                if tied
                else self.part(w["head"], 0, "tensor")
            )
        self.layers = []
        for layer in w["layers"][self.first : self.last]:
            mine = dict(layer)
            width = c.heads // t
            heads = slice(at * width, (at + 1) * width)
            kv = heads
            if not c.kv_lora_rank:
                kv = self.kv_heads(c.kv_heads, t, at)
            mine["q"] = layer["q"][:, heads].clone()
            mine["k"] = layer["k"][:, kv].clone()
            mine["v"] = layer["v"][:, kv].clone()
            mine["o"] = self.part(layer["o"], 0, "tensor")
            for name in ("dense", "shared"):
                if name in layer:
                    mine[name] = self.cut_ffn(layer[name])
            if "experts" in layer:
                here = c.experts // self.ways["expert"]
                start = self.at["expert"] * here
                if self.fault == "another rank's experts":
                    start = (start + here) % c.experts
                mine["experts"] = [
                    self.cut_ffn(e) for e in layer["experts"][start:][:here]
                ]
            self.layers.append(mine)

    def held(self):
        """Parameters of this rank, each storage once."""
        found = {}

        def walk(node):
            if isinstance(node, torch.Tensor):
                found[node.data_ptr()] = node.numel()
            else:
                for child in node.values() if isinstance(node, dict) else node:
                    walk(child)

        walk([self.w, self.layers])
        return sum(found.values())

    # what goes over the wire; _pass_on of the ring calls this as well

    def wire(self, kind, function, *args):
        real = dist.batch_isend_irecv

        def spy(ops):
            for op in ops:
                if op.op is dist.isend:
                    self.sent[kind] += op.tensor.numel()
            return real(ops)

        with pytest.MonkeyPatch.context() as patch:
            if kind:
                patch.setattr(dist, "batch_isend_irecv", spy)
            return function(*args)

    def add_up(self, x, kind):
        if self.fault == f"no {kind}" or self.ways["tensor"] == 1:
            return x
        group = self.group["tensor"]
        return self.wire("all-reduce", ring_all_reduce, x, group)

    def exchange(self, chunks, sizes, name):
        """Chunk j goes to rank j; returns what came, by rank."""
        group, me = self.group.get(name), self.at[name]
        came = [chunks[0].new_empty(n, *chunks[0].shape[1:]) for n in sizes]
        came[me] = chunks[me]
        ops = []
        for j in range(len(chunks)):
            if j == me:
                continue
            send = chunks[j].contiguous()
            ops.append(dist.P2POp(dist.isend, send, group=group, group_peer=j))
            ops.append(
                dist.P2POp(dist.irecv, came[j], group=group, group_peer=j)
            )
        for work in dist.batch_isend_irecv(ops) if ops else []:
            work.wait()
        return came

    def to_next(self, x):
        self.pipe(dist.isend, x.contiguous(), self.at["pipeline"] + 1)

    def pipe(self, operation, x, peer):
        group = self.group["pipeline"]
        op = dist.P2POp(operation, x, group=group, group_peer=peer)
        (work,) = self.wire("send", lambda: dist.batch_isend_irecv([op]))
        work.wait()

    # a visit of this stage

    def attention(self, y, layer, n, key, T):
        """``y``: this rank's tokens, (n, C); all tokens are (B * T)."""
        c, s, me = self.c, self.ways["sequence"], self.at["sequence"]
        if c.kv_lora_rank:
            q = norm(y @ layer["q_down"], layer["q_norm"])
            latent = y @ layer["kv_down"]
            low = norm(latent[:, : c.kv_lora_rank], layer["kv_norm"])
            shared = torch.cat([low, latent[:, c.kv_lora_rank :]], dim=1)
            kv = [shared] * s
        else:
            q = y
            k, v = (
                (y @ flat(layer[z])).view(len(y), -1, c.head_dim) for z in "kv"
            )
            cuts = [self.kv_heads(k.shape[1], s, j) for j in range(s)]
            kv = [
                torch.cat([k[:, cut], v[:, cut]], 1).flatten(1) for cut in cuts
            ]
        wide = layer["q"].shape[-1]
        q = (q @ flat(layer["q"])).view(len(y), -1, wide)
        chunks = [
            torch.cat([heads.flatten(1), z], 1)
            for heads, z in zip(q.chunk(s, 1), kv, strict=True)
        ]
        sizes = [len(y)] * s
        if s > 1:
            args = chunks, sizes, "sequence"
            chunks = self.wire("all-to-all", self.exchange, *args)
        rows = torch.cat(chunks)  # all tokens, some of the heads
        heads = q.shape[1] // s
        q = rows[:, : heads * wide].view(n, T, heads, wide)
        kept = self.cache[key]
        kept.append(rows[:, heads * wide :].view(n, T, -1))
        past = torch.cat(kept, 1)
        if c.kv_lora_rank:
            low, rope = past.split([c.kv_lora_rank, c.qk_rope_head_dim], -1)
            mine = slice(me * heads, (me + 1) * heads)
            k, v = (
                torch.einsum("btr,rhd->bthd", low, layer[z][:, mine])
                for z in "kv"
            )
            k = torch.cat([k, rope[:, :, None].expand(-1, -1, heads, -1)], -1)
        else:
            k, v = past.view(n, past.shape[1], -1, c.head_dim).chunk(2, 2)
            k, v = (z.repeat_interleave(heads // z.shape[2], 2) for z in (k, v))
        out = attend(q, k, v, past.shape[1] - T).reshape(n * T, -1)
        if s > 1:
            args = list(out.chunk(s)), [len(y)] * s, "sequence"
            back = self.wire("all-to-all", self.exchange, *args)
            out = torch.cat(back, 1)
        out = out @ layer["o"].flatten(0, 1)
        return self.add_up(out, "all-reduce after attention")

    def experts(self, y, layer, index):
        c, e = self.c, self.ways["expert"]
        scores = (y @ layer["router"]).softmax(-1)
        chosen = choose(c, scores, index, self.routing)
        here = c.experts // e
        owner = (chosen // here).flatten()
        order = owner.argsort(stable=True)
        rows = torch.arange(len(y)).repeat_interleave(chosen.shape[1])[order]
        counts = owner.bincount(minlength=e)
        if e > 1:
            # counts and numbers of experts are not activations: not counted
            table = [torch.empty_like(counts) for _ in range(e)]
            dist.all_gather(table, counts, group=self.group["expert"])
            get = [int(t[self.at["expert"]]) for t in table]
            give = counts.tolist()
            names = chosen.flatten()[order].split(give)
            ids = torch.cat(self.exchange(list(names), get, "expert"))
            args = list(y[rows].split(give)), get, "expert"
            work = torch.cat(self.wire("all-to-all", self.exchange, *args))
        else:
            ids, work = chosen.flatten()[order], y[rows]
        done = torch.zeros_like(work)
        for n, w in enumerate(layer["experts"]):
            mine = ids % here == n
            done[mine] = gated(work[mine], w)
        if e > 1:
            args = list(done.split(get)), give, "expert"
            done = torch.cat(self.wire("all-to-all", self.exchange, *args))
        gates = scores[rows, chosen.flatten()[order]]
        out = gated(y, layer["shared"])
        return out.index_add(0, rows, done * gates[:, None])

    def visit(self, ids, index, flight, T):
        """Logits of the last tokens, on the last stage."""
        c, s, t = self.c, self.ways["sequence"], self.ways["tensor"]
        n = len(ids)
        mine = ids.flatten().chunk(s)[self.at["sequence"]]
        index = index.chunk(s)[self.at["sequence"]]
        x = torch.zeros(len(mine), c.hidden_size, dtype=torch.float64)
        if self.first == 0:
            rows = len(self.w["embedding"])
            local = mine - self.at["tensor"] * rows
            known = (local >= 0) & (local < rows)
            x[known] = self.w["embedding"][local[known]]
            x = self.add_up(x, "all-reduce of embeddings")
        else:
            self.pipe(dist.irecv, x, self.at["pipeline"] - 1)
        for number, layer in enumerate(self.layers):
            y = norm(x, layer["norm"])
            x = x + self.attention(y, layer, n, (flight, number), T)
            y = norm(x, layer["norm_2"])
            if "dense" in layer:
                y = gated(y, layer["dense"])
            else:
                y = self.experts(y, layer, index)
            x = x + self.add_up(y, "all-reduce after FFN")
        if self.last < c.layers:
            self.to_next(x)
            return None
        x = x.view(-1, T, c.hidden_size)[:, -1]
        part = norm(x, self.w["norm"]) @ self.w["head"].T
        if t == 1:
            return part
        args = part.contiguous(), self.group["tensor"]
        parts = self.wire("all-gather", ring_all_gather, *args)
        return torch.cat(list(parts), 1)


def serve(c, split, routing, fault):
    """A prompt and one more token; what this rank held, did and sent."""
    torch.use_deterministic_algorithms(False)
    rank = Rank(c, split, routing, fault)
    ids = tokens_of(c)
    load = share_out(split, BATCH)
    groups = split.data * split.expert
    me = rank.at["data"] * split.expert + rank.at["expert"]
    assert groups * load.requests == BATCH
    mine = torch.arange(BATCH)[me * load.requests :][: load.requests]
    answers, seen = [], []
    for phase in (slice(0, PROMPT), slice(PROMPT, PROMPT + 1)):
        T = phase.stop - phase.start
        logits = []
        rank.sent.clear()
        with FlopCounterMode(display=False) as counter:
            for flight, requests in enumerate(mine.split(load.together)):
                index = index_of(requests, T)
                out = rank.visit(ids[requests, phase], index, flight, T)
                s, n = split.sequence, rank.at["sequence"]
                if out is not None:
                    logits.append((requests.chunk(s)[n], out))
        answers.append(logits)
        seen.append((dict(rank.sent), counter.get_total_flops()))
    cached = sum(z.numel() for kept in rank.cache.values() for z in kept)
    return answers, seen, rank.held(), cached, rank.at["pipeline"]


# -- checks --------------------------------------------------------------------


def compare(c, split, routing, answers):
    """Ranks answer as one process does, each request at least once."""
    for phase, right in enumerate(in_one_process(c, routing)):
        got = set()
        for answer in answers:
            for requests, logits in answer[0][phase]:
                torch.testing.assert_close(logits, right[requests])
                got |= set(requests.tolist())
        assert got == set(range(BATCH))


def compare_counts(c, split, answers, made=stages):
    """Held, cached, sent and computed: as planned, on each rank."""
    prompt = made(c, split, BATCH, PROMPT, PROMPT)
    decode = made(c, split, BATCH, PROMPT + 1)
    flights = share_out(split, BATCH).flights
    for _, seen, held, cached, at in answers:
        assert held == decode[at].parameters
        assert cached == decode[at].cache_values
        for part, (sent, _) in zip((prompt, decode), seen, strict=True):
            planned = defaultdict(float)
            for m in part[at].messages:
                planned[m.kind] += flights * m.sent / 2  # two bytes a value
            assert sent == dict(planned)
        if not c.kv_lora_rank:  # its latent is counted without expanding it
            flops = sum(op.flops for op in decode[at].operators)
            assert seen[1][1] == pytest.approx(flights * flops)


ONE = [Split(**{name: 2}) for name in DIRECTIONS]
CASES = [
    *(("dense", s) for s in ONE if s.expert == 1),
    *(("experts", s) for s in ONE),
    *(("latent", s) for s in ONE if s.expert == 1),
    ("dense", Split(tensor=4)),  # more GPUs than key-value heads
    ("dense", Split(sequence=4)),
    ("dense", Split(tensor=2, sequence=2)),
    ("latent", Split(tensor=2, sequence=2)),
    ("dense", Split(data=2, pipeline=2)),
    ("tied", Split(tensor=2, pipeline=2)),
    ("tied", Split(tensor=2)),
    ("dense", Split(pipeline=4)),
    ("experts", Split(expert=4)),
    ("experts", Split(tensor=2, expert=2)),
    ("experts", Split(pipeline=2, expert=2)),
    ("experts", Split(data=2, expert=2)),
]


def name_of(case):
    kind, split = case
    ways = [f"{n} {w}" for n, w in asdict(split).items() if w > 1]
    return f"{kind}: {', '.join(ways)}"


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_ranks_hold_send_and_compute_what_is_planned(ranks, case):
    c, split = TINY[case[0]], case[1]
    answers = ranks(split.gpus).run(serve, c, split, "in turn", "")
    compare(c, split, "in turn", answers)
    compare_counts(c, split, answers)


@pytest.mark.parametrize(
    "split", [Split(expert=2), Split(expert=4), Split(tensor=2, expert=2)]
)
def test_tokens_find_the_experts_that_they_chose(ranks, split):
    c = TINY["experts"]
    answers = ranks(split.gpus).run(serve, c, split, "best", "")
    compare(c, split, "best", answers)


@pytest.mark.parametrize(
    ("kind", "split", "fault"),
    [
        ("dense", Split(tensor=2), "no all-reduce after attention"),
        ("dense", Split(tensor=2), "no all-reduce after FFN"),
        ("dense", Split(tensor=2), "no all-reduce of embeddings"),
        ("dense", Split(tensor=2), "another rank's heads"),
        ("experts", Split(expert=2), "another rank's experts"),
    ],
    ids=str,
)
def test_faulty_ranks_are_caught(ranks, kind, split, fault):
    c = TINY[kind]
    answers = ranks(split.gpus).run(serve, c, split, "in turn", fault)
    with pytest.raises(AssertionError):
        compare(c, split, "in turn", answers)


@pytest.mark.parametrize(
    ("kind", "split", "wrong"),
    [
        ("dense", Split(tensor=2), {"kv_heads": 4}),
        ("dense", Split(tensor=2), {"vocab_size": 25}),
        ("dense", Split(tensor=2), {"layers": 5}),
        ("dense", Split(pipeline=2), {"hidden_size": 18}),
        ("dense", Split(sequence=2), {"kv_heads": 4}),
        ("experts", Split(expert=2), {"experts_per_token": 1}),
        ("experts", Split(expert=2), {"dense_layers": 0}),
        ("latent", Split(sequence=2), {"kv_lora_rank": 9}),
    ],
    ids=str,
)
def test_wrong_plans_are_caught(ranks, kind, split, wrong):
    c = TINY[kind]
    answers = ranks(split.gpus).run(serve, c, split, "in turn", "")
    compare_counts(c, split, answers)
    with pytest.raises(AssertionError):
        compare_counts(replace(c, **wrong), split, answers)


@pytest.mark.parametrize(
    ("kind", "split", "name", "planted"),
    [
        (
            "dense",
            Split(tensor=2),
            "_messages",
            lambda real: lambda *a: (m for m in real(*a) if m.part != "FFN"),
        ),
        (
            "experts",
            Split(expert=2),
            "_messages",
            lambda real: (
                lambda *a: (replace(m, size=m.size // 2) for m in real(*a))
            ),
        ),
        (
            "dense",
            Split(tensor=4),
            "_cache_share",
            lambda real: lambda c, split: 1 / split.tensor / 2,
        ),
        (
            "latent",
            Split(tensor=2),
            "_cache_share",
            lambda real: lambda c, split: 1 / split.tensor,
        ),
        ("latent", Split(tensor=2), "_whole", lambda real: lambda c: 0),
    ],
    ids=["one all-reduce", "half", "copied head", "latent", "down projection"],
)
def test_faults_in_the_plan_are_caught(
    ranks, monkeypatch, kind, split, name, planted
):
    c = TINY[kind]
    answers = ranks(split.gpus).run(serve, c, split, "in turn", "")
    compare_counts(c, split, answers)
    _stages._stage.cache_clear()
    monkeypatch.setattr(_stages, name, planted(getattr(_stages, name)))
    with pytest.raises(AssertionError):
        compare_counts(c, split, answers)
    _stages._stage.cache_clear()


# -- published models, without processes ---------------------------------------

BIG = ["Llama 3 70B", "Mixtral 8x7B", "DeepSeek-V3", "gpt-oss 120B"]


@pytest.mark.parametrize("name", MODELS)
def test_one_gpu_is_the_model(name):
    c = config(name)
    (stage,) = stages(c, Split(), 5, 1000)
    assert stage.parameters == count(c).total
    assert stage.messages == []
    plan = parallel_strategies(name, tensor=1, batch=5, context=1000)
    alone = memory_bound_decoding(name, batch=5, context=1000)
    assert plan.token_ms == pytest.approx(alone.step_ms)
    assert plan.gflops == pytest.approx(alone.gflops)
    assert plan.cache_gib * 2**30 == pytest.approx(alone.cache_gb * 1e9)
    assert plan.copies == 1


def totals(c, split, batch=64, context=4096):
    """Parameters, cached values and operations of all GPUs together."""
    parts = stages(c, split, batch, context)
    times = split.gpus // split.pipeline
    flights = share_out(split, batch).flights
    return (
        times * sum(s.parameters for s in parts),
        times * sum(s.cache_values for s in parts),
        times * flights * sum(op.flops for s in parts for op in s.operators),
    )


@pytest.mark.parametrize("name", BIG)
def test_nothing_is_lost(name):
    """The sum over GPUs is the model, plus what is known to be copied."""
    c = config(name)
    _, cached, flops = totals(c, Split())
    n = count(c)
    router = 0
    if c.experts:
        expert_layers = c.layers - c.dense_layers
        router = 2 * 64 * expert_layers * c.experts * c.hidden_size
    latents = c.q_lora_rank + c.kv_lora_rank + c.qk_rope_head_dim
    down = c.layers * c.hidden_size * latents if c.kv_lora_rank else 0
    for split in splits(c, 8):
        d, t, s, e = split.data, split.tensor, split.sequence, split.expert
        once, kept, done = totals(c, split)
        copied = n.norms + n.routers + down
        divided = n.total - copied
        experts = n.routed_experts
        # each term once for every GPU that has its own copy
        expected = d * s * e * (divided - experts) + d * s * experts
        expected += d * s * e * t * copied
        if t <= c.kv_heads or c.kv_lora_rank:
            assert once == pytest.approx(expected, abs=d * s * e * t * 8 * 8)
        if c.kv_lora_rank:
            assert kept == t * s * cached
        elif t * s <= c.kv_heads:
            assert kept == cached
        # routers, and MLA's down projections, are computed by all of t
        again = (t - 1) * (router + 2 * 64 * down)
        assert done == pytest.approx(flops + again)


def test_prompts_and_single_tokens_add_up():
    """A prompt at once computes as much as its tokens one by one."""
    c, split = config("Llama 3 8B"), Split(tensor=2)
    (at_once,) = stages(c, split, 1, 99, 99)
    steps = [stages(c, split, 1, n)[0] for n in range(1, 100)]
    for op in at_once.operators:
        each = [
            o.flops for s in steps for o in s.operators if o.name == op.name
        ]
        wanted = each[0] if op.name == "head" else sum(each)
        assert op.flops == pytest.approx(wanted), op.name
    sent = sum(m.sent for s in steps for m in s.messages if m.part != "ends")
    prompt = sum(m.sent for m in at_once.messages if m.part != "ends")
    assert prompt == pytest.approx(sent)


def test_messages_by_hand():
    """Llama 3 70B, 8192 wide, 80 layers, 64 heads of 128, 8 for keys."""
    hidden = 16 * 8192 * 2
    c = config("Llama 3 70B")
    (stage,) = stages(c, Split(tensor=8), 16, 4096)
    sizes = [(m.kind, m.size, m.times) for m in stage.messages]
    assert sizes == [
        ("all-reduce", hidden, 1),
        ("all-reduce", hidden, 80),
        ("all-reduce", hidden, 80),
        ("all-gather", 16 * 128256 * 2, 1),
    ]
    (stage,) = stages(c, Split(sequence=8), 16, 4096)
    sizes = [(m.kind, m.size, m.times) for m in stage.messages]
    assert sizes == [
        ("all-to-all", 2 * (64 + 16) * 128 * 2, 80),
        ("all-to-all", 2 * 64 * 128 * 2, 80),
    ]
    first, *_, last = stages(c, Split(pipeline=8), 16, 4096)
    assert [m.size for m in first.messages] == [2 * 8192 * 2]
    assert last.messages == []


def slow_timeline(seconds, flights, steps):
    """Event by event: whoever can start first does."""
    waiting = [(0.0, 0, flight, 0) for flight in range(flights)]
    free = [0.0] * len(seconds)
    done = [0.0] * steps
    while waiting:
        waiting.sort(key=lambda w: (max(w[0], free[w[3]]), w[1], w[2]))
        ready, step, flight, stage = waiting.pop(0)
        free[stage] = end = max(ready, free[stage]) + seconds[stage]
        if stage + 1 < len(seconds):
            waiting.append((end, step, flight, stage + 1))
        else:
            done[step] = max(done[step], end)
            if step + 1 < steps:
                waiting.append((end, step + 1, flight, 0))
    return done


@pytest.mark.parametrize("flights", [1, 2, 3, 5])
@pytest.mark.parametrize("seconds", [[3.0], [1.0, 4.0, 2.0], [2.0, 2.0, 2.5]])
def test_timeline_is_that_of_a_queue(flights, seconds):
    done = timeline(seconds, flights, steps=6)
    assert done == pytest.approx(slow_timeline(seconds, flights, 6))
    # from the second step on all are alike, in closed form
    steady = max(sum(seconds), flights * max(seconds))
    gaps = [b - a for a, b in itertools.pairwise(done)]
    assert gaps == pytest.approx([steady] * 5)


def test_ways_differ_as_the_page_says():
    def token_ms(way, **work):
        return parallel_strategies(**{"tensor": 1, way: 8, **work}).token_ms

    # one request: only tensor and expert parallelism are faster than one GPU
    alone = parallel_strategies(tensor=1, batch=1).token_ms
    assert token_ms("tensor", batch=1) < alone / 3
    assert token_ms("expert", batch=1) < alone
    for way in ("pipeline", "sequence"):
        assert token_ms(way, batch=1) > alone
    # prompts turn the order around
    order = ["data", "sequence", "expert", "tensor"]
    times = [token_ms(way, batch=8, new_tokens=4096) for way in order]
    assert times == sorted(times)


@pytest.mark.parametrize("context", [512, 4096, 32768])
def test_front_is_not_dominated(context):
    chart = front_chart(context=context)
    assert isinstance(chart, LineChart)
    front = chart.lines[0].points
    assert front == sorted(front)
    assert [p[1] for p in front] == sorted(p[1] for p in front)
    for line in chart.lines:
        for ms, rate in line.points:
            assert any(f[0] <= ms and f[1] >= rate for f in front)
    plan = parallel_strategies(context=context)
    (here,) = chart.points
    assert (here.x, here.y) == (plan.token_ms, plan.tokens_per_s_per_gpu)


def test_chart_without_room_shows_the_point():
    chart = front_chart(model="DeepSeek-V3", tensor=1, memory_gib=24.0)
    assert [line.points for line in chart.lines] == [[]]
    assert len(chart.points) == 1


def test_page_numbers():
    page = (PAGE / "parallel_strategies.md").read_text("utf-8")
    for way in DIRECTIONS:
        split = {"tensor": 1, way: 8}
        plan = parallel_strategies(**split)
        row = (
            f"| {way} | {plan.weights_gib:.1f} | {plan.cache_gib:.1f} | "
            f"{plan.messages} | {plan.sent_mb:.1f} |"
        )
        for batch, new in ((1, 1), (64, 1), (1, 4096), (8, 4096)):
            plan = parallel_strategies(**split, batch=batch, new_tokens=new)
            row += f" {plan.token_ms:.1f} |"
        assert row in page, row
    assert f"{len(CASES)} combinations" in page
    c = config("Mixtral 8x7B")
    for batch, wanted in (
        (16, "TP 8"),
        (64, "TP 4, EP 2"),
        (256, "TP 2, EP 4"),
    ):
        front = front_chart().lines[0].points
        ways = dict(zip(("TP", "EP"), (8, 1), strict=True))
        ways |= {p.split()[0]: int(p.split()[1]) for p in wanted.split(", ")}
        split = Split(tensor=ways["TP"], expert=ways["EP"])
        assert split in splits(c, 8)
        plan = parallel_strategies(**asdict(split), batch=batch)
        assert (plan.token_ms, plan.tokens_per_s_per_gpu) in front
        text = f"| {batch} | {wanted} | {plan.token_ms:.1f} |"
        assert text in page, text
    one = parallel_strategies("DeepSeek-V3", weight_bytes=1.0)
    two = parallel_strategies(
        "DeepSeek-V3", tensor=1, expert=8, weight_bytes=1.0
    )
    assert f"{one.cache_gib:.1f} GiB" in page
    assert f"{two.cache_gib:.1f} GiB" in page


def test_menus_fit():
    for preset in [*PRESETS.values(), *SPLITS.values(), *CHIPS.values()]:
        parallel_strategies(**{"tensor": 1, **preset})


@pytest.mark.parametrize(
    "wrong",
    [
        {"model": "Llama 9"},
        {"data": 0},
        {"data": 16, "tensor": 4},
        {"tensor": 3},
        {"tensor": 64},
        {"pipeline": 32, "tensor": 1, "model": "gpt-oss 20B"},
        {"sequence": 6, "tensor": 1},
        {"expert": 3},
        {"expert": 2, "model": "Llama 3 8B"},
        {"batch": 0},
        {"context": 0},
        {"new_tokens": 5000},
        {"link_gb_s": 0.0},
        {"alpha_us": float("nan")},
    ],
    ids=str,
)
def test_bad_input_is_named(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        parallel_strategies(**wrong)


# -- the trace -----------------------------------------------------------------


@pytest.mark.parametrize("way", DIRECTIONS)
@pytest.mark.parametrize("requests", [1, 2, 5])
def test_trace_takes_as_long_as_the_plan(way, requests):
    found = events(way, 4, requests, 2)
    c = replace(config("Mixtral 8x7B"), layers=4)
    split = Split(**{way: 4})
    parts = stages(c, split, requests, 4096)
    seconds = [sum(p.us for p in pieces(s)) for s in parts]
    for s, us in zip(parts, seconds, strict=True):
        waits = sum(m.seconds(5.0, 450.0) for m in s.messages)
        works = sum(
            max(
                op.flops / 989.4e12, (op.weight_bytes + op.cache_bytes) / 4.8e12
            )
            for op in s.operators
        )
        assert us == pytest.approx((waits + works) * 1e6)
    flights = share_out(split, requests).flights
    done = timeline(seconds, flights, 2)
    assert max(e.end for e in found) == pytest.approx(done[-1])
    # the hook changes nothing
    assert timeline(seconds, flights, 2, lambda *_: None) == done
    for gpu in range(4):
        busy = sorted((e.start, e.end) for e in found if gpu in e.gpus)
        for before, after in itertools.pairwise(busy):
            assert before[1] <= after[0] + 1e-6, "two things at once"


def test_last_frame_shows_everything():
    trace = side_by_side()
    assert 10 <= len(trace) <= 40
    lanes = trace[-1].picture
    assert lanes.now == lanes.end
    rows = iter(lanes.lanes)
    for way in ("tensor", "pipeline"):
        found = events(way, 4, 2, 1)
        for gpu in range(4):
            name, spans = next(rows)
            assert name == f"{way} {gpu}"
            mine = [(e.start, e.end) for e in found if gpu in e.gpus]
            assert [(s.start, s.end) for s in spans] == mine
    for before, after in itertools.pairwise(trace):
        assert before.picture.now <= after.picture.now


@pytest.mark.parametrize(
    "wrong", [{"gpus": 3}, {"requests": 0}, {"requests": 9}, {"steps": 3}]
)
def test_bad_traces_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        side_by_side(**wrong)
