"""The reader of GBNF: what it takes, and what it refuses with which words."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamaherd.pool.gbnf import MAX_SOURCE, Chars, GrammarError, Ref, Rules, TokenRef, parse


def root(source: str) -> Rules:
    rules = parse(source)
    assert rules.rules[rules.root]
    return rules


def elements(source: str) -> tuple[object, ...]:
    rules = root(source)
    (sequence,) = rules.rules[rules.root]
    return sequence


def chars(*ranges: tuple[str, str]) -> Chars:
    return Chars(tuple((ord(low), ord(high)) for low, high in ranges))


def test_a_literal_is_its_characters() -> None:
    assert elements(r'root ::= "aé\n\"\x41\u00e9\U0001F600"') == tuple(chars((c, c)) for c in 'aé\n"Aé😀')


def test_classes_are_sorted_ranges() -> None:
    assert elements("root ::= [c-fa-bx] [^b-y] .") == (
        chars(("a", "f"), ("x", "x")),
        Chars(((0, ord("a")), (ord("z"), 0x10FFFF))),
        Chars(((0, 0x10FFFF),)),
    )


def test_a_dash_and_brackets_may_stand_in_a_class() -> None:
    assert elements(r"root ::= [a-] [\]\[\-\\]") == (
        chars(("-", "-"), ("a", "a")),
        chars(("-", "-"), ("[", "]")),
    )


def test_tokens_are_named_by_id_or_text() -> None:
    assert elements("root ::= <[12]> !<[7]> <|im_end|> !<think>") == (
        TokenRef(12, negated=False),
        TokenRef(7, negated=True),
        TokenRef("<|im_end|>", negated=False),
        TokenRef("<think>", negated=True),
    )


def test_rules_may_be_used_before_they_are_defined_and_lines_may_break() -> None:
    rules = root('# a comment\nroot ::= # another\n  ("a" |\n   other)\n\nother ::= "b" | # or\n "c"\n')
    assert len(rules.rules) == 3


@pytest.mark.parametrize(
    ("repetition", "count"), [("{3}", 3), ("{2,}", 3), ("{1,3}", 2), ("*", 1), ("+", 2), ("?", 1), ("{0}", 0)]
)
def test_repetitions_are_written_out(repetition: str, count: int) -> None:
    assert len(elements(f"root ::= [x]{repetition}")) == count


def test_a_repeated_literal_is_repeated_whole() -> None:
    rules = root('root ::= "ab"{2}')
    (sequence,) = rules.rules[rules.root]
    assert sequence == (Ref(1), Ref(1))


def test_rules_that_match_the_empty_text_are_known() -> None:
    rules = parse('root ::= a b\na ::= "x" | ""\nb ::= a a\nc ::= "y"')
    assert rules.nullable == (True, True, True, False)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("", "there is no rule named 'root'"),
        ('main ::= "a"', "there is no rule named 'root'"),
        ("root ::= other", "rule 'other' is used and not defined"),
        ('root = "a"', "line 1, column 6: expected '::=' after 'root', found '='"),
        ('root ::= "a" )', "line 1, column 14: expected an element or the end of the line, found ')'"),
        ('root ::= ("a"', "line 1, column 14: expected ')' for the '(' at line 1, column 10, found the end"),
        ('root ::= "a', "line 1, column 10: this text has no closing quote"),
        ("root ::= [a", "line 1, column 10: this class of characters has no closing bracket"),
        ("root ::= []", "line 1, column 10: an empty class of characters"),
        ("root ::= [z-a]", "line 1, column 11: a range of characters that runs backward"),
        ('root ::= "\\q"', "line 1, column 11: an escape that is not known"),
        ('root ::= "\\x4"', "line 1, column 11: '\\x' needs 2 hexadecimal digits"),
        ('root ::= "\\U00110000"', "line 1, column 11: a character beyond U+10FFFF"),
        ("root ::= *", "line 1, column 11: a repetition needs something to repeat before it"),
        ('root ::= ""+', "a repetition needs something to repeat before it"),
        ('root ::= "a"{3,2}', "line 1, column 13: a repetition from 3 to 2 times"),
        ('root ::= "a"{1000000}', "line 1, column 13: a repetition may have at most 2000 times"),
        ('root ::= "a"{0,99999999999999999999999}', "a repetition may have at most 2000 times"),
        ('root ::= "a"{x}', "line 1, column 14: expected a number, found 'x'"),
        ("root ::= <[x]>", "line 1, column 10: expected a token as '<[id]>'"),
        ("root ::= !x", "line 1, column 11: expected '<' after '!'"),
        ("root ::= <tool", "line 1, column 10: this token has no closing '>'"),
        ('root ::= "a"\n\n  root2', "line 3, column 8: expected '::=' after 'root2', found the end"),
        ('root ::= "\0"', "the grammar holds a NUL character"),
        ("root ::= " + "(" * 65, "more than 64 nested parentheses"),
        ('root ::= "' + "a" * MAX_SOURCE + '"', "at most 65536 are allowed"),
        ("root ::= " + '("a" "b"){2000} ' * 11, "the grammar is too large"),
        ('root ::= root "a" | "b"', "left recursion: rule 'root' can begin with itself"),
        ('root ::= a\na ::= b "x"\nb ::= c?\nc ::= a "z"', "left recursion: rule 'a' can begin with itself"),
        ("root ::= ws root ws | [x]\nws ::= [ ]*", "left recursion: rule 'root' can begin with itself"),
    ],
)
def test_what_cannot_be_used_is_refused_with_a_reason(source: str, reason: str) -> None:
    with pytest.raises(GrammarError) as caught:
        parse(source)
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    ("source", "empty"),
    [('root ::= ("a"*)*', True), ('root ::= root | "a"', False), ("root ::= a\na ::= b?\nb ::= a | [x]", True)],
)
def test_a_rule_that_can_begin_with_itself_alone_is_harmless(source: str, empty: bool) -> None:
    grammar = parse(source)
    assert grammar.nullable[grammar.root] is empty


@given(st.text(alphabet='root :=|()[]{}*+?."\\x^-<>!,01\n#ab'))
def test_any_text_is_read_or_refused(text: str) -> None:
    for source in (text, "root ::= " + text):
        try:
            parse(source)
        except GrammarError as error:
            assert str(error)


@pytest.mark.parametrize(
    "source",
    [
        "root ::= " + '"a"* ' * 3_000,
        "root ::= r0\n" + "".join(f"r{i} ::= r{i + 1} | r{i + 1} [x]\n" for i in range(1500)) + "r1500 ::= [y]",
        'root ::= (("x"{2000}){2000}){2000}',
        "root ::= " + "(" * 64 + '"a"' + ")*" * 64,
    ],
)
def test_large_grammars_are_read(source: str) -> None:
    grammar = parse(source)
    assert len(grammar.rules) == len(grammar.nullable) > grammar.root
