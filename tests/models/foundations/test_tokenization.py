import json
import random
import re
from collections import Counter
from itertools import pairwise
from math import fsum, inf, log
from pathlib import Path

import pytest

from warpmap.models.foundations import tokenization
from warpmap.models.foundations._bpe_trace import bpe_trace
from warpmap.models.foundations._word_cuts import longest_match, viterbi
from warpmap.models.foundations.tokenization import (
    PIECE,
    BytePairTokenizer,
    train_bpe,
)

ROOT = Path(__file__).parents[3]
SOURCE = [
    (ROOT / "src/warpmap" / name).read_text("utf-8")
    for name in (
        "trace.py",
        "chart.py",
        "models/foundations/_word_cuts.py",
        "models/foundations/_bpe_trace.py",
        "models/foundations/tokenization.py",
    )
]
# 1 to 4 bytes a character, joined and right-to-left scripts, odd digits,
# every kind of white space, a NUL, a byte order mark
STRANGE = (
    "naïve café 東京タワー 你好，世界！ हिन्दी עברית 🏳️🌈👩💻 ½ ² ٣٤٥٦ x²_y__z_"
    "\t\ttab\r\n\r\n \u00a0\u3000wide\u2028line\x00\ufeff   "
    "don't 1234567 a.b(c)[d] '' \n  "
)


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(SOURCE, 1024)


def any_text(rng, alphabet, length):
    return "".join(rng.choices(alphabet, k=length))


def test_pieces_join_to_the_text():
    rng = random.Random(0)
    numbers = [*range(0xD800), *range(0xE000, 0x30000), 0xE0001, 0x10FFFF]
    every = "".join(map(chr, numbers))
    shuffled = any_text(rng, every, 20_000)
    for text in [every, shuffled, STRANGE, *SOURCE]:
        assert "".join(PIECE.findall(text)) == text


def test_any_text_comes_back(tokenizer):
    rng = random.Random(0)
    texts = [STRANGE, "", " ", "\n", *SOURCE]
    texts += [any_text(rng, STRANGE, rng.randrange(40)) for _ in range(300)]
    for text in texts:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.end_of_text not in ids
        assert all(0 <= i < tokenizer.end_of_text for i in ids)


def test_any_tokens_decode(tokenizer):
    """As a model that was not trained might write them."""
    tokenizer.decode(random.Random(0).choices(range(1024), k=5000))
    assert tokenizer.decode([0xE4, 0xBD]) == "\ufffd"  # 2 of the 3 bytes of 你
    assert tokenizer.decode([0xE4, 0xBD, 65]) == "\ufffdA"
    assert tokenizer.decode([tokenizer.end_of_text]) == ""


def test_end_of_text_is_the_last_token_and_cannot_be_written(tokenizer):
    assert tokenizer.vocab_size == 1024
    assert len(tokenizer.tokens) == 1024
    assert tokenizer.end_of_text == 1023
    assert len(set(tokenizer.tokens)) == 1024  # no token is made twice
    assert 1023 not in tokenizer.encode("<|endoftext|>")


def test_indentation_costs_one_token_a_line(tokenizer):
    shown = [tokenizer.tokens[i] for i in tokenizer.encode("x\n        return")]
    assert shown == [b"x", b"\n       ", b" return"]


def merged_by_regex(word, pair, made):
    """Another way to merge: on a string with one character a token."""
    text = "".join(map(chr, word))
    left, right = map(re.escape, map(chr, pair))
    return [ord(c) for c in re.sub(left + right, chr(made), text)]


def brute_force(texts, vocab_size, by=lambda count, pair: (-count, pair)):
    """Merges, and the pieces at the end; every pair is counted each time."""
    pieces = Counter(p for text in texts for p in PIECE.findall(text))
    words = {p: list(p.encode()) for p in pieces}
    merges = []
    while len(merges) + 257 < vocab_size:
        pairs = Counter()
        for piece, word in words.items():
            for pair in pairwise(word):
                pairs[pair] += pieces[piece]
        found = [(by(n, pair), pair) for pair, n in pairs.items() if n > 1]
        if not found:
            break
        _, pair = min(found)
        for piece, word in words.items():
            words[piece] = merged_by_regex(word, pair, 256 + len(merges))
        merges.append(pair)
    return merges, words


