"""Which student layer learns from which teacher layer."""

from fractions import Fraction

import pytest

from distill_nlp.layer_mapping import check_layers, format_pairs, map_layers


@pytest.mark.parametrize(
    ("student_depth", "teacher_depth", "teacher_layers"),
    [
        (2, 4, [2, 4]),
        (3, 12, [4, 8, 12]),
        (4, 6, [2, 3, 5, 6]),
        (6, 12, [2, 4, 6, 8, 10, 12]),
        (4, 4, [1, 2, 3, 4]),
        (1, 12, [12]),
        (4, 2, [1, 1, 2, 2]),
    ],
)
def test_uniform_spreads_over_the_teacher(student_depth, teacher_depth, teacher_layers):
    pairs = map_layers("uniform", student_depth, teacher_depth)
    assert pairs == list(zip(range(1, student_depth + 1), teacher_layers, strict=True))


def test_uniform_is_the_rounded_fraction_and_never_the_embeddings():
    for student_depth in range(1, 25):
        for teacher_depth in range(1, 25):
            pairs = map_layers("uniform", student_depth, teacher_depth)
            assert [s for s, _ in pairs] == list(range(1, student_depth + 1))
            for s, t in pairs:
                exact = Fraction(s * teacher_depth, student_depth)
                assert t == max(1, (2 * exact + 1) // 2)
            assert pairs[-1] == (student_depth, teacher_depth)


def test_last_and_first():
    assert map_layers("last", 2, 4) == [(2, 4)]
    assert map_layers("first", 2, 4) == [(1, 1), (2, 2)]
    with pytest.raises(ValueError, match="as deep as the student; the student has 4 layers and the teacher 2"):
        map_layers("first", 4, 2)


@pytest.mark.parametrize(
    ("strategy", "student_depth", "teacher_depth", "pairs"),
    [
        ("every_2", 6, 12, [(1, 2), (2, 4), (3, 6), (4, 8), (5, 10), (6, 12)]),
        ("every_2", 3, 12, [(1, 2), (2, 4), (3, 6)]),
        ("every_2", 6, 5, [(1, 2), (2, 4)]),
        ("every_3", 6, 12, [(1, 3), (2, 6), (3, 9), (4, 12)]),
        ("every_5", 6, 12, [(1, 5), (2, 10)]),
        ("every_12", 6, 12, [(1, 12)]),
        ("every_1", 2, 3, [(1, 1), (2, 2)]),
        ("last", 6, 12, [(6, 12)]),
        ("last", 12, 2, [(12, 2)]),
        ("first", 3, 3, [(1, 1), (2, 2), (3, 3)]),
        ("uniform", 5, 12, [(1, 2), (2, 5), (3, 7), (4, 10), (5, 12)]),
        ("uniform", 12, 5, [(i, max(1, (i * 10 + 12) // 24)) for i in range(1, 13)]),
    ],
)
def test_strategies_at_depths_that_divide_and_that_do_not(strategy, student_depth, teacher_depth, pairs):
    assert map_layers(strategy, student_depth, teacher_depth) == pairs


@pytest.mark.parametrize("strategy", ["uniform", "last", "first", "every_1", "every_2", "every_3"])
def test_no_strategy_takes_the_embeddings_or_a_layer_that_is_not_there(strategy):
    for student_depth in range(1, 8):
        for teacher_depth in range(max(3, student_depth), 13):
            pairs = map_layers(strategy, student_depth, teacher_depth, first_layer=0)
            assert pairs == map_layers(strategy, student_depth, teacher_depth, first_layer=1)
            assert pairs
            assert all(1 <= s <= student_depth and 1 <= t <= teacher_depth for s, t in pairs)
            assert len({s for s, _ in pairs}) == len(pairs)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ("first", 'layers: "first" needs a teacher as deep as the student'),
        ("every_3", 'layers: "every_3" finds no layer'),
        ([[5, 1]], r"layers: student layer 5 of pair \[5, 1\] is not within 1..4"),
        ([(1, 3)], r"layers: teacher layer 3 of pair \[1, 3\] is not within 1..2"),
    ],
)
def test_errors_name_both_depths(layers, message):
    with pytest.raises(ValueError, match=f"{message}; the student has 4 layers and the teacher 2$"):
        map_layers(layers, 4, 2)


def test_explicit_pairs_are_taken_as_they_are():
    assert map_layers([[2, 4], [1, 1]], 2, 4) == [(2, 4), (1, 1)]
    assert map_layers(((1, 4),), 2, 4) == [(1, 4)]
    assert map_layers([[1, 2], [1, 4]], 2, 4) == [(1, 2), (1, 4)]


def test_layer_zero_is_for_hidden_states_only():
    assert map_layers([[0, 0], [2, 4]], 2, 4, first_layer=0) == [(0, 0), (2, 4)]
    with pytest.raises(ValueError, match=r"student layer 0 of pair \[0, 0\] is not within 1\.\.2"):
        map_layers([[0, 0]], 2, 4)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ("middle", "must be one of uniform, last, first, every_<k> or a list of pairs, got 'middle'"),
        ("every_0", "must be one of"),
        ("every_", "must be one of"),
        ("every_-1", "must be one of"),
        ("every_2x", "must be one of"),
        ("Uniform", "must be one of"),
        ([], r"or at least one pair, got \[\]"),
        (None, "or at least one pair, got None"),
        ([[3, 4]], r"student layer 3 of pair \[3, 4\] is not within 1\.\.2; the student has 2 layers"),
        ([[2, 5]], r"teacher layer 5 of pair \[2, 5\] is not within 1\.\.4"),
        ([[1, -1]], r"teacher layer -1 of pair \[1, -1\]"),
        ([[1]], r"each pair must be \[student layer, teacher layer\], got \[1\]"),
        ([[1, 2, 3]], "each pair must be"),
        ([[1, 2.0]], "each pair must be"),
        ([[True, 2]], "each pair must be"),
        ([1, 2], "each pair must be .* got 1"),
        (["12"], "each pair must be .* got '12'"),
        ([[1, 2], [1, 2]], r"the same pair stands twice in \[\[1, 2\], \[1, 2\]\]"),
    ],
)
def test_refuses_what_cannot_be_mapped(layers, message):
    with pytest.raises(ValueError, match=message):
        map_layers(layers, 2, 4)


@pytest.mark.parametrize("layers", ["middle", [], [[1]], [[1, 2], (1, 2)], 3])
def test_what_no_model_could_have_is_refused_before_models_are_known(layers):
    with pytest.raises(ValueError, match="^layers"):
        check_layers(layers)


@pytest.mark.parametrize("layers", ["uniform", "every_7", [[0, 0], [99, 99]], ((1, 2), [1, 3])])
def test_what_depends_on_the_models_is_left_to_the_mapping(layers):
    assert check_layers(layers) is None


def test_format_has_the_student_on_the_left():
    assert format_pairs([(1, 2), (2, 4)]) == "1→2, 2→4"
