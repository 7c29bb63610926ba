"""The matcher allows exactly the tokens that llama.cpp's own sampler allows, and is done soon where that one is not."""

from collections.abc import Iterator
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine_driver import smollm2_path
from llamaherd.pool.child import llama_backend, llama_model
from llamaherd.pool.child.constraint import Alphabet, ConstraintError, decode
from llamaherd.pool.child.matcher import Automaton, Matcher
from llamaherd.pool.child.vocab import Vocab
from llamaherd.pool.gbnf import GrammarError, parse
from reference_grammar import ReferenceGrammar
from tiny_gguf import tiny_model


class Words:
    """A vocabulary, without the weights that belong to it."""

    def __init__(self, path: str) -> None:
        llama_backend.init_backend()
        model = llama_model.load(path.encode(), n_gpu_layers=0, use_mmap=True, progress=lambda _: True)
        assert model is not None
        self._model = model
        self.handle = llama_model.vocab(model)
        self.vocab = Vocab(model)
        self.alphabet = Alphabet(self.vocab)

    def matcher(self, source: str) -> Matcher:
        return Matcher(Automaton(parse(source), self.alphabet, self.token))

    def token(self, text: str) -> int:
        (token,) = self.vocab.tokenize(text, add_special=False, parse_special=True)
        return token

    def tokens(self, text: str) -> list[int]:
        return self.vocab.tokenize(text, add_special=False)

    def close(self) -> None:
        llama_model.free(self._model)


@pytest.fixture(scope="module")
def tiny() -> Iterator[Words]:
    words = Words(str(tiny_model("random")))
    yield words
    words.close()


@pytest.fixture(scope="module")
def smollm2() -> Iterator[Words]:
    words = Words(str(smollm2_path()))
    yield words
    words.close()


def says(words: Words, source: str, text: str) -> str:
    """Take a text token by token; return how it fared: ``complete``, ``may end``, ``goes on`` or ``refused``."""
    matcher = words.matcher(source)
    for token in words.tokens(text):
        if not matcher.allows(token):
            return "refused"
        matcher.accept(token)
    if matcher.complete:
        return "complete"
    return "may end" if matcher.allows(words.vocab.eos) else "goes on"


def mask(words: Words, matcher: Matcher) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    allowed = np.zeros(words.vocab.size, np.bool_)
    allowed[matcher.allowed(range(words.vocab.size), words.vocab.size)] = True
    return allowed


JSON = r"""
root ::= object
value ::= object | array | string | number | ("true" | "false" | "null") ws
object ::= "{" ws (string ":" ws value ("," ws string ":" ws value)*)? "}" ws
array ::= "[" ws (value ("," ws value)*)? "]" ws
string ::= "\"" ([^"\\\x7F\x00-\x1F] | "\\" (["\\bfnrt] | "u" [0-9a-fA-F]{4}))* "\"" ws
number ::= ("-"? ([0-9] | [1-9] [0-9]{0,15})) ("." [0-9]+)? ([eE] [-+]? [0-9] [1-9]{0,15})? ws
ws ::= | " " | "\n" [ \t]{0,20}
"""


@pytest.mark.parametrize(
    ("source", "text", "how"),
    [
        ('root ::= "yes" | "no"', "yes", "complete"),
        ('root ::= "yes" | "no"', "ye", "goes on"),
        ('root ::= "yes" | "no"', "yo", "refused"),
        ("root ::= [a-z]+", "abc", "may end"),
        ("root ::= [a-z]{2,3}", "a", "goes on"),
        ("root ::= [a-z]{2,3}", "ab", "may end"),
        ("root ::= [a-z]{2,3}", "abc", "complete"),
        ("root ::= [a-z]{2,3}", "abcd", "refused"),
        ('root ::= "é" "😀"?', "é😀", "complete"),
        ('root ::= "é" "😀"?', "è", "refused"),
        ("root ::= [^a]*", "xéy😀", "may end"),
        ('root ::= e\ne ::= "(" e ")" | "(" e "]" | "a"*', "((((aa))])", "complete"),
        ('root ::= e\ne ::= "(" e ")" | "(" e "]" | "a"*', "((a)))", "refused"),
        (JSON, '{"a": [1, 2.5e3, {"b": null}], "é": "x\\u00e9"}', "may end"),
        (JSON, '{"a": [1, 2.5e3, {"b": nul]', "refused"),
        ('root ::= ("a"*)* "b"', "aaab", "complete"),
        ('root ::= ("ab" | "a" | "b")* "c"', "ababbac", "complete"),
    ],
)
def test_texts_fare_as_their_grammar_says(tiny: Words, smollm2: Words, source: str, text: str, how: str) -> None:
    assert says(tiny, source, text) == how
    assert says(smollm2, source, text) == how


