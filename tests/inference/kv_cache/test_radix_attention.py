import random
import re
from collections import Counter
from itertools import pairwise, permutations

import pytest

from warpmap.inference.kv_cache import radix_attention
from warpmap.inference.kv_cache.radix_attention import (
    RadixCache,
    count_reused,
    radix_trace,
)

CAPACITY = 12
SEEDS = range(40)


class Prefixes:
    """The same cache without a tree: a dictionary of every cached prefix.

    A node is what lies between two ``ends``, the lengths at which a request
    once ended or parted from what was cached.
    """

    def __init__(self, capacity):
        self.capacity = capacity
        self.used = {}  # prefix -> when a request last passed
        self.slot = {}  # prefix -> where its last token lies
        self.ends = set()
        self.locked = []  # one prefix for each lock
        self.clock = 0

    def match(self, tokens):
        self.clock += 1
        length = max(
            (n for n in range(1, len(tokens) + 1) if tokens[:n] in self.used),
            default=0,
        )
        for n in range(1, length + 1):
            self.used[tokens[:n]] = self.clock
        if length:
            self.ends.add(tokens[:length])
        return length

    def slots(self, prefix):
        return [self.slot[prefix[:n]] for n in range(1, len(prefix) + 1)]

    def kept(self, prefix, locked):
        return any(other[: len(prefix)] == prefix for other in locked)

    def evict(self, count, locked=None):
        """Drop leaves; False, and nothing dropped, where too few may go."""
        locked = self.locked if locked is None else locked
        if count > sum(not self.kept(p, locked) for p in self.used):
            return False
        goal = len(self.used) - count
        while len(self.used) > goal:
            # a leaf: of all cached prefixes only it extends itself
            leaves = [
                end
                for end in self.ends
                if sum(p[: len(end)] == end for p in self.used) == 1
                and not self.kept(end, locked)
            ]
            # never a tie: no request passes two leaves
            assert len({self.used[end] for end in leaves}) == len(leaves)
            leaf = min(leaves, key=self.used.get)
            self.ends.remove(leaf)
            while leaf and leaf not in self.ends:
                del self.used[leaf], self.slot[leaf]
                leaf = leaf[:-1]
        return True

    def insert(self, tokens):
        """How many tokens were cached; None where there is no room."""
        if len(tokens) > self.capacity:
            return None
        length = self.match(tokens)
        free = self.capacity - len(self.used)
        missing = len(tokens) - length
        if missing:
            if not self.evict(missing - free, [*self.locked, tokens[:length]]):
                return None
            for n in range(length + 1, len(tokens) + 1):
                self.used[tokens[:n]] = self.clock
            self.ends.add(tokens)
        return length


def flattened(cache):
    """The slot of every cached prefix, and the locks of every node."""
    slots, locks = {}, {(): cache.root.locks}

    def visit(node, before):
        for first, child in node.children.items():
            assert child.parent is node
            assert child.tokens[0] == first
            assert len(child.tokens) == len(child.slots)
            for n, slot in enumerate(child.slots, start=1):
                slots[before + child.tokens[:n]] = slot
            locks[before + child.tokens] = child.locks
            visit(child, before + child.tokens)

    visit(cache.root, ())
    return slots, locks


def check(cache, model):
    slots, locks = flattened(cache)
    # every slot is free or belongs to one token, and to one only
    assert sorted([*cache.free, *slots.values()]) == list(range(cache.capacity))
    # the same prefixes, none has moved, and none in use is gone
    assert slots == model.slot
    assert all(not prefix or prefix in slots for prefix in model.locked)
    # a node counts the locks at and below it
    for end, count in locks.items():
        assert count == sum(p[: len(end)] == end for p in model.locked)


def any_tokens(rng):
    alphabet = "ab" if rng.random() < 0.7 else "abc"
    return tuple(rng.choices(alphabet, k=rng.randrange(10)))


STEPS = ["insert", "insert", "match", "lock", "unlock", "evict"]


