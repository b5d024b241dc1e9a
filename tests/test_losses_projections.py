"""Projections between widths, and their start by least squares."""

import copy

import numpy as np
import pytest
import torch
from helpers import features, numeric_gradient
from references_features import MASK, STUDENT, TEACHER, states
from safetensors.torch import load_file, save_file
from scipy.linalg import orthogonal_procrustes

from distill_nlp.losses import HiddenStateLoss
from distill_nlp.losses.projections import LeastSquares, Projections, _set_orthogonal

WIDTHS = pytest.mark.parametrize(("student_width", "teacher_width"), [(4, 6), (6, 4), (5, 5)])
LEARNED = ["linear", "shared", "low_rank", "orthogonal"]
EACH_KIND = pytest.mark.parametrize("kind", LEARNED)


def projections(kind, student_width=4, teacher_width=6, pairs=2, rank=2, seed=0):
    torch.manual_seed(seed)
    return Projections(kind, pairs, student_width, teacher_width, rank)


def tokens(seed, width, count=40, dtype=torch.float64):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed)).to(dtype)


def matrix(projection):
    """The linear part of a projection, by what it does: (H_teacher, H_student)."""
    with torch.no_grad():
        width = next(m for m in projection.modules() if isinstance(m, torch.nn.Linear)).in_features
        return (projection(torch.eye(width)) - projection(torch.zeros(1, width))).T.double().numpy()


def offset(projection):
    with torch.no_grad():
        width = next(m for m in projection.modules() if isinstance(m, torch.nn.Linear)).in_features
        return projection(torch.zeros(width)).double().numpy()


def fitted(kind, batches, student_width=4, teacher_width=6, **settings):
    """One projection, fitted to these (student, teacher) tokens."""
    made = projections(kind, student_width, teacher_width, pairs=1, **settings)
    fit = LeastSquares(made)
    for x, y in batches:
        fit.add(0, x, y)
    fit.solve()
    return made[0]


def squared_error(weight, bias, x, y):
    """`Σ ‖W x + b - y‖²` over tokens."""
    return float(np.square(x.numpy() @ np.asarray(weight).T + bias - y.numpy()).sum())


# ---- the kinds ----


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("linear", ["0.weight", "0.bias", "1.weight", "1.bias"]),
        ("auto", ["0.weight", "0.bias", "1.weight", "1.bias"]),
        ("shared", ["0.weight", "0.bias"]),
        ("low_rank", ["0.0.weight", "0.1.weight", "0.1.bias", "1.0.weight", "1.1.weight", "1.1.bias"]),
        (
            "orthogonal",
            [f"{i}.parametrizations.weight.{name}" for i in (0, 1) for name in ("original", "0.base")],
        ),
    ],
)
def test_names_in_the_state_dict(kind, names):
    assert list(projections(kind).state_dict()) == names


@WIDTHS
@EACH_KIND
def test_maps_the_last_dimension_and_keeps_the_others(kind, student_width, teacher_width):
    made = projections(kind, student_width, teacher_width)
    for shape in ((3,), (3, 5), ()):
        assert made.project(1, torch.randn(*shape, student_width)).shape == (*shape, teacher_width)


@pytest.mark.parametrize("kind", ["auto", "none"])
def test_equal_widths_are_left_as_they_are(kind):
    made = projections(kind, 4, 4)
    x = torch.randn(3, 4)
    assert made.project(1, x) is x
    assert (made.kind, len(made), list(made.parameters())) == ("none", 0, [])


def test_auto_is_linear_for_unequal_widths():
    assert projections("auto").kind == "linear"


@EACH_KIND
def test_each_pair_has_its_own_but_shared_is_one(kind):
    made = projections(kind, pairs=3)
    x = torch.randn(5, 4)
    answers = [made.project(i, x) for i in range(3)]
    assert len(made) == (1 if kind == "shared" else 3)
    assert torch.equal(answers[0], answers[2]) == (kind == "shared")
    assert torch.equal(answers[1], answers[2]) == (kind == "shared")


