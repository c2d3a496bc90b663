"""Who bites whom? Attention alone cannot tell, nor can a distance."""

from warpmap.models.foundations._attention_by_hand import attend
from warpmap.models.positions.position_embedding import sinusoidal

WORDS = {
    "dog": [3.0, 0.0, 0.0, 1.0],
    "bites": [1.0, 1.0, 2.0, 0.0],
    "man": [0.0, 3.0, 1.0, 0.0],
}


def bites(sentence, place=None, bias=None):
    """What the word in the middle takes home."""
    x = [WORDS[word] for word in sentence.split()]
    if place:  # one more vector, added to each word
        x = [
            [a + b for a, b in zip(word, place(i, width=4), strict=True)]
            for i, word in enumerate(x)
        ]
    return [round(number, 2) for number in attend(x[1], x, x, bias)]


def told_apart(**how):
    ours, theirs = "dog bites man", "man bites dog"
    return bites(ours, **how) != bites(theirs, **how)


print("no positions:", told_apart())
# -> no positions: False
print("distances:   ", told_apart(bias=[-0.5, 0.0, -0.5]))
# -> distances:    False
print("with a side: ", told_apart(bias=[-0.5, 0.0, -1.0]))
# -> with a side:  True
print("sinusoids:   ", told_apart(place=sinusoidal))
# -> sinusoids:    True