def run_against_model(make_cache, seed, steps=400):
    rng = random.Random(seed)
    cache, model = make_cache(CAPACITY), Prefixes(CAPACITY)
    in_flight = []
    seen = Counter()

    for _ in range(steps):
        step = rng.choice(STEPS)
        tokens = any_tokens(rng)
        if step == "insert":
            length = model.insert(tokens)
            if length is None:
                step = "refused"
                with pytest.raises(ValueError, match="in flight lock"):
                    cache.insert(tokens)
            else:
                leaf, reused = cache.insert(tokens)
                assert reused == length
                for n, slot in enumerate(cache.slots(leaf), start=1):
                    assert model.slot.setdefault(tokens[:n], slot) == slot
        elif step == "match":
            length = model.match(tokens)
            slots = cache.slots(cache.match(tokens))
            assert slots == model.slots(tokens[:length])
        elif step == "lock" and len(in_flight) < 3:
            length = model.match(tokens)
            node = cache.match(tokens)
            cache.lock(node)
            in_flight.append((node, tokens[:length]))
            model.locked.append(tokens[:length])
        elif step == "unlock" and in_flight:
            node, prefix = in_flight.pop(rng.randrange(len(in_flight)))
            cache.unlock(node)
            model.locked.remove(prefix)
        elif step == "evict":
            count = rng.randrange(4)
            before = len(model.used)
            if model.evict(count):
                assert cache.evict(count) == before - len(model.used)
            else:
                step = "refused"
                with pytest.raises(ValueError, match="in flight lock"):
                    cache.evict(count)
        check(cache, model)
        # a handle ends where it ended, whatever was split since
        for node, prefix in in_flight:
            assert cache.slots(node) == model.slots(prefix)
        seen[step] += 1
    return seen


@pytest.mark.parametrize("seed", SEEDS)
def test_random_requests_agree_with_a_dictionary_of_prefixes(seed):
    seen = run_against_model(RadixCache, seed)
    assert all(seen[step] for step in (*STEPS, "refused"))


class SplitLosesASlot(RadixCache):
    def _split(self, lower, at):
        upper = super()._split(lower, at)
        upper.slots = upper.slots[:-1] + upper.slots[:1]
        return upper


class SplitForgetsTheLocks(RadixCache):
    def _split(self, lower, at):
        upper = super()._split(lower, at)
        upper.locks = 0
        return upper


class SplitKeepsTheUpperHalf(RadixCache):
    def _split(self, lower, at):
        upper = super()._split(lower, at)
        # swap the two objects: handles now end at the upper half
        a, b = vars(lower).copy(), vars(upper).copy()
        vars(upper).update(a)
        vars(lower).update(b)
        lower.children, upper.parent = {upper.tokens[0]: upper}, lower
        lower.parent.children[lower.tokens[0]] = lower
        for child in upper.children.values():
            child.parent = upper
        return lower


class MatchStopsAtANodeBoundary(RadixCache):
    def match(self, tokens):
        self.clock += 1
        node, rest = self.root, tuple(tokens)
        while rest and rest[0] in node.children:
            child = node.children[rest[0]]
            if rest[: len(child.tokens)] != child.tokens:
                break
            node, rest = child, rest[len(child.tokens) :]
            node.used = self.clock
        return node


class EvictionIgnoresLocks(RadixCache):
    def _unlocked_leaves(self):
        return (node for node in self._nodes() if not node.children)


class EvictionTakesTheNewestLeaf(RadixCache):
    def _unlocked_leaves(self):
        return [max(super()._unlocked_leaves(), key=lambda node: node.used)]


class EvictionTakesParents(RadixCache):
    def _unlocked_leaves(self):
        return (node for node in self._nodes() if not node.locks)


class EvictionKeepsTheSlots(RadixCache):
    def evict(self, count):
        freed = super().evict(count)
        for _ in range(min(freed, 1)):
            self.free.pop()
        return freed


class InsertDoesNotLockItsPrefix(RadixCache):
    def insert(self, tokens):
        self.lock = self.unlock = lambda node: None
        try:
            return super().insert(tokens)
        finally:
            del self.lock, self.unlock


@pytest.mark.parametrize(
    "wrong",
    [
        SplitLosesASlot,
        SplitForgetsTheLocks,
        SplitKeepsTheUpperHalf,
        MatchStopsAtANodeBoundary,
        EvictionIgnoresLocks,
        EvictionTakesTheNewestLeaf,
        EvictionTakesParents,
        EvictionKeepsTheSlots,
        InsertDoesNotLockItsPrefix,
    ],
)
def test_a_wrong_cache_is_caught(wrong):
    def caught(seed):
        try:
            run_against_model(wrong, seed)
        except (AssertionError, pytest.fail.Exception, ValueError, LookupError):
            return True
        return False

    assert any(caught(seed) for seed in SEEDS)


