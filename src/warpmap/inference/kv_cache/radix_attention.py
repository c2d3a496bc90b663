"""A radix tree of cached tokens: requests share the prefix they have in common.

A finished request leaves its keys and values in the pool. The tree says which
slot holds which token, after which other tokens; a new request walks down it
and computes only what comes after the walk.

    match    one step a token
    evict    the least recently used leaf that no request in flight needs
    grain    one token a slot, so that a match may end at any token

Reference: Zheng et al., 2024, https://arxiv.org/abs/2312.07104
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from warpmap.trace import Cell, Frame, Grid, Mark, Trace, Tree, TreeNode

Token = int | str
"""A token's number, or the token itself where people read along."""


@dataclass(eq=False)
class Node:
    """A run of tokens that every request below it has in common."""

    tokens: tuple[Token, ...] = ()
    slots: list[int] = field(default_factory=list)  # one for each token
    parent: "Node | None" = field(default=None, repr=False)
    children: dict[Token, "Node"] = field(default_factory=dict, repr=False)
    locks: int = 0  # requests in flight whose path passes here
    used: int = 0  # the clock when a request last passed here


class RadixCache:
    """Which tokens are cached, where, and which of them may go.

    Args:
        capacity: Slots in the pool; a slot holds the keys and values of one
            token, in all layers.
        record: Hears of every "match", "split", "insert" and "evict", and at
            which node; an evicted node is still in the tree then.

    Raises:
        ValueError: If ``capacity`` is below 1.

    Examples:
        >>> cache = RadixCache(capacity=10)
        >>> for request in ("say hi to Ada", "say hi to Bob"):
        ...     leaf, reused = cache.insert(request.split())
        >>> reused
        3
        >>> print(cache)
        say hi to [0 1 2] t2
          Ada [3] t1
          Bob [4] t2
    """

    def __init__(
        self,
        capacity: int,
        record: Callable[[str, Node], object] | None = None,
    ) -> None:
        """Start with an empty tree and every slot free."""
        if capacity < 1:
            raise ValueError(f"expected 1 slot or more, got {capacity}")
        self.capacity = capacity
        self.free = deque(range(capacity))
        self.root = Node()
        self.clock = 0  # counts requests: no wall time, so runs repeat
        self._record = record or (lambda step, node: None)

    def match(self, tokens: Sequence[Token]) -> Node:
        """The node where the longest cached prefix of ``tokens`` ends.

        A prefix that ends inside a node splits it. The nodes on the way count
        as used now.

        Examples:
            >>> cache = RadixCache(capacity=4)
            >>> leaf, _ = cache.insert([7, 8, 9])
            >>> cache.match([7, 8, 5]).tokens
            (7, 8)
            >>> leaf.tokens
            (9,)
        """
        self.clock += 1
        node, rest = self.root, tuple(tokens)
        while rest and rest[0] in node.children:
            node = node.children[rest[0]]
            same = _common(node.tokens, rest)
            if same < len(node.tokens):
                node = self._split(node, same)
            node.used = self.clock
            rest = rest[same:]
        self._record("match", node)
        return node

    def _split(self, lower: Node, at: int) -> Node:
        # The old object becomes the lower half: requests in flight hold the
        # end of their path, and it must stay the end.
        assert lower.parent is not None
        upper = Node(
            lower.tokens[:at],
            lower.slots[:at],
            lower.parent,
            {lower.tokens[at]: lower},
            lower.locks,
            lower.used,
        )
        lower.parent.children[lower.tokens[0]] = upper
        lower.tokens, lower.slots = lower.tokens[at:], lower.slots[at:]
        lower.parent = upper
        self._record("split", upper)
        return upper

    def insert(self, tokens: Sequence[Token]) -> tuple[Node, int]:
        """Give every token of a request a slot, evicting where there is none.

        Returns:
            The node where ``tokens`` end, and how many of them were cached.

        Raises:
            ValueError: If the request is longer than the pool, or requests in
                flight lock too much of it. What is cached stays cached.

        Examples:
            >>> cache = RadixCache(capacity=4)
            >>> for request in ([7, 8], [7, 8, 9], [5, 6]):
            ...     leaf, reused = cache.insert(request)
            >>> print(cache)  # slot 2 of the 9 is reused, its prefix stays
            7 8 [0 1] t2
            5 6 [3 2] t3
        """
        tokens = tuple(tokens)
        if len(tokens) > self.capacity:
            raise ValueError(
                f"{len(tokens)} tokens do not fit {self.capacity} slots"
            )
        node = self.match(tokens)
        reused = len(self.slots(node))
        rest = tokens[reused:]
        if not rest:
            return node, reused

        # without the lock, eviction could take the prefix just matched
        self.lock(node)
        try:
            self.evict(len(rest) - len(self.free))
        finally:
            self.unlock(node)
        slots = [self.free.popleft() for _ in rest]
        leaf = Node(rest, slots, node, used=self.clock)
        node.children[rest[0]] = leaf
        self._record("insert", leaf)
        return leaf, reused

    def evict(self, count: int) -> int:
        """Free ``count`` slots or more, the least recently used leaf first.

        A parent outlives its children: without it they could not be found.

        Returns:
            Slots freed: whole leaves go, so it can be more than asked.

        Raises:
            ValueError: If fewer than ``count`` are unlocked; none is freed.

        Examples:
            >>> cache = RadixCache(capacity=4)
            >>> leaf, _ = cache.insert([7, 8, 9])
            >>> cache.evict(1), len(cache.free)
            (3, 4)
        """
        unlocked = sum(len(n.slots) for n in self._nodes() if not n.locks)
        if count > unlocked:
            raise ValueError(
                f"{count} more slots needed, only {unlocked} can be evicted:"
                " requests in flight lock the rest"
            )
        freed = 0
        while freed < count:
            leaf = min(self._unlocked_leaves(), key=lambda node: node.used)
            assert leaf.parent is not None
            self._record("evict", leaf)
            del leaf.parent.children[leaf.tokens[0]]
            leaf.parent = None
            self.free.extend(leaf.slots)
            freed += len(leaf.slots)
        return freed

    def _unlocked_leaves(self) -> Iterator[Node]:
        return (n for n in self._nodes() if not n.children and not n.locks)

    def lock(self, node: Node) -> None:
        """Keep ``node`` and all above it: a request in flight reads them.

        Raises:
            ValueError: If ``node`` is not in the tree, for it was evicted.

        Examples:
            >>> cache = RadixCache(capacity=3)
            >>> leaf, _ = cache.insert([7, 8, 9])
            >>> cache.lock(leaf)
            >>> cache.insert([5])
            Traceback (most recent call last):
            ValueError: 1 more slots needed, only 0 can be evicted: ...
        """
        for above in self._path(node):
            above.locks += 1

    def unlock(self, node: Node) -> None:
        """Undo one ``lock`` of the same node.

        Raises:
            ValueError: If no lock of ``node`` is left, or it was evicted.

        Examples:
            >>> cache = RadixCache(capacity=3)
            >>> leaf, _ = cache.insert([7, 8, 9])
            >>> cache.unlock(leaf)
            Traceback (most recent call last):
            ValueError: unlocked more often than locked: (7, 8, 9)
        """
        path = self._path(node)
        # the other locks counted here were taken further down
        if node.locks <= sum(below.locks for below in node.children.values()):
            raise ValueError(f"unlocked more often than locked: {node.tokens}")
        for above in path:
            above.locks -= 1

    def slots(self, node: Node) -> list[int]:
        """Where the tokens from the root to ``node`` lie, in their order.

        Raises:
            ValueError: If ``node`` is not in the tree, for it was evicted.

        Examples:
            >>> cache = RadixCache(capacity=8)
            >>> for request in ([7, 8], [1, 2], [7, 8, 9]):
            ...     leaf, _ = cache.insert(request)
            >>> cache.slots(leaf)
            [0, 1, 4]
        """
        path = reversed(self._path(node))
        return [slot for above in path for slot in above.slots]

    def _path(self, node: Node) -> list[Node]:
        path = [node]
        while (parent := path[-1].parent) is not None:
            path.append(parent)
        if path[-1] is not self.root:
            raise ValueError(f"node {node.tokens} is not in the tree: evicted?")
        return path

    def _nodes(self) -> Iterator[Node]:
        """All nodes but the root, parents first."""
        stack = list(self.root.children.values())[::-1]
        while stack:
            node = stack.pop()
            yield node
            stack.extend(list(node.children.values())[::-1])

    def __str__(self) -> str:
        """One line a node: its tokens, its slots, when last used, its locks."""
        lines = []
        for node in self._nodes():
            indent = "  " * (len(self._path(node)) - 2)
            tokens = " ".join(map(str, node.tokens))
            slots = " ".join(map(str, node.slots))
            locks = f" locks={node.locks}" if node.locks else ""
            lines.append(f"{indent}{tokens} [{slots}] t{node.used}{locks}")
        return "\n".join(lines)


