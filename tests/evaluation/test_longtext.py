"""One long text into a file: whole sentences, at every moment and whatever ends the writing."""

import errno

import pytest

from utils.data.tokenizer import load_tokenizer
from utils.errors import EXIT_MACHINE, UserError
from utils.evaluation.longtext import SentenceFile, check_new_file, find_sentence_end, write_text_file

TEXT = 'Ada went "to the mill." It cost 3.50 crowns! Was it late? (It was.) Bram… slept. Now the long rest of it is'
SENTENCES = ['Ada went "to the mill."', " It cost 3.50 crowns!", " Was it late?", " (It was.)", " Bram…", " slept."]


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return load_tokenizer(tiny_model)


@pytest.fixture
def write(tokenizer, tmp_path):
    """Write a text token by token; returns the line, the file's text, and its text after each token."""

    def call(text=TEXT, n_tokens=1000, n_words=None, stops=(), stop_at=None, final=None):
        path, seen = tmp_path / "chapter.txt", []
        path.unlink(missing_ok=True)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        stopping = []

        def generate(watch):
            for n in range(1, len(ids) + 1):
                stopping.extend([1] * (n == stop_at))
                ended = watch([ids[:n]])
                seen.append(path.read_text(encoding="utf-8"))
                if ended or n == n_tokens:
                    return [ids[:n]]
            return [ids if final is None else tokenizer(final, add_special_tokens=False)["input_ids"]]

        line = write_text_file(path, tokenizer, generate, n_tokens, n_words, stops, stopping)
        return line, path.read_text(encoding="utf-8") if path.exists() else None, seen

    return call


def test_the_file_grows_by_whole_sentences(write, tokenizer):
    n_tokens = len(tokenizer(TEXT, add_special_tokens=False)["input_ids"])
    line, text, seen = write(n_tokens=n_tokens)
    assert text == "".join(SENTENCES)
    assert set(seen) == {"".join(SENTENCES[:n]) for n in range(len(SENTENCES) + 1)}
    assert line.startswith("/")
    assert "chapter.txt: 15 words, " in line
    assert "the unfinished sentence after them, 26 characters, was left out" in line


def test_a_text_that_ends_by_itself_is_whole(write):
    line, text, _ = write()
    assert text == TEXT
    assert "left out" not in line


def test_a_signal_keeps_the_sentences_written(write, tokenizer):
    for stop_at in range(2, len(tokenizer(TEXT, add_special_tokens=False)["input_ids"])):
        line, text, _ = write(stop_at=stop_at)
        assert line.startswith("stopped; ")
        first = tokenizer.decode(tokenizer(TEXT, add_special_tokens=False)["input_ids"][:stop_at])
        ended = find_sentence_end(first, is_whole=True)
        assert text == (first[:ended] or first), "no sentence has ended: the text is kept whole"


def test_words_are_counted_to_the_end_of_their_sentence(write):
    for n_words, n_sentences in ((1, 1), (5, 1), (6, 2), (8, 2), (9, 3), (11, 3), (12, 4), (14, 5)):
        text = write(n_words=n_words)[1]
        assert text == "".join(SENTENCES[:n_sentences]), n_words


def test_what_may_be_the_start_of_a_string_waits(write):
    """The text ends before "slept. Now": its first sentence must not be in the file before."""
    final = TEXT[: TEXT.index("slept. Now")]
    _, text, seen = write(TEXT[: len(final) + 9], stops=["slept. Now"], final=final)
    assert text == final
    assert all(final.startswith(part) for part in seen)
    assert write(stops=["never"])[1] == TEXT


@pytest.mark.parametrize("text", ["日本語の本。「はい。」と言った！つぎ", "Größe… «Où ?» dit-elle. 👩‍🚀 à"])
def test_texts_of_any_alphabet_are_exact(write, text):
    assert write(text)[1] == text
    assert set(write(text, n_words=2)[2]) > {""}


def test_sentence_ends():
    assert find_sentence_end("He left. She", False) == 8
    assert find_sentence_end("He left.", False) == 0, 'it may go on: "3.5"'
    assert find_sentence_end("He left.", True) == 8
    assert find_sentence_end('"Go." "No', False) == 5
    assert find_sentence_end("「行く。」と", False) == 5
    assert find_sentence_end("v1.2 is 3.5 high", True) == 0


def test_nothing_written_leaves_no_file(write):
    line, text, _ = write(text="")
    assert text is None
    assert "no text was written" in line


def test_a_full_disk_keeps_the_sentences_before(tokenizer, tmp_path):
    """The disk takes half of the third sentence: the file ends with the second."""

    class Disk:
        def __init__(self, file):
            self.file, self.free = file, len("".join(SENTENCES[:3])) - 3

        def write(self, data):
            if not self.free:
                raise OSError(errno.ENOSPC, "No space left on device")
            n = self.file.write(data[: self.free])
            self.free -= n
            return n

    file = SentenceFile(tmp_path / "chapter.txt", tokenizer)
    file.file = Disk(file.file)
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    says = r"chapter.txt: no space left on device; the 8 words written before are kept"
    with pytest.raises(UserError, match=says) as full:
        [file.add(ids[:n]) for n in range(1, len(ids))]
    assert full.value.code == EXIT_MACHINE
    assert (tmp_path / "chapter.txt").read_text() == "".join(SENTENCES[:2])


def test_only_a_new_file_is_written(tmp_path):
    (tmp_path / "there").write_text("another's")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name, says in (("there", "exists already"), ("link", "exists already"), ("", "is a directory"),
                       ("no/chapter.txt", "no: no such directory")):  # fmt: skip
        with pytest.raises(UserError, match=says):
            check_new_file(tmp_path / name)
    check_new_file(tmp_path / "chapter.txt")
    with pytest.raises(FileExistsError):  # made by another since the check
        SentenceFile(tmp_path / "there", None)
    assert (tmp_path / "there").read_text() == "another's"
