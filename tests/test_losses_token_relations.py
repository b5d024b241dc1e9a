"""Losses of the relations between tokens, against loops in float64."""

import numpy as np
import pytest
import torch
from helpers import features, numeric_gradient
from references_attention import reference_token_relations
from transformers import BertConfig, MobileBertConfig, ModernBertConfig

from distill_nlp.losses import ModelShape, TokenRelationLoss, chunking
from distill_nlp.outputs import AttentionInputs

MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 1, 1, 1]])
NAMES = ("query", "key", "value")
# (student heads, their size), (teacher heads, their size), relation heads: as many as the heads, more, fewer, one.
SIZES = pytest.mark.parametrize(
    ("student_heads", "teacher_heads", "relation_heads"),
    [
        ((2, 3), (2, 3), 2),
        ((2, 6), (3, 4), 3),
        ((2, 6), (2, 9), 6),
        ((4, 3), (3, 6), 2),
        ((2, 3), (3, 5), 1),
    ],
)
SUBSETS = pytest.mark.parametrize("relations", [["qq"], ["kk"], ["vv"], ["vv", "qq"], ["qq", "kk", "vv"]])


def shape(heads, layers=2, **changes):
    return ModelShape(
        **{"num_labels": 3, "num_layers": layers, "hidden_size": heads[0] * heads[1], "num_attention_heads": heads[0]}
        | changes
    )