# few letters: overlaps and ties in every text
ALPHABETS = ["ab ", "aaab", "abcdef  \n", "né你 "]


@pytest.mark.parametrize("alphabet", ALPHABETS)
def test_training_agrees_with_counting_everything_anew(alphabet):
    rng = random.Random(0)
    for length in (0, 1, 7, 60, 400):
        texts = [any_text(rng, alphabet, length) for _ in range(3)]
        merges, words = brute_force(texts, 290)
        tokenizer = train_bpe(texts, 290)
        assert list(tokenizer.merges) == merges
        # encoding replays training
        for piece, word in words.items():
            assert tokenizer.encode(piece) == word


def test_the_order_of_texts_makes_no_difference(tokenizer):
    assert train_bpe(SOURCE[::-1], 1024).merges == tokenizer.merges


def test_training_stops_when_nothing_repeats():
    assert train_bpe(["abcd"], 1000).vocab_size == 257
    assert train_bpe(["abab"], 1000).tokens[256:] == [b"ab", b""]
    assert train_bpe([], 1000).vocab_size == 257
    assert train_bpe(["aaaa"], 257).merges == ()


def as_letters(piece):
    """Each byte a letter, in the order of the bytes."""
    return "".join(chr(0x100 + byte) for byte in piece.encode())