def test_the_bytes_of_a_character_are_allowed_one_by_one(tiny: Words) -> None:
    matcher = tiny.matcher("root ::= [é-ë] [^é]")
    first, second = tiny.tokens("é")
    other = tiny.tokens("ì")[1]
    assert matcher.allows(first) and not matcher.allows(second)
    matcher.accept(first)
    assert matcher.allows(second) and not matcher.allows(other) and not matcher.allows(tiny.vocab.eos)
    matcher.accept(second)
    # Some character that begins like é is not é.
    assert matcher.allows(first)


def strict(data: bytes) -> str | None:
    """Return what Python makes of a text that may end within a character; None where that is no UTF-8."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        return data[: error.start].decode() if error.reason == "unexpected end of data" else None


@pytest.mark.parametrize("first", [0xC2, 0xDF, 0xE0, 0xE1, 0xED, 0xEF, 0xF0, 0xF1, 0xF4])
def test_bytes_are_characters_where_python_says_so(first: int) -> None:
    for second in range(256):
        for rest in (b"", b"\x80", b"\xbf\x80", b"a"):
            data = bytes([first, second]) + rest
            text, read = strict(data), decode(data)
            assert (None if read is None else "".join(map(chr, read.chars))) == text, data


@given(st.lists(st.binary(max_size=3), max_size=6))
def test_a_text_may_be_cut_anywhere(pieces: list[bytes]) -> None:
    value, missing, chars = 0, 0, ""
    for piece in pieces:
        read = decode(piece, value, missing)
        if read is None:
            assert strict(b"".join(pieces)) is None
            return
        value, missing, chars = read.value, read.missing, chars + "".join(map(chr, read.chars))
    assert chars == strict(b"".join(pieces))


def test_a_character_that_is_spelled_too_long_is_not_the_one_that_a_grammar_means(tiny: Words) -> None:
    matcher = tiny.matcher('root ::= "\\"" [^"]* "\\""')
    for token in tiny.tokens('"'):
        matcher.accept(token)
    byte = {value: 3 + value for value in range(256)}
    assert tiny.vocab.piece(byte[0xE0]) == b"\xe0"
    assert matcher.allows(byte[0xE0]), "many characters begin so"
    matcher.accept(byte[0xE0])
    assert not matcher.allows(byte[0x80]), "what callers see of this and A2 is no quotation mark"
    assert matcher.allows(byte[0xA0])


def test_control_tokens_come_only_where_they_are_named(tiny: Words) -> None:
    start = tiny.token("<|im_start|>")
    assert not tiny.matcher("root ::= .*").allows(start)
    assert not tiny.matcher('root ::= "<|im_start|>"').allows(start)
    named = tiny.matcher("root ::= <|im_start|> [a]")
    assert named.allowed(range(tiny.vocab.size), tiny.vocab.size) == [start]
    named.accept(start)
    assert says(tiny, f"root ::= <[{start}]>", "<") == "refused"
    assert not tiny.matcher("root ::= !<|im_start|>").allows(start)
    assert tiny.matcher("root ::= !<|im_start|>").allows(tiny.tokens("a")[0])


def test_a_grammar_may_name_the_end(tiny: Words) -> None:
    matcher = tiny.matcher("root ::= <|im_end|>")
    assert matcher.allowed(range(tiny.vocab.size), tiny.vocab.size) == [tiny.token("<|im_end|>")]


def test_a_copy_goes_its_own_way(tiny: Words) -> None:
    one = tiny.matcher('root ::= "ab" | "ac"')
    a, b, c = (tiny.tokens(text)[0] for text in "abc")
    one.allows(a)
    one.accept(a)
    other = one.copy()
    one.accept(b)
    assert one.complete and not other.complete and other.allows(c)


def test_a_text_is_fed_as_it_stands(tiny: Words) -> None:
    matcher = tiny.matcher('root ::= "é" [a-z]+')
    assert matcher.feed("é".encode()[:1]) and matcher.feed("éab".encode()[1:])
    assert matcher.allows(tiny.vocab.eos)
    assert not matcher.feed(b"A")


# --- against llama.cpp ------------------------------------------------------------------------------------------------

_ELEMENTS = st.sampled_from(
    ['"a"', '"ab"', "[a-c]", "[^ab]", '"é"', '"(" other ")"', "other", '"1" root', "<|im_start|>", '""', "."]
)
_REPEATED = st.tuples(_ELEMENTS, st.sampled_from(["", "", "", "?", "*", "+", "{2}", "{1,3}"])).map("".join)


def _plain(element: str) -> bool:
    return not (element.startswith('""') and len(element) > 2)


_SEQUENCES = st.lists(_REPEATED.filter(_plain), min_size=1, max_size=3).map(" ".join)
_RULES = st.lists(_SEQUENCES, min_size=1, max_size=3).map(" | ".join)


@given(first=_RULES, second=_RULES, seed=st.integers(0, 2**32))
def test_the_same_tokens_are_allowed_as_by_llama_cpp(tiny: Words, first: str, second: str, seed: int) -> None:
    source = f"root ::= {first}\nother ::= {second}"
    try:
        ours = tiny.matcher(source)
    except GrammarError as error:
        assert "left recursion" in str(error)
        return
    theirs = ReferenceGrammar(tiny.vocab, tiny.handle, source)
    try:
        _walk(tiny, ours, theirs, Random(seed))
    finally:
        theirs.free()


def _walk(words: Words, ours: Matcher, theirs: ReferenceGrammar, random: Random) -> None:
    if not theirs.usable:
        return  # it refuses every rule that can begin with itself
    # It takes control tokens for their names, which nobody sees, and bytes that are of no character.
    said = b""
    pieces = [words.vocab.piece(token) for token in range(words.vocab.size)]
    shown = np.array([bool(piece) and max(piece) < 0xF5 for piece in pieces])
    named = np.array([token == words.token("<|im_start|>") for token in range(words.vocab.size)])
    ends = np.array([words.vocab.ends(token) for token in range(words.vocab.size)])
    for _ in range(6):
        allowed = mask(words, ours)
        compared = shown | ends
        differ = np.flatnonzero(compared & (allowed != theirs.allowed()))
        assert [pieces[token] for token in differ.tolist() if strict(said + pieces[token]) is not None] == []
        going_on = np.flatnonzero(allowed & (shown | named) & ~ends).tolist()
        if not going_on:
            return
        token = random.choice(going_on)
        assert ours.allows(token)
        ours.accept(token)
        theirs.accept(token)
        said += pieces[token]


# --- in bounded time --------------------------------------------------------------------------------------------------

HOSTILE = [
    'root ::= ("a"?){300} "x"',
    'root ::= ("a"? "b"?){2000} "x"',
    'root ::= (([ ]+)*)* "x"',
    "root ::= r0\n" + "".join(f"r{i} ::= r{i + 1} | r{i + 1} [x]\n" for i in range(1500)) + "r1500 ::= [ ]*",
    'root ::= " " root "a" | " " root "b" | " "? " "? root2 | "c"\nroot2 ::= " " root "d" | "e"',
    'root ::= (((((" "?){30})?){30})?){30} "x"',
    "root ::= " + "([ -~]? [a-z]*)" * 400 + " [0-9]",
]


@pytest.mark.parametrize("source", HOSTILE, ids=range(len(HOSTILE)))
def test_no_grammar_takes_long(smollm2: Words, source: str) -> None:
    # Every round looks at all 49,152 tokens. llama.cpp's sampler takes minutes for one round of the first of these.
    try:
        matcher = smollm2.matcher(source)
        for _ in range(3):
            allowed = matcher.allowed(range(smollm2.vocab.size), smollm2.vocab.size)
            longest = max(allowed, key=lambda token: len(smollm2.vocab.piece(token)))
            if smollm2.vocab.ends(longest):
                break
            matcher.accept(longest)
    except ConstraintError as error:
        assert error.code == "grammar_too_complex"
