"""Texts in the place of a model's: the author's own, chains and shuffles of the book, another author's, copied pages.

    python tests/impostors.py DATA_DIR OUTPUT_DIR --other FILE

writes a .jsonl file of each kind, for generate_text.py --judge; tests/test_ladder.py says which of them may pass.
"""

import argparse
import json
import random
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from utils.data.blocks import Blocks, open_blocks
from utils.data.text import read_book
from utils.data.tokenizer import load_tokenizer
from utils.model.hub import locate_model

KINDS = ("author", "word_chain_1", "word_chain_2", "token_chain_2", "character_chain_5", "shuffled_words",
         "other_author", "verbatim", "renamed")  # fmt: skip
INVENTED = ("Quillon", "Ambrek", "Tessaly", "Norrick", "Velmer", "Osgath", "Prenna", "Haldrik", "Sorvane", "Mirtley")
LETTERS = re.compile(r"[^\W\d_]+")


def make_impostors(data: Blocks, tokenizer, other: str, n_texts: int, n_tokens: int) -> dict[str, list[str]]:
    """Return up to n_texts texts of n_tokens tokens of each of KINDS."""
    ids, rng = data.ids("train").tolist(), random.Random(0)
    train = tokenizer.decode(ids)
    words = re.findall(r"\S+\s*", train)
    pieces = tokenizer.batch_decode([[i] for i in ids])
    n_chars = 2 * len(train) * n_tokens // len(ids)  # of a text before it is cut

    def cut(text: str) -> str:
        return tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"][:n_tokens])

    def walk(units: Sequence[str], order: int) -> list[str]:
        chain = Chain(units, order, rng)
        return [cut(chain.walk(n_chars)) for _ in range(n_texts)]

    windows = tokenizer.batch_decode(data.windows("train", n_tokens, n_texts))
    starts = [max(0, len(other) - n_chars) * i // n_texts for i in range(n_texts)]
    return {
        "author": tokenizer.batch_decode(data.windows("validation", n_tokens, n_texts)),
        "word_chain_1": walk(words, 1),
        "word_chain_2": walk(words, 2),
        "token_chain_2": walk(pieces, 2),
        "character_chain_5": walk(train, 5),
        "shuffled_words": [cut("".join(rng.choices(words, k=n_tokens))) for _ in range(n_texts)],
        "other_author": [cut(other[start : start + n_chars]) for start in starts],
        "verbatim": windows,
        "renamed": [cut(text) for text in rename(windows, train)],
    }


class Chain:
    """A Markov chain of a text's units: each is drawn given the `order` units before it.

    Source: Shannon 1948.
    """

    def __init__(self, units: Sequence[str], order: int, rng: random.Random) -> None:
        self.units, self.order, self.rng, self.following = units, order, rng, defaultdict(list)
        for i in range(len(units) - order):
            self.following[tuple(units[i : i + order])].append(units[i + order])

    def walk(self, n_chars: int) -> str:
        """Return a text of n_chars characters or some more."""
        start = self.rng.randrange(len(self.units) - self.order)
        text = list(self.units[start : start + self.order])
        while sum(map(len, text)) < n_chars:
            text.append(self.rng.choice(self.following.get(tuple(text[-self.order :]), self.units)))
        return "".join(text)


def rename(texts: list[str], book: str) -> list[str]:
    """Replace every name, a word that the book writes with a capital only, by an invented one."""
    counts = Counter(LETTERS.findall(book))
    names = [word for word in counts if word.istitle() and len(word) > 2 and not counts[word.lower()]]
    new = {name: INVENTED[i % 10] + "aeiou"[i // 10 % 5] for i, name in enumerate(names)}
    return [LETTERS.sub(lambda word: new.get(word[0], word[0]), text) for text in texts]


def write_impostors(data: Blocks, tokenizer, other: str, n_texts: int, n_tokens: int, folder: Path) -> list[Path]:
    """Write a .jsonl file of each kind into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for kind, texts in make_impostors(data, tokenizer, other, n_texts, n_tokens).items():
        paths.append(folder / f"{kind}.jsonl")
        paths[-1].write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return paths


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data_dir", type=Path, help="folder written by prepare_data.py")
    parser.add_argument("output_dir", type=Path)
    parser.add_argument("--other", type=Path, required=True, help="a text by another author")
    parser.add_argument("--num-texts", type=int, default=66)
    parser.add_argument("--tokens", type=int, default=75, help="tokens per text")
    args = parser.parse_args()
    blocks = open_blocks(args.data_dir)
    tokenizer = load_tokenizer(locate_model(blocks.manifest["model_name"]))
    for path in write_impostors(
        blocks, tokenizer, read_book(args.other)[0], args.num_texts, args.tokens, args.output_dir
    ):
        print(path)