@pytest.fixture(scope="module")
def peer():
    """Trained on the same pieces, with the same order among equals."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    peer = Tokenizer(models.BPE())
    peer.pre_tokenizer = pre_tokenizers.Split("|", behavior="removed")
    trainer = trainers.BpeTrainer(
        vocab_size=1023,
        min_frequency=2,
        show_progress=False,
        initial_alphabet=[chr(0x100 + byte) for byte in range(256)],
    )
    peer.train_from_iterator(map(cut, SOURCE), trainer)
    return peer


def cut(text):
    return "|".join(map(as_letters, PIECE.findall(text)))


def test_training_agrees_with_tokenizers(tokenizer, peer):
    learned = json.loads(peer.to_str())["model"]["merges"]
    tokens = [
        "".join(chr(0x100 + byte) for byte in token)
        for token in tokenizer.tokens
    ]
    merges = [[tokens[a], tokens[b]] for a, b in tokenizer.merges]
    assert merges == learned


def test_encoding_agrees_with_tokenizers(tokenizer, peer):
    rng = random.Random(0)
    texts = [STRANGE, *SOURCE]
    texts += [any_text(rng, SOURCE[-1], 200) for _ in range(50)]
    for text in texts:
        assert tokenizer.encode(text) == peer.encode(cut(text)).ids


def merge_right_to_left(ids, pair, made):
    there = MERGE(ids[::-1], pair[::-1], made)
    return there[::-1]


def merge_first_only(ids, pair, made):
    for i, here in enumerate(pairwise(ids)):
        if here == pair:
            return [*ids[:i], made, *ids[i + 2 :]]
    return ids


MERGE = tokenization._merge


@pytest.mark.parametrize("wrong", [merge_right_to_left, merge_first_only])
def test_a_wrong_merge_is_caught(wrong, monkeypatch):
    texts = ["aaa aaaaa aabaaab" * 2]
    right, _ = brute_force(texts, 270)
    assert list(train_bpe(texts, 270).merges) == right
    monkeypatch.setattr(tokenization, "_merge", wrong)
    assert list(train_bpe(texts, 270).merges) != right


@pytest.mark.parametrize(
    "by",
    [
        lambda count, pair: (count, pair),  # the rarest pair first
        lambda count, pair: (-count, pair[::-1]),  # other ties
    ],
)
def test_another_order_is_caught(by):
    texts = [any_text(random.Random(0), "abc ", 200)]
    merges, _ = brute_force(texts, 290, by)
    assert list(train_bpe(texts, 290).merges) != merges


class LongestFirst(BytePairTokenizer):
    """Takes the longest token that fits, and forgets the merges."""

    def _encode_piece(self, piece):
        data, ids = piece.encode(), []
        while data:
            fits = (i for i, t in enumerate(self.tokens) if data.startswith(t))
            ids.append(max(fits, key=lambda i: len(self.tokens[i])))
            data = data[len(self.tokens[ids[-1]]) :]
        return ids


class NewestFirst(BytePairTokenizer):
    def _encode_piece(self, piece):
        ids = list(piece.encode())
        while made := [self._made.get(pair, 0) for pair in pairwise(ids)]:
            if not max(made):
                break
            ids = MERGE(ids, self.merges[max(made) - 256], max(made))
        return ids


@pytest.mark.parametrize("wrong", [LongestFirst, NewestFirst])
def test_another_way_to_encode_is_caught(wrong, tokenizer, peer):
    text = SOURCE[-1]
    ids = wrong(tokenizer.merges).encode(text)
    assert tokenizer.decode(ids) == text  # it is a spelling, but another one
    assert ids != peer.encode(cut(text)).ids


def test_a_file_gives_the_same_tokenizer(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "t.json")
    loaded = BytePairTokenizer.load(tmp_path / "t.json")
    assert loaded.merges == tokenizer.merges
    assert loaded.encode(STRANGE) == tokenizer.encode(STRANGE)


GOOD = {
    "format": tokenization.FORMAT,
    "pattern": PIECE.pattern,
    "merges": [[97, 98]],
}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"format": "BPE"}, "expected a file of format"),
        ({"pattern": "."}, "pattern is '.', but this version cuts"),
        ({"merges": None}, "merges must be a list of pairs"),
        ({"merges": [[97]]}, "merges must be a list of pairs"),
        ({"merges": [[97, 98.0]]}, "merges must be a list of pairs"),
        ({"merges": [[97, True]]}, "merges must be a list of pairs"),
        ({"merges": [[97, 256]]}, "256 is made of .97, 256."),
        ({"merges": [[-1, 97]]}, "256 is made of .-1, 97."),
        ({"merges": [[97, 98], [97, 98]]}, "b'ab' is made twice"),
    ],
)
def test_a_file_that_is_not_a_tokenizer_is_refused(change, says, tmp_path):
    path = tmp_path / "t.json"
    path.write_text(json.dumps(GOOD))
    assert BytePairTokenizer.load(path).encode("ab") == [256]
    path.write_text(json.dumps({**GOOD, **change}))
    with pytest.raises(ValueError, match=says):
        BytePairTokenizer.load(path)


@pytest.mark.parametrize("text", ["", "[]", '{"format": 1', "null"])
def test_a_broken_file_is_refused(text, tmp_path):
    (tmp_path / "t.json").write_text(text)
    with pytest.raises(ValueError, match=r"expected|Expecting"):
        BytePairTokenizer.load(tmp_path / "t.json")


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="vocab_size must be at least 257"):
        train_bpe(["a"], 256)
    with pytest.raises(ValueError, match="texts must be several, got one"):
        train_bpe("one text", 300)
    for wrong in (257, -1):
        with pytest.raises(ValueError, match=f"0 to 256, got {wrong}"):
            BytePairTokenizer([]).decode([1, wrong])
    with pytest.raises(ValueError, match="surrogates not allowed"):
        BytePairTokenizer([]).encode("\ud800")


def every_cut(text):
    if not text:
        yield []
    for end in range(1, len(text) + 1):
        for rest in every_cut(text[end:]):
            yield [text[:end], *rest]


def any_vocabulary(rng):
    drawn = (any_text(rng, "abc", rng.randrange(1, 5)) for _ in range(14))
    tokens = dict.fromkeys(drawn)  # a set would have another order each run
    return {token: log(rng.random()) for token in tokens}


def score(tokens, log_probs):
    return fsum(log_probs.get(token, -inf) for token in tokens)


def as_good(cut, best, log_probs):
    """Both spell the text, and differ by what 20 rounded sums may.

    One cut is not enough: "a|aa" and "aa|a" are equally likely.
    """
    slack = 20 * 2.0**-52 * abs(score(best, log_probs))
    return "".join(cut) == "".join(best) and (
        abs(score(cut, log_probs) - score(best, log_probs)) <= slack
    )


def test_viterbi_agrees_with_every_cut():
    rng = random.Random(0)
    refused = greedy_is_worse = 0
    for _ in range(200):
        log_probs = any_vocabulary(rng)
        text = any_text(rng, "abc", rng.randrange(9))
        best = max(every_cut(text), key=lambda cut: score(cut, log_probs))
        if score(best, log_probs) == -inf:
            refused += 1
            with pytest.raises(ValueError, match="spelt by tokens, got"):
                viterbi(text, log_probs)
            continue
        assert as_good(viterbi(text, log_probs), best, log_probs)
        marked = set(log_probs) | {f"##{token}" for token in log_probs}
        longest = [t.removeprefix("##") for t in longest_match(text, marked)]
        assert longest == ["[UNK]"] or "".join(longest) == text
        # what a planted fault, the longest token first, would give
        greedy_is_worse += not as_good(longest, best, log_probs)
    assert refused > 20
    assert greedy_is_worse > 20


def test_viterbi_agrees_with_tokenizers():
    from tokenizers import models

    rng = random.Random(1)
    for _ in range(100):
        log_probs = {c: log(rng.random()) for c in "abc"} | any_vocabulary(rng)
        peer = models.Unigram([("?", -99.0), *log_probs.items()], unk_id=0)
        text = any_text(rng, "abc", rng.randrange(1, 20))
        shown = [token.value for token in peer.tokenize(text)]
        assert as_good(viterbi(text, log_probs), shown, log_probs)


def test_longest_match_agrees_with_tokenizers():
    from tokenizers import models

    rng = random.Random(2)
    seen = Counter()
    for _ in range(200):
        inner = [f"##{token}" for token in any_vocabulary(rng)]
        tokens = [*any_vocabulary(rng), *inner]
        ids = {token: i for i, token in enumerate(["[UNK]", *tokens])}
        peer = models.WordPiece(ids, unk_token="[UNK]")
        word = any_text(rng, "abc", rng.randrange(1, 12))
        got = longest_match(word, set(tokens))
        assert got == [token.value for token in peer.tokenize(word)]
        seen[got == ["[UNK]"]] += 1
    assert min(seen.values()) > 20
    assert longest_match("", {"a"}) == []


@pytest.mark.parametrize("text", ["aaaa aaaa bab", "né né 你好 你们", None])
def test_trace_ends_where_training_ends(text):
    trace = bpe_trace(*[text] * bool(text), merges=7)
    text = text or bpe_trace.__defaults__[0]
    tokenizer = train_bpe([text], 257 + 7)
    assert len(trace) == 1 + len(tokenizer.merges)
    assert len(trace) >= 3
    pieces = Counter(PIECE.findall(text))
    for (piece, count), (name, cells) in zip(
        pieces.items(), trace[-1].picture.rows, strict=True
    ):
        tokens = [tokenizer.tokens[i] for i in tokenizer.encode(piece)]
        shown = []
        for token in tokens:
            try:
                shown.append(token.decode().replace(" ", "·"))
            except UnicodeDecodeError:
                shown.append(token.hex(" ").upper())
        assert [cell.text for cell in cells] == shown
        assert name == f"{piece.replace(' ', '·')} × {count}"
    left = len(tokenizer.encode(text))
    assert trace[-1].caption.endswith(f"{left} tokens are left.")
    ((_, learned),) = trace[-1].below.rows
    assert len([c for c in learned if c.text]) == len(tokenizer.merges)


def test_default_trace_shows_what_the_page_says():
    rows = dict(bpe_trace()[-1].picture.rows)
    assert [cell.text for cell in rows["she × 1"]] == ["s", "he"]
    assert [cell.text for cell in rows["·she × 1"]] == ["·she"]
    assert 10 <= len(bpe_trace()) <= 40


def test_listening_changes_nothing():
    heard = []
    told = train_bpe(SOURCE, 300, lambda *step: heard.append(step[:2]))
    assert told.merges == train_bpe(SOURCE, 300).merges
    assert tuple(pair for pair, _ in heard) == told.merges
    counts = [count for _, count in heard]
    assert counts == sorted(counts, reverse=True)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"text": ""}, "text must have 1 to 16 distinct pieces, got 0"),
        ({"text": "a.b-" * 2 + "q w e r t y u i o p z x c v"}, "got 17"),
        ({"merges": 0}, "merges must be 1 to 38, got 0"),
        ({"merges": 39}, "merges must be 1 to 38, got 39"),
    ],
)
def test_bad_input_of_the_trace_is_refused(given, says):
    with pytest.raises(ValueError, match=says):
        bpe_trace(**given)