def count_reused(requests: Iterable[Sequence[Token]], capacity: int) -> int:
    """Tokens found in the cache when requests are served in this order.

    Raises:
        ValueError: If a request is longer than the pool.

    Examples:
        >>> count_reused(["ab", "xy", "ac", "xz"], capacity=2)
        0
        >>> count_reused(["ab", "ac", "xy", "xz"], capacity=2)
        2
    """
    cache = RadixCache(capacity)
    return sum(cache.insert(tokens)[1] for tokens in requests)


def radix_trace(
    requests: str = "be brief . who is Ada ?; be brief . who is Bob ?; "
    "be brief . add 2 2; be brief . who is Bob ? but why",
    capacity: int = 12,
    in_flight: int = 2,
) -> Trace:
    """Serve requests with a :class:`RadixCache` and keep every step of it.

    A request that finds no room waits until the oldest in flight has finished.

    Args:
        requests: Words are tokens; a semicolon ends a request.
        capacity: Slots in the pool, 1 to 48.
        in_flight: Requests that run at once and lock their path, 1 to 8.

    Returns:
        The tree after each step, and the pool under it.

    Raises:
        ValueError: If an argument is out of its range, or a request longer
            than the pool.

    Examples:
        >>> for frame in radix_trace("a b; a c", capacity=3, in_flight=1)[-4:]:
        ...     print(frame.caption)
        Request 2 parts after "a": the node is split. No token moves.
        Request 2, "a c": 1 of 2 tokens are cached.
        "c" is computed, into slot 2.
        Request 2 runs: its path is locked.
    """
    texts = [text.split() for text in requests.split(";") if text.strip()]
    longest = max(map(len, texts), default=0)
    if not 1 <= len(texts) <= 16:
        raise ValueError(f"requests must be 1 to 16, got {len(texts)}")
    if not 1 <= capacity <= 48:
        raise ValueError(f"capacity must be 1 to 48, got {capacity}")
    if longest > capacity:
        raise ValueError(
            f"capacity must be {longest} or more, the tokens of the longest "
            f"request, got {capacity}"
        )
    if not 1 <= in_flight <= 8:
        raise ValueError(f"in_flight must be 1 to 8, got {in_flight}")

    trace: Trace = []
    keys: dict[Node, str] = {}  # a node keeps its key for good
    running: deque[tuple[int, Node]] = deque()
    number, words = 0, texts[0]

    def add(caption: str, *lit: Node, mark: Mark = "on") -> None:
        trace.append(_frame(cache, caption, keys, dict.fromkeys(lit, mark)))

    def record(step: str, node: Node) -> None:
        said = f'"{_words(node)}"'
        if step == "match":
            add(
                f'Request {number}, "{" ".join(words)}": '
                f"{len(cache.slots(node))} of {len(words)} tokens are cached.",
                *cache._path(node),
            )
        elif step == "split":
            add(
                f'Request {number} parts after "{node.tokens[-1]}": the node '
                "is split. No token moves.",
                *(node, *node.children.values()),
            )
        elif step == "insert":
            add(f"{said} is computed, into {_slots(node)}.", node, mark="new")
        else:
            add(
                f"Too few slots are free. {said} was used least recently of "
                "all leaves without a lock, and goes.",
                node,
                mark="gone",
            )

    def finish() -> None:
        done, leaf = running.popleft()
        cache.unlock(leaf)
        add(
            f"Request {done} has finished. Its tokens stay cached, unlocked.",
            *cache._path(leaf),
        )

    cache = RadixCache(capacity, record)
    add(f"The pool has {capacity} free slots, and the tree is empty.")
    for number, words in enumerate(texts, start=1):
        if len(running) == in_flight:
            finish()
        while True:
            try:
                leaf, _ = cache.insert(words)
                break
            except ValueError as error:
                add(f"Request {number} has to wait: {error}.")
                finish()
        cache.lock(leaf)
        running.append((number, leaf))
        add(
            f"Request {number} runs: its path is locked.",
            *cache._path(leaf),
        )
    return trace


