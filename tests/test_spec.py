import pytest

from mixlab import spec


def op(x=1, *, y=2):
    return ("op", x, y)


def both(*parts):
    return ("both", *parts)


VOCABULARY = {"op": op, "pair": lambda a, b: ("pair", a, b)}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("op", ("op", 1, 2)),
        (" op() ", ("op", 1, 2)),
        ("op(-3.5, y='a')", ("op", -3.5, "a")),
        ("op((1, 2), y=[3])", ("op", (1, 2), [3])),
        ("op({'a': 1}, y=None)", ("op", {"a": 1}, None)),
        ("pair(op, op(5))", ("pair", ("op", 1, 2), ("op", 5, 2))),
        ("op | op(2) | op(3)", ("both", ("op", 1, 2), ("op", 2, 2), ("op", 3, 2))),
        ("pair(op | op, 1)", ("pair", ("both", ("op", 1, 2), ("op", 1, 2)), 1)),
    ],
)
def test_parse_builds_what_the_text_says(text, expected):
    assert spec.parse(text, VOCABULARY, combine=both) == expected


@pytest.mark.parametrize(
    ("text", "error", "says"),
    [
        ("opp(1)", ValueError, "did you mean 'op'"),
        ("op(z=1)", TypeError, "it takes"),
        ("op(1", ValueError, "cannot parse"),
        ("op | op", ValueError, "neither a literal"),
        ("op.__class__", ValueError, "neither a literal"),
        ("op(**{'x': 1})", ValueError, "not accepted"),
        ("(lambda: 1)()", ValueError, "neither a literal"),
        ("__import__('os')", ValueError, "unknown name"),
        ("op(open('f'))", ValueError, "unknown name 'open'"),
        ("[x for x in (1,)]", ValueError, "neither a literal"),
    ],
)
def test_parse_refuses_the_rest_and_says_why(text, error, says):
    with pytest.raises(error, match=says):
        spec.parse(text, VOCABULARY)


@pytest.mark.parametrize("text", ["0.1", "'sgd'", "None"])
def test_a_literal_calls_nothing(text):
    with pytest.raises(ValueError, match=r"is a literal, no call; .*known: double"):
        spec.parse(text, {"double": lambda x: 2 * x})


def test_slugs_name_files():
    assert spec.slug("gossip(align='once', lr=1e-2) | x") == "gossip_align_once_lr_1e_2_x"
    assert spec.slug(0.5) == "0.5"