def test_depth_first_order_reuses_the_most_of_all_orders():
    rng = random.Random(0)
    order_matters = 0
    for _ in range(20):
        requests = [any_tokens(rng) for _ in range(5)]
        longest = max(1, *map(len, requests))
        # each distinct prefix must be computed once, whatever the order
        distinct = {r[:n] for r in requests for n in range(1, len(r) + 1)}
        bound = sum(map(len, requests)) - len(distinct)

        every = {
            count_reused(order, longest) for order in permutations(requests)
        }
        # sorting visits the radix tree depth first
        assert count_reused(sorted(requests), longest) == max(every) == bound
        order_matters += len(every) > 1
    assert order_matters > 10


def test_first_come_first_served_reuses_less():
    requests = ["aab", "bba", "aaa", "bbb"]
    assert count_reused(requests, capacity=3) == 0
    assert count_reused(sorted(requests), capacity=3) == 4
    # with room for everything the order does not matter
    assert count_reused(requests, capacity=12) == 4


def test_a_prompt_is_cached_only_from_its_start():
    assert count_reused(["abc", "xbc"], capacity=6) == 0


def test_the_empty_request_needs_no_slot():
    cache = RadixCache(capacity=1)
    leaf, reused = cache.insert([])
    assert (cache.slots(leaf), reused, str(cache)) == ([], 0, "")
    cache.lock(leaf)
    cache.unlock(leaf)


def test_locks_are_shown_and_shared_by_the_path():
    cache = RadixCache(capacity=6)
    first, _ = cache.insert("abc")
    second, _ = cache.insert("abx")
    for node in (first, second, second):
        cache.lock(node)
    assert str(cache).splitlines() == [
        "a b [0 1] t2 locks=3",
        "  c [2] t1 locks=1",
        "  x [3] t2 locks=2",
    ]


@pytest.mark.parametrize("capacity", [0, -1])
def test_an_empty_pool_is_refused(capacity):
    with pytest.raises(ValueError, match=f"1 slot or more, got {capacity}"):
        RadixCache(capacity)


def test_a_request_longer_than_the_pool_is_refused_untouched():
    cache = RadixCache(capacity=3)
    cache.insert("abc")
    with pytest.raises(ValueError, match="4 tokens do not fit 3 slots"):
        cache.insert("abcd")
    assert str(cache) == "a b c [0 1 2] t1"


def test_a_refused_request_frees_nothing_not_even_its_own_prefix():
    cache = RadixCache(capacity=5)
    leaf, _ = cache.insert("abc")
    cache.lock(leaf)
    cache.insert("xy")
    for tokens, needed, unlocked in (("def", 3, 2), ("xyz", 1, 0)):
        refusal = f"{needed} more slots needed, only {unlocked} can"
        with pytest.raises(ValueError, match=refusal):
            cache.insert(tokens)
    assert not cache.free
    assert cache.insert("xy")[1] == 2


def test_locks_are_undone_where_they_were_taken():
    cache = RadixCache(capacity=6)
    leaf, _ = cache.insert("abc")
    cache.lock(leaf)
    upper = cache.match("ab")
    for node in (upper, cache.root):  # locked, but only on behalf of the leaf
        with pytest.raises(ValueError, match="unlocked more often than locked"):
            cache.unlock(node)
    cache.unlock(leaf)
    with pytest.raises(ValueError, match="unlocked more often than locked"):
        cache.unlock(leaf)


def test_an_evicted_node_is_refused():
    cache = RadixCache(capacity=3)
    leaf, _ = cache.insert("abc")
    cache.evict(1)
    for use in (cache.lock, cache.unlock, cache.slots):
        with pytest.raises(ValueError, match="not in the tree"):
            use(leaf)


# -- the trace -----------------------------------------------------------------