def _frame(
    cache: RadixCache, said: str, keys: dict[Node, str], lit: dict[Node, Mark]
) -> Frame:
    """How things stand: the tree, and the pool under it."""
    nodes = [TreeNode("root", "root")]
    pool = [Cell() for _ in range(cache.capacity)]
    for node in cache._nodes():
        key = keys.setdefault(node, f"node {len(keys)}")
        mark = lit.get(node, "")
        locks = f", {node.locks}\xa0lock{'s' * (node.locks > 1)}"
        note = _slots(node) + locks * (node.locks > 0)
        above = keys.get(node.parent or node, "root")
        nodes.append(TreeNode(key, _words(node), above, mark, note))
        for token, slot in zip(node.tokens, node.slots, strict=True):
            pool[slot] = Cell(str(token), mark)
    columns = [str(slot) for slot in range(cache.capacity)]
    return Frame(said, Tree(nodes), Grid([("pool", pool)], columns))


def _slots(node: Node) -> str:
    many = "slots" if len(node.slots) > 1 else "slot"
    return f"{many} {' '.join(map(str, node.slots))}"


def _words(node: Node) -> str:
    return " ".join(map(str, node.tokens))


def _common(a: Sequence[Token], b: Sequence[Token]) -> int:
    same = 0
    while same < min(len(a), len(b)) and a[same] == b[same]:
        same += 1
    return same