def test_shared_collects_the_gradients_of_all_pairs():
    made = projections("shared", pairs=3)
    x = [torch.randn(5, 4) for _ in range(3)]
    sum(made.project(i, x[i]).square().sum() for i in range(3)).backward()
    collected = made[0].weight.grad.clone()
    parts = torch.zeros_like(collected)
    for i in range(3):
        made.zero_grad()
        made.project(i, x[i]).square().sum().backward()
        parts += made[0].weight.grad
    torch.testing.assert_close(collected, parts)


@WIDTHS
@pytest.mark.parametrize("rank", [1, 3])
def test_low_rank_has_that_rank(student_width, teacher_width, rank):
    made = projections("low_rank", student_width, teacher_width, rank=rank)
    assert np.linalg.matrix_rank(matrix(made[0]), tol=1e-5) == rank
    optimizer = torch.optim.SGD(made.parameters(), lr=0.1)
    made.project(0, torch.randn(9, student_width)).sub(1).square().mean().backward()
    optimizer.step()
    assert np.linalg.matrix_rank(matrix(made[0]), tol=1e-5) == rank
    assert offset(made[0]).any()


def assert_orthonormal(weight):
    """Columns where the map widens, rows where it narrows."""
    tall = weight if weight.shape[0] >= weight.shape[1] else weight.T
    np.testing.assert_allclose(tall.T @ tall, np.eye(tall.shape[1]), atol=1e-5)


@WIDTHS
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_orthogonal_learns_and_stays_orthonormal(student_width, teacher_width, weight_decay):
    made = projections("orthogonal", student_width, teacher_width, pairs=1)
    x, y = torch.randn(30, student_width), torch.randn(30, teacher_width)
    optimizer = torch.optim.AdamW(made.parameters(), lr=0.05, weight_decay=weight_decay)
    before, losses = matrix(made[0]), []
    assert_orthonormal(before)
    for _ in range(20):
        optimizer.zero_grad()
        loss = (made.project(0, x) - y).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert_orthonormal(matrix(made[0]))
    assert losses[-1] < losses[0] - 0.01
    assert np.abs(matrix(made[0]) - before).max() > 0.1
    assert not offset(made[0]).any()


def test_orthogonal_keeps_lengths_and_angles_where_it_widens():
    made = projections("orthogonal", 4, 6)
    x = torch.randn(5, 4)
    answers = made.project(0, x)
    torch.testing.assert_close(answers @ answers.T, x @ x.T, rtol=1e-4, atol=1e-5)


def trained(made):
    """A few steps, so that nothing is where it started."""
    optimizer = torch.optim.AdamW(made.parameters(), lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        sum(made.project(i, torch.randn(9, made.widths[0])).sub(1).square().mean() for i in range(2)).backward()
        optimizer.step()
    return made


@WIDTHS
@EACH_KIND
@pytest.mark.parametrize("fit_first", [False, True], ids=["random", "fitted"])
def test_a_round_trip_through_safetensors_loses_nothing(kind, student_width, teacher_width, fit_first, tmp_path):
    made = projections(kind, student_width, teacher_width)
    if fit_first:
        fit = LeastSquares(made)
        for i in range(2):
            fit.add(i, tokens(i, student_width), tokens(i + 2, teacher_width))
        fit.solve()
    trained(made)
    save_file(made.state_dict(), tmp_path / "projections.safetensors")
    other = projections(kind, student_width, teacher_width, seed=9)
    x = torch.randn(5, student_width)
    assert not torch.equal(other.project(1, x), made.project(1, x))
    other.load_state_dict(load_file(tmp_path / "projections.safetensors"), strict=True)
    for i in range(2):
        assert torch.equal(other.project(i, x), made.project(i, x))
    # Training goes on as it would have.
    for each in (made, other):
        each.zero_grad()
        each.project(0, x).square().sum().backward()
    for (name, one), (_, two) in zip(made.named_parameters(), other.named_parameters(), strict=True):
        assert (one.grad is None) == (two.grad is None)
        if one.grad is not None:
            torch.testing.assert_close(one.grad, two.grad, msg=name)


@WIDTHS
@EACH_KIND
def test_a_deep_copy_is_independent(kind, student_width, teacher_width):
    made = trained(projections(kind, student_width, teacher_width))
    x = torch.randn(5, student_width)
    before = made.project(0, x).detach()
    twin = copy.deepcopy(made)
    assert torch.equal(twin.project(0, x), before)
    trained(twin)
    assert not torch.equal(twin.project(0, x), before)
    assert torch.equal(made.project(0, x), before)
    assert (twin.kind, twin.widths) == (made.kind, made.widths)


@pytest.mark.parametrize("kind", ["linear", "shared", "low_rank"])
def test_parameters_held_in_bfloat16_take_float32_states(kind):
    """As under FSDP's and DeepSpeed's mixed precision."""
    made, x = projections(kind).bfloat16(), torch.randn(5, 4)
    answers = made.project(1, x)
    answers.sum().backward()
    assert all(p.dtype == torch.bfloat16 and p.grad.dtype == torch.bfloat16 for p in made[-1].parameters())
    assert answers.dtype == torch.float32
    torch.testing.assert_close(answers, made.float().project(1, x))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("none", 2, 4, 6), 'projection "none" needs equal widths; the student has 4, the teacher 6: use .* "auto"'),
        (("low_rank", 2, 4, 6, 4), r'"low_rank" needs a rank below both widths \(4 and 6\), got 4'),
        (("low_rank", 2, 6, 4, 5), r'"low_rank" needs a rank below both widths \(6 and 4\), got 5'),
    ],
)
def test_refuses_widths_that_do_not_fit(settings, message):
    with pytest.raises(ValueError, match=message):
        Projections(*settings)