def check_trace(trace):
    """Every frame agrees with itself: no slot twice, none lost."""
    for frame in trace:
        nodes = {node.key: node for node in frame.picture.nodes}
        ((_, pool),) = frame.below.rows
        held = {}
        for node in frame.picture.nodes[1:]:
            tokens = node.text.split()
            slots = node.note.partition(",")[0].split()[1:]
            assert len(tokens) == len(slots)
            for token, slot in zip(tokens, map(int, slots), strict=True):
                assert slot not in held, "a slot holds two tokens"
                held[slot] = token
            # siblings part at their first token
            twins = [n for n in nodes.values() if n.parent == node.parent]
            assert len({n.text.split()[0] for n in twins}) == len(twins)
        assert {i: c.text for i, c in enumerate(pool) if c.text} == held
    # whoever was given a slot keeps it until it goes
    for before, after in pairwise(trace):
        gone = {c for c in before.below.rows[0][1] if c.mark == "gone"}
        for old, new in zip(
            before.below.rows[0][1], after.below.rows[0][1], strict=True
        ):
            assert old.text in ("", new.text) or old in gone


def serve(requests, capacity, in_flight, record=None):
    """What the trace does, by hand; no request has to wait here."""
    cache, running = RadixCache(capacity, record), []
    for request in requests.split(";"):
        if len(running) == in_flight:
            cache.unlock(running.pop(0))
        leaf, _ = cache.insert(request.split())
        cache.lock(leaf)
        running.append(leaf)
    return cache


REQUESTS = "a b c d; a b x y; a b c z; q r; a b c d e"


@pytest.mark.parametrize("capacity", [8, 9, 30])
@pytest.mark.parametrize("in_flight", [1, 2])
def test_trace_ends_where_the_cache_ends(capacity, in_flight):
    steps = []
    cache = serve(REQUESTS, capacity, in_flight)
    told = serve(
        REQUESTS, capacity, in_flight, lambda step, node: steps.append(step)
    )
    assert str(told) == str(cache)
    assert steps.count("insert") >= 4

    trace = radix_trace(REQUESTS, capacity, in_flight)
    check_trace(trace)
    shown = [f"{n.text} [{n.note}]" for n in trace[-1].picture.nodes[1:]]
    expected = []
    for line in str(cache).splitlines():
        tokens, slots, more = re.fullmatch(
            r" *(.*) \[(.*)\] t\d+(.*)", line
        ).groups()
        many = "slots" if " " in slots else "slot"
        locks = int(more.partition("=")[2] or 0)
        note = f"{many} {slots}" + (
            f", {locks}\xa0lock{'s' * (locks > 1)}" if locks else ""
        )
        expected.append(f"{tokens} [{note}]")
    assert shown == expected


def test_default_trace_shows_every_kind_of_step():
    trace = radix_trace()
    check_trace(trace)
    captions = "\n".join(frame.caption for frame in trace)
    for said in ("is split", "is computed", "and goes", "locked", "finished"):
        assert said in captions
    assert 10 <= len(trace) <= 40
    gone = [f for f in trace if any(n.mark == "gone" for n in f.picture.nodes)]
    assert len(gone) == 1


def test_a_request_waits_for_one_in_flight():
    trace = radix_trace("a b; c d; e f", capacity=4, in_flight=3)
    check_trace(trace)
    captions = [frame.caption for frame in trace]
    at = next(i for i, c in enumerate(captions) if "3 has to wait" in c)
    assert captions[at + 1].startswith("Request 1 has finished")
    assert captions[-1] == "Request 3 runs: its path is locked."


@pytest.mark.parametrize(
    "wrong", [SplitLosesASlot, EvictionKeepsTheSlots, EvictionTakesParents]
)
def test_a_wrong_cache_shows_in_the_trace(wrong, monkeypatch):
    monkeypatch.setattr(radix_attention, "RadixCache", wrong)
    with pytest.raises((AssertionError, ValueError, IndexError)):
        check_trace(radix_trace("a b c; a b d; e f g; h i j; a b k", 6, 1))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"requests": " ; "}, "requests must be 1 to 16, got 0"),
        ({"capacity": 0}, "capacity must be 1 to 48, got 0"),
        ({"capacity": 8}, "capacity must be 9 or more"),
        ({"in_flight": 0}, "in_flight must be 1 to 8, got 0"),
    ],
)
def test_bad_input_of_the_trace_is_refused(given, says):
    with pytest.raises(ValueError, match=says):
        radix_trace(**given)
