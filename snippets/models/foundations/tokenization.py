"""A space at the end of a prompt makes the word that follows another one."""

from warpmap.models.foundations.tokenization import train_bpe

text = "the cat sat on the mat, the dog sat on the mat. "
tokenizer = train_bpe([text * 9], vocab_size=280)


def show(ids):
    print(*(tokenizer.tokens[i].decode() for i in ids), sep="|")


good = tokenizer.encode("the dog sat on the") + tokenizer.encode(" mat")
show(good)
# -> the| dog| sat| on| the| mat
bad = tokenizer.encode("the dog sat on the ") + tokenizer.encode("mat")
show(bad)
# -> the| dog| sat| on| the| |m|at

print("same text:", tokenizer.decode(good) == tokenizer.decode(bad))
# -> same text: True
print("same tokens:", good == bad)
# -> same tokens: False