# ---- least squares ----


@pytest.mark.parametrize("kind", ["linear", "shared"])
@WIDTHS
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_recovers_an_exact_affine_map(kind, student_width, teacher_width, scale):
    x = tokens(0, student_width) * scale
    weight, bias = tokens(1, student_width, teacher_width).numpy(), tokens(2, teacher_width, 1)[0].numpy()
    y = torch.tensor(x.numpy() @ weight.T + bias)
    projection = fitted(kind, [(x, y)], student_width, teacher_width)
    np.testing.assert_allclose(matrix(projection), weight, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(offset(projection), bias, rtol=1e-4, atol=1e-4 * max(1.0, scale / 100))


def test_recovers_an_affine_map_of_coordinates_of_different_sizes():
    """A few coordinates of BERT's states are hundreds of times larger than the others, and far from 0."""
    sizes, means = torch.tensor([1e-2, 1, 1e2, 1e3]).double(), torch.tensor([1, 0, 1e3, -1e4]).double()
    x = tokens(0, 4, 200) * sizes + means
    weight = tokens(1, 4, 6).numpy() / sizes.numpy()
    y = torch.tensor(x.numpy() @ weight.T + 1.0)
    projection = fitted("linear", [(x, y)])
    np.testing.assert_allclose(matrix(projection) * sizes.numpy(), weight * sizes.numpy(), rtol=1e-4, atol=1e-4)


def test_equals_numpy_on_ragged_batches():
    batches = [(tokens(i, 4, n), tokens(i + 10, 6, n)) for i, n in enumerate((1, 17, 5, 30))]
    x, y = (torch.cat(side).numpy() for side in zip(*batches, strict=True))
    solution, *_ = np.linalg.lstsq(np.hstack([x, np.ones((len(x), 1))]), y, rcond=None)
    projection = fitted("linear", batches)
    np.testing.assert_allclose(matrix(projection), solution[:-1].T, atol=1e-6)
    np.testing.assert_allclose(offset(projection), solution[-1], atol=1e-6)


@EACH_KIND
@WIDTHS
def test_sums_over_batches_and_over_ranks_equal_one_batch(kind, student_width, teacher_width):
    sizes = (3, 20, 1, 16)
    batches = [(tokens(i, student_width, n), tokens(i + 10, teacher_width, n)) for i, n in enumerate(sizes)]
    whole = [tuple(torch.cat(side) for side in zip(*batches, strict=True))]
    ranks = []
    for rank in (0, 1):
        # Ranks agree in their parameters, not in the state of their generators.
        ranks.append(LeastSquares(projections(kind, student_width, teacher_width)))
        torch.manual_seed(rank)
        for pair in (0, 1):
            for x, y in batches[rank::2]:
                ranks[rank].add(pair, x, y)
    squares, products = ranks[0].squares + ranks[1].squares, ranks[0].products + ranks[1].products
    for fit in ranks:
        fit.squares.copy_(squares)
        fit.products.copy_(products)
        fit.solve()
    expected = fitted(kind, whole, student_width, teacher_width)
    for fit in ranks:
        np.testing.assert_allclose(matrix(fit.projections[-1]), matrix(expected), atol=1e-5)
        np.testing.assert_allclose(offset(fit.projections[-1]), offset(expected), atol=1e-5)
    states_of_ranks = [fit.projections.state_dict() for fit in ranks]
    assert all(torch.equal(states_of_ranks[0][name], states_of_ranks[1][name]) for name in states_of_ranks[0])


def test_each_pair_gets_its_own_fit_and_shared_that_of_all():
    samples = [(tokens(i, 4), tokens(i + 10, 6)) for i in range(3)]
    for kind in ("linear", "shared"):
        made = projections(kind, pairs=3)
        fit = LeastSquares(made)
        for i, (x, y) in enumerate(samples):
            fit.add(i, x, y)
        fit.solve()
        for i, sample in enumerate(samples):
            expected = fitted("linear", samples if kind == "shared" else [sample])
            np.testing.assert_allclose(matrix(made[made.index(i)]), matrix(expected), atol=1e-6)


@pytest.mark.parametrize(("student_width", "teacher_width"), [(4, 4), (4, 6)])
def test_orthogonal_is_scipys_procrustes(student_width, teacher_width):
    x, y = tokens(0, student_width), tokens(1, teacher_width)
    found = matrix(fitted("orthogonal", [(x, y)], student_width, teacher_width))
    assert_orthonormal(found)
    # SciPy knows square maps only: zeros fill the student up to the teacher's width, and their columns do not matter.
    filled = np.hstack([x.numpy(), np.zeros((len(x), teacher_width - student_width))])
    expected, _ = orthogonal_procrustes(filled, y.numpy())
    np.testing.assert_allclose(found, expected.T[:, :student_width], atol=1e-5)


def test_orthogonal_of_a_wider_student_correlates_most_with_the_teacher():
    x, y = tokens(0, 6), tokens(1, 4)
    found = matrix(fitted("orthogonal", [(x, y)], 6, 4))
    assert_orthonormal(found)

    def correlation(weight):
        return float((y.numpy() * (x.numpy() @ weight.T)).sum())

    rng = np.random.default_rng(0)
    for size in (0.01, 0.1, 1.0):
        for _ in range(20):
            other = np.linalg.qr((found + size * rng.normal(size=found.shape)).T)[0].T
            other *= np.sign((other * found).sum(axis=1, keepdims=True))
            assert correlation(other) < correlation(found)


@WIDTHS
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_low_rank_is_the_best_map_of_that_rank(student_width, teacher_width, rank):
    """Reduced-rank regression: the best fit of that rank to the full regression's fitted values."""
    x = tokens(0, student_width) * torch.linspace(0.3, 3, student_width) + 2.0
    y = tokens(1, teacher_width) + x @ tokens(2, teacher_width, student_width) - 5.0
    projection = fitted("low_rank", [(x, y)], student_width, teacher_width, rank=rank)
    x_mean, y_mean = x.numpy().mean(axis=0), y.numpy().mean(axis=0)
    full, *_ = np.linalg.lstsq(x.numpy() - x_mean, y.numpy() - y_mean, rcond=None)
    _, _, directions = np.linalg.svd((x.numpy() - x_mean) @ full, full_matrices=False)
    expected = (full @ directions[:rank].T @ directions[:rank]).T
    np.testing.assert_allclose(matrix(projection), expected, atol=1e-4)
    np.testing.assert_allclose(offset(projection), y_mean - expected @ x_mean, atol=1e-4)


@pytest.mark.parametrize("kind", ["linear", "low_rank", "orthogonal"])
@pytest.mark.parametrize("count", [1, 3])
def test_few_tokens_stay_finite(kind, count):
    x, y = tokens(0, 8, count), tokens(1, 10, count)
    projection = fitted(kind, [(x, y)], 8, 10)
    assert np.isfinite(matrix(projection)).all()
    assert np.abs(matrix(projection)).max() < 10
    if kind == "linear":
        # They are met exactly, and what they say nothing about stays small.
        np.testing.assert_allclose(projection(x.float()).detach().numpy(), y.numpy(), atol=1e-4)
        assert np.abs(matrix(projection)).sum() < np.abs(y.numpy()).sum() * 10


def test_constant_and_equal_coordinates_stay_finite():
    x = tokens(0, 6)
    x[:, 1] = 3.7
    x[:, 2] = 0.0
    x[:, 4] = x[:, 3]
    x[:, 5] = 1e3 + 1e-13 * x[:, 5]
    y = tokens(1, 5) + x[:, :1]
    projection = fitted("linear", [(x, y)], 6, 5)
    assert not matrix(projection)[:, [1, 2, 5]].any()
    kept = x[:, [0, 3]]
    solution, *_ = np.linalg.lstsq(np.hstack([kept.numpy(), np.ones((len(x), 1))]), y.numpy(), rcond=None)
    np.testing.assert_allclose(matrix(projection)[:, 0], solution[0], atol=1e-5)
    np.testing.assert_allclose(matrix(projection)[:, [3, 4]].sum(axis=1), solution[1], atol=1e-5)
    np.testing.assert_allclose(offset(projection), solution[2], atol=1e-5)


def test_takes_bfloat16_and_float32_tokens_that_need_gradient():
    x, y = tokens(0, 4).bfloat16().requires_grad_(), tokens(1, 6).float()
    projection = fitted("linear", [(x, y)])
    expected = fitted("linear", [(x.detach().double(), y.double())])
    np.testing.assert_allclose(matrix(projection), matrix(expected), atol=1e-6)
    assert all(p.requires_grad and p.dtype == torch.float32 and p.grad_fn is None for p in projection.parameters())


def test_keeps_no_graph_of_what_it_takes_in():
    fit = LeastSquares(projections("linear"))
    fit.add(0, tokens(0, 4).requires_grad_(), tokens(1, 6).requires_grad_())
    assert not fit.squares.requires_grad
    assert not fit.products.requires_grad


@pytest.mark.parametrize("kind", ["linear", "low_rank", "orthogonal"])
def test_the_fit_is_better_than_a_random_start_and_a_minimum(kind):
    x = tokens(0, 4)
    y = tokens(1, 6) + x @ tokens(2, 6, 4) + 1.0
    random = projections(kind)[0]
    found = fitted(kind, [(x, y)], seed=1)
    best = squared_error(matrix(found), offset(found), x, y)
    assert best < 0.9 * squared_error(matrix(random), offset(random), x, y)
    rng = np.random.default_rng(0)
    for _ in range(30):
        weight, bias = matrix(found), offset(found)
        noise = 0.05 * rng.normal(size=weight.shape)
        if kind == "linear":
            weight = weight + noise
            bias = bias + 0.05 * rng.normal(size=bias.shape)
        elif kind == "orthogonal":
            other = np.linalg.qr(weight + noise)[0]
            weight = other * np.sign((other * weight).sum(axis=0))
        else:
            left, values, right = np.linalg.svd(weight + noise, full_matrices=False)
            weight = (left[:, :2] * values[:2]) @ right[:2]
            bias = y.numpy().mean(axis=0) - weight @ x.numpy().mean(axis=0)
        assert squared_error(weight, bias, x, y) > best


def test_the_gradient_of_the_loss_is_zero_right_after_the_fit():
    loss = HiddenStateLoss(projection_init="least_squares")
    loss.bind(STUDENT, TEACHER)
    student, teacher = (features(hidden_states=states(seed, width)) for seed, width in ((0, 4), (1, 6)))
    before = loss(student, teacher, None, None).item()
    fit = loss.least_squares()
    loss.fit(fit, student, teacher, None)
    fit.solve()
    after = loss(student, teacher, None, None)
    after.backward()
    assert after.item() < 0.9 * before
    assert all(p.grad.abs().max() < 1e-6 for p in loss.parameters())
    weight = loss.projections[0].weight

    def error(w):
        x, y = student.hidden_states[1].flatten(0, 1).double(), teacher.hidden_states[2].flatten(0, 1).double()
        return squared_error(w, loss.projections[0].bias.detach().numpy(), x, y)

    np.testing.assert_allclose(numeric_gradient(error, weight), np.zeros(weight.shape), atol=1e-4)


def test_padding_does_not_enter():
    sums = []
    for garbage in (0.0, 1e4):
        loss = HiddenStateLoss(projection_init="least_squares")
        loss.bind(STUDENT, TEACHER)
        fit = loss.least_squares()
        sides = []
        for seed, width in ((0, 4), (1, 6)):
            filled = {k: v.masked_fill(MASK[..., None] == 0, garbage) for k, v in states(seed, width).items()}
            sides.append(features(hidden_states=filled))
        loss.fit(fit, *sides, MASK)
        sums.append((fit.squares, fit.products))
    assert torch.equal(sums[0][0], sums[1][0])
    assert torch.equal(sums[0][1], sums[1][1])
    assert sums[0][0][0, -1, -1] == MASK.sum()


def test_without_a_projection_there_is_nothing_to_fit():
    fit = LeastSquares(projections("none", 4, 4))
    fit.add(0, tokens(0, 4), tokens(1, 4))
    fit.solve()
    assert fit.squares.numel() == 0


def test_refuses_to_fit_to_nothing_and_to_what_is_not_finite():
    fit = LeastSquares(projections("linear", pairs=1))
    with pytest.raises(ValueError, match="least squares got no tokens to fit the projections to"):
        fit.solve()
    fit.add(0, tokens(0, 4, 0), tokens(1, 6, 0))
    with pytest.raises(ValueError, match="least squares got no tokens"):
        fit.solve()
    fit.add(0, tokens(0, 4), tokens(1, 6) / 0.0)
    with pytest.raises(ValueError, match="least squares got hidden states that are not finite"):
        fit.solve()


@pytest.mark.parametrize(("student_width", "teacher_width"), [(24, 32), (32, 24), (16, 16)])
def test_rounding_does_not_change_where_an_orthogonal_projection_starts(student_width, teacher_width):
    """Its square base has columns that the fit leaves open; with them training would go another way."""
    generator = torch.Generator().manual_seed(0)
    bases = []
    for noise in (0.0, 1e-7):
        weight, _ = torch.linalg.qr(torch.randn(32, 32, generator=generator.manual_seed(1)))
        weight = weight[:teacher_width, :student_width]
        u, _, v = torch.linalg.svd(weight + noise * torch.randn(weight.shape, generator=generator), full_matrices=False)
        (projection,) = Projections("orthogonal", 1, student_width, teacher_width)
        _set_orthogonal(projection, u @ v)
        base = projection.parametrizations.weight[0].base
        torch.testing.assert_close(base.T @ base, torch.eye(len(base)), rtol=0, atol=1e-5)
        bases.append(base)
    torch.testing.assert_close(*bases, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["linear", "orthogonal", "low_rank"])
def test_rounding_does_not_change_the_fit_where_states_lie_in_a_plane(kind):
    """After a layer norm they add up to a constant: in that direction there is rounding only."""
    generator = torch.Generator().manual_seed(0)
    student = torch.nn.functional.layer_norm(torch.randn(200, 24, generator=generator), (24,))
    teacher = torch.randn(200, 32, generator=generator)
    weights = []
    for noise in (0.0, 1e-7):
        projections = Projections(kind, 1, 24, 32, rank=8)
        fit = LeastSquares(projections)
        fit.add(0, student + noise * torch.randn(student.shape, generator=generator), teacher)
        fit.solve()
        weights.append(projections.project(0, torch.eye(24)).detach())
    torch.testing.assert_close(*weights, rtol=0, atol=1e-3)