def vectors(seed, heads, tokens=4, rows=3, dtype=torch.float64):
    """Queries, keys and values, `(B, A, S, D)` each."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(rows, heads[0], tokens, heads[1], generator=generator).to(dtype) * 1.5 for name in NAMES}


def needing_gradient(tensors):
    return {name: tensor.requires_grad_() for name, tensor in tensors.items()}


def bound(student_heads=(2, 3), teacher_heads=(2, 3), **settings):
    loss = TokenRelationLoss(**settings)
    loss.bind(shape(student_heads), shape(teacher_heads, 4))
    return loss


def test_relation_heads_that_do_not_divide_a_width_are_found_before_a_training():
    config = BertConfig(hidden_size=96, num_attention_heads=4, num_labels=3)
    teacher = ModelShape.from_config(config)
    student = ModelShape.from_config(BertConfig(hidden_size=64, num_attention_heads=4, num_labels=3))
    with pytest.raises(
        ValueError, match=r"relation_heads 48 does not divide .* \(64 and 96\); there are 1, 2, 4, 8, 16, 32"
    ):
        TokenRelationLoss(relation_heads=48).bind(student, teacher)
    TokenRelationLoss(relation_heads=32).bind(student, teacher)
    # By the width of the queries, where that is another than that of the states.
    wide = ModelShape.from_config(ModernBertConfig(hidden_size=96, num_attention_heads=4, head_dim=32, num_labels=3))
    assert wide.attention_width == 128
    TokenRelationLoss(relation_heads=64).bind(student, wide)
    narrow = ModelShape.from_config(MobileBertConfig(hidden_size=512, intra_bottleneck_size=128, num_labels=3))
    assert narrow.attention_width == 128
    unknown = ModelShape(num_labels=3, num_layers=2)
    TokenRelationLoss(relation_heads=48).bind(unknown, ModelShape(num_labels=3, num_layers=2))


def attentions(tensors):
    # The mask and the scaling of the model's own attention are none of a relation's.
    return AttentionInputs(*(tensors[name] for name in NAMES), torch.zeros(1, 1, 1, 1, dtype=torch.bool), 123.0)


def call(loss, student, teacher, mask=MASK):
    return loss(
        features(attentions={2: attentions(student)}), features(attentions={4: attentions(teacher)}), None, mask
    )


def expected_value(student, teacher, relations, heads, mask=MASK):
    source = dict(zip(("qq", "kk", "vv"), NAMES, strict=True))
    return sum(reference_token_relations(student[source[r]], teacher[source[r]], mask, heads) for r in relations)


@SIZES
@SUBSETS
def test_equals_the_reference(student_heads, teacher_heads, relation_heads, relations):
    student, teacher = vectors(0, student_heads), vectors(1, teacher_heads)
    loss = bound(student_heads, teacher_heads, relations=relations, relation_heads=relation_heads)
    value = call(loss, student, teacher)
    assert value.dtype == torch.float64
    assert value.item() == pytest.approx(expected_value(student, teacher, relations, relation_heads), rel=1e-9)


@SIZES
def test_equals_the_reference_without_a_mask(student_heads, teacher_heads, relation_heads):
    student, teacher = vectors(0, student_heads), vectors(1, teacher_heads)
    value = call(bound(student_heads, teacher_heads, relation_heads=relation_heads), student, teacher, None)
    everything = torch.ones(3, 4)
    expected = expected_value(student, teacher, ["qq", "kk", "vv"], relation_heads, everything)
    assert value.item() == pytest.approx(expected, rel=1e-9)


@SIZES
@pytest.mark.parametrize("rows_per_chunk", [1, 2, 3])
def test_gradients_equal_the_reference_in_chunks(
    monkeypatch, student_heads, teacher_heads, relation_heads, rows_per_chunk
):
    monkeypatch.setattr(chunking, "ELEMENTS_PER_CHUNK", rows_per_chunk * relation_heads * 4**2)
    student, teacher = needing_gradient(vectors(0, student_heads)), vectors(1, teacher_heads)
    loss = bound(student_heads, teacher_heads, relation_heads=relation_heads)
    value = call(loss, student, teacher)
    value.backward()
    assert value.item() == pytest.approx(expected_value(student, teacher, ["qq", "kk", "vv"], relation_heads), rel=1e-9)
    # Each relation reads one tensor, so that only its own term changes with it.
    name = NAMES[rows_per_chunk - 1]
    expected = numeric_gradient(
        lambda x: reference_token_relations(x, teacher[name], MASK, relation_heads), student[name]
    )
    np.testing.assert_allclose(student[name].grad.numpy(), expected, rtol=1e-6, atol=1e-9)


@SUBSETS
def test_gradients_pass_gradcheck_and_reach_the_chosen_tensors_of_the_student_only(relations):
    student, teacher = needing_gradient(vectors(0, (2, 3))), needing_gradient(vectors(1, (3, 4)))
    loss = bound((2, 3), (3, 4), relations=relations, relation_heads=3)
    call(loss, student, teacher).backward()
    for name, relation in zip(NAMES, ("qq", "kk", "vv"), strict=True):
        assert (student[name].grad is not None and bool(student[name].grad.any())) == (relation in relations)
        assert teacher[name].grad is None
    read = [name for name, relation in zip(NAMES, ("qq", "kk", "vv"), strict=True) if relation in relations]
    constants = {name: tensor.detach() for name, tensor in teacher.items()}

    def value(*tensors):
        return call(loss, student | dict(zip(read, tensors, strict=True)), constants)

    assert torch.autograd.gradcheck(value, [student[name].detach().requires_grad_() for name in read])


def test_no_graph_of_the_teacher_is_built():
    def saved_tensors(student, teacher) -> int:
        seen = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: seen.append(x.shape) or x, lambda x: x):
            call(bound(), student, teacher)
        return len(seen)

    student, teacher = needing_gradient(vectors(0, (2, 3))), vectors(1, (2, 3))
    expected = saved_tensors(student, teacher)
    assert saved_tensors(student, needing_gradient(teacher)) == expected > 0


def test_is_zero_at_identity():
    student = needing_gradient(vectors(0, (2, 3)))
    value = call(bound(), student, {name: tensor.detach().clone() for name, tensor in student.items()})
    value.backward()
    assert value.item() == pytest.approx(0, abs=1e-12)
    assert all(tensor.grad.abs().max() < 1e-12 for tensor in student.values())


def test_is_zero_where_only_how_the_width_is_cut_into_heads_differs():
    """All heads are concatenated first: six heads of 2 and two heads of 6 hold the same vectors."""
    student = vectors(0, (2, 6))
    joined = {name: tensor.transpose(1, 2).reshape(3, 4, 12) for name, tensor in student.items()}
    teacher = {name: tensor.view(3, 4, 6, 2).transpose(1, 2) for name, tensor in joined.items()}
    for relation_heads in (1, 3, 4, 12):
        value = call(bound((2, 6), (6, 2), relation_heads=relation_heads), student, teacher)
        assert value.item() == pytest.approx(0, abs=1e-12)


def test_is_zero_after_a_rotation_which_relations_do_not_see():
    student = vectors(0, (1, 4))
    rotation = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(5)))[0]
    teacher = {name: tensor @ rotation for name, tensor in student.items()}
    assert (student["query"] - teacher["query"]).abs().max() > 0.5
    value = call(bound((1, 4), (1, 4), relation_heads=1), student, teacher)
    assert value.item() == pytest.approx(0, abs=1e-12)


def test_takes_the_teacher_as_the_truth():
    one, other = vectors(0, (2, 3)), vectors(1, (2, 3))
    forth, back = call(bound(), one, other).item(), call(bound(), other, one).item()
    assert abs(forth - back) > 0.05
    assert forth == pytest.approx(expected_value(one, other, ["qq", "kk", "vv"], 2), rel=1e-9)


@pytest.mark.parametrize("left", [False, True])
def test_extra_padding_with_garbage_changes_nothing_and_gets_no_gradient(left):
    student, teacher = vectors(0, (2, 3)), vectors(1, (3, 4))
    loss = bound((2, 3), (3, 4), relation_heads=3)
    value = call(loss, student, teacher).item()

    def widened(tensors, seed, heads):
        garbage = vectors(seed, heads, tokens=3)
        parts = {name: (tensor, garbage[name] * 20) for name, tensor in tensors.items()}
        return {name: torch.cat(pair[::-1] if left else pair, dim=2) for name, pair in parts.items()}

    nothing = torch.zeros(3, 3, dtype=torch.long)
    mask = torch.cat([nothing, MASK] if left else [MASK, nothing], dim=1)
    wide = needing_gradient(widened(student, 2, (2, 3)))
    found = call(loss, wide, widened(teacher, 3, (3, 4)), mask)
    found.backward()
    assert found.item() == pytest.approx(value, rel=1e-9)
    for tensor in wide.values():
        gradient = tensor.grad.transpose(1, 2)
        assert not gradient[mask == 0].any()
        assert gradient[mask == 1].any()


def test_parts_of_a_batch_add_up_to_the_whole_in_any_order():
    student, teacher = vectors(0, (2, 3)), vectors(1, (2, 3))

    def part(rows):
        cut = [{name: tensor[rows] for name, tensor in side.items()} for side in (student, teacher)]
        return call(bound(), *cut, MASK[rows]).item()

    whole = part([0, 1, 2])
    assert part([2, 0, 1]) == pytest.approx(whole, rel=1e-9)
    assert (part([1]) + 2 * part([2, 0])) / 3 == pytest.approx(whole, rel=1e-9)
    assert (part([0]) + part([1]) + part([2])) / 3 == pytest.approx(whole, rel=1e-9)


def test_a_row_of_padding_only_counts_as_zero():
    student, teacher = needing_gradient(vectors(0, (2, 3))), vectors(1, (2, 3))
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0], [1, 1, 1, 0]])
    value = call(bound(), student, teacher, mask)
    value.backward()
    rows = [0, 2]
    alone = [{name: tensor[rows] for name, tensor in side.items()} for side in (student, teacher)]
    assert value.item() == pytest.approx(call(bound(), *alone, mask[rows]).item() * 2 / 3, rel=1e-9)
    assert all(not tensor.grad[1].any() for tensor in student.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_is_finite_and_float32(dtype, scale):
    student = needing_gradient({name: t.detach() * scale for name, t in vectors(0, (2, 3), dtype=dtype).items()})
    teacher = {name: tensor * scale for name, tensor in vectors(1, (2, 3), dtype=dtype).items()}
    value = call(bound(), student, teacher)
    value.backward()
    assert value.dtype == torch.float32
    assert value.isfinite()
    for tensor in student.values():
        assert tensor.grad.dtype == dtype
        assert tensor.grad.isfinite().all()


def test_bfloat16_costs_only_the_rounding_of_the_inputs():
    """Scores, softmax and logarithms are float32: the value is that of the rounded vectors to 6 digits."""
    student, teacher = vectors(0, (2, 3), dtype=torch.bfloat16), vectors(1, (2, 3), dtype=torch.bfloat16)
    value = call(bound(), student, teacher).item()
    assert value == pytest.approx(expected_value(student, teacher, ["qq", "kk", "vv"], 2), rel=1e-5)


@pytest.mark.parametrize("task", ["single_label_classification", "multi_label_classification", "regression"])
def test_reads_no_labels_and_works_for_any_task(task):
    loss = TokenRelationLoss(relation_heads=2)
    loss.bind(shape((2, 3), problem_type=task), shape((2, 3), 4, problem_type=task))
    student, teacher = vectors(0, (2, 3)), vectors(1, (2, 3))
    sides = features(attentions={2: attentions(student)}), features(attentions={4: attentions(teacher)})
    values = {loss(*sides, labels, MASK).item() for labels in (None, torch.full((3,), -100), torch.arange(3))}
    assert values == {call(bound(), student, teacher).item()}
    assert loss.unit == "rows"


def test_the_mean_is_over_layer_pairs():
    loss = bound(layers=[[1, 2], [2, 3]])
    student = {layer: vectors(layer, (2, 3)) for layer in (1, 2)}
    teacher = {layer: vectors(10 + layer, (2, 3)) for layer in (2, 3)}
    value = loss(
        features(attentions={layer: attentions(tensors) for layer, tensors in student.items()}),
        features(attentions={layer: attentions(tensors) for layer, tensors in teacher.items()}),
        None,
        MASK,
    )
    pairs = [(student[1], teacher[2]), (student[2], teacher[3])]
    assert loss.attention_pairs == [(1, 2), (2, 3)]
    assert value.item() == pytest.approx(
        sum(expected_value(s, t, ["qq", "kk", "vv"], 2) for s, t in pairs) / 2, rel=1e-9
    )


@pytest.mark.parametrize(
    ("student_heads", "teacher_heads", "expected"),
    [((2, 6), (3, 4), 3), ((3, 4), (2, 6), 3), ((2, 3), (4, 5), 2), ((5, 4), (2, 3), 2)],
)
def test_relation_heads_are_the_larger_head_count_that_divides_both_widths(student_heads, teacher_heads, expected):
    assert bound(student_heads, teacher_heads).describe() == f"qq+kk+vv, {expected} relation heads, 2→4"


def test_a_loss_bound_again_to_another_pair_starts_from_what_the_user_gave():
    """3, which the first pair needs, is no setting: it divides neither width of the second."""
    loss = bound((3, 4), (2, 6))
    loss.bind(shape((2, 8)), shape((4, 5), 4))
    assert loss.relation_heads is None
    assert loss.describe() == "qq+kk+vv, 4 relation heads, 2→4"
    assert call(loss, vectors(0, (2, 8)), vectors(1, (4, 5))).isfinite()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"relations": "qq"}, "relations must be a list of qq, kk, vv, got 'qq'"),
        ({"relations": []}, r"relations must be a list of qq, kk, vv, got \[\]"),
        ({"relations": ["qk"]}, r"relations must be a list of qq, kk, vv, got \['qk'\]"),
        ({"relations": ["qq", "qq"]}, r"relations: one stands twice in \['qq', 'qq'\]"),
        ({"relation_heads": 0}, "relation_heads must be a whole number > 0, got 0"),
        ({"relation_heads": True}, "relation_heads must be a whole number > 0, got True"),
        ({"relation_heads": 2.0}, "relation_heads must be a whole number > 0, got 2.0"),
        ({"layers": "middle"}, "layers must be one of"),
        ({"layers": [[0, 0]]}, "student layer 0 .* is not within 1..2"),
    ],
)
def test_refuses_unknown_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        bound(**settings)


def test_refuses_head_counts_that_do_not_divide_the_widths():
    with pytest.raises(ValueError, match=r"neither head count \(5 and 3\) divides both widths \(9 and 10\)"):
        bound((3, 3), (5, 2))
    loss = bound(relation_heads=4)
    with pytest.raises(ValueError, match="relation_heads 4 does not divide 6, the width of the queries"):
        call(loss, vectors(0, (2, 3)), vectors(1, (2, 3)))


@pytest.mark.parametrize("missing", ["num_attention_heads", "hidden_size"])
def test_models_whose_config_does_not_tell_their_size_need_relation_heads(missing):
    unknown = shape((2, 3), **{missing: None})
    for pair in ((unknown, shape((2, 3), 4)), (shape((2, 3)), shape((2, 3), 4, **{missing: None}))):
        with pytest.raises(ValueError, match="names no head count or no width; set relation_heads"):
            TokenRelationLoss().bind(*pair)
    loss = TokenRelationLoss(relation_heads=2)
    loss.bind(unknown, shape((2, 3), 4))
    assert loss.describe() == "qq+kk+vv, 2 relation heads, 2→4"


def test_refuses_models_without_layers_and_sequences_of_different_lengths():
    with pytest.raises(ValueError, match="TokenRelationLoss reads layers, but the teacher's config has no num_hidden"):
        TokenRelationLoss().bind(shape((2, 3)), ModelShape(num_labels=3))
    with pytest.raises(ValueError, match="the student saw 3 x 4 tokens and the teacher 3 x 3"):
        call(bound(), vectors(0, (2, 3)), vectors(1, (2, 3), tokens=3), None)


def test_describes_its_relations_heads_and_layers():
    assert bound().describe() == "qq+kk+vv, 2 relation heads, 2→4"
    assert bound(relations=["vv"], relation_heads=6, layers="uniform").describe() == "vv, 6 relation heads, 1→2, 2→4"
