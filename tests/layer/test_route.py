"""route: which experts a token has and with what weights, against loops over its experts in float64."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import moecomm.functional as mf

INF = math.inf
DEEPSEEK_V2 = {"normalize": False, "scale": 16.0, "num_groups": 8, "top_groups": 3, "group_score": "max"}
DEEPSEEK_V3 = {"score": "sigmoid", "scale": 2.5, "num_groups": 8, "top_groups": 4}
GROUPS = [  # of 8 experts
    {},
    {"num_groups": 4, "top_groups": 2},
    {"num_groups": 4, "top_groups": 1, "group_score": "max"},
    {"num_groups": 2, "top_groups": 2},
    {"num_groups": 8, "top_groups": 3},
]


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def best(values: list[float], count: int) -> list[int]:
    """Where the highest values are, of equals the first; none of -inf."""
    order = sorted(range(len(values)), key=lambda i: -values[i])
    return [i for i in order[:count] if values[i] > -INF]


def choice(
    scores: list[float], logits: list[float], k: int, bias: list[float], num_groups: int, top_groups: int, group_score: str
) -> list[int]:
    """The experts of one token, by loops."""
    ranked = [-INF if logit == -INF else score + b for score, logit, b in zip(scores, logits, bias, strict=True)]
    size = len(ranked) // num_groups
    totals = []
    for g in range(num_groups):
        group = sorted((s for s in ranked[g * size : (g + 1) * size] if s > -INF), reverse=True)
        totals.append(sum(group[: 1 if group_score == "max" else 2]) if group else -INF)
    eligible = best(totals, top_groups)
    return best([s if e // size in eligible else -INF for e, s in enumerate(ranked)], k)


def expected(
    logits: Tensor, k: int, *, score: str = "softmax", normalize: bool = True, scale: float = 1.0, bias: Tensor | None = None,
    num_groups: int = 1, top_groups: int = 1, group_score: str = "top2",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(weights, experts), a token and a slot at a time; logits are float64, and the weights carry a gradient to them."""
    tokens, num_experts = logits.shape
    added = [0.0] * num_experts if bias is None else bias.tolist()
    weights, experts = [], []
    for t in range(tokens):
        allowed = [e for e in range(num_experts) if logits[t, e] > -INF]
        if score == "sigmoid":
            scores = {e: 1 / (1 + (-logits[t, e]).exp()) for e in allowed}
        else:
            powers = {e: (logits[t, e] - logits[t].detach().max()).exp() for e in allowed}
            scores = {e: powers[e] / sum(powers.values()) for e in allowed}
        values = [float(scores[e].detach()) if e in scores else 0.0 for e in range(num_experts)]
        chosen = choice(values, logits[t].tolist(), k, added, num_groups, top_groups, group_score)
        total = sum((scores[e] for e in chosen), torch.zeros(())) if normalize else 1.0
        missing = k - len(chosen)
        weights += [scale * scores[e] / total for e in chosen] + [logits.new_zeros(())] * missing
        experts += chosen + [-1] * missing
    stacked = torch.stack(weights) if weights else logits.sum() * logits.new_zeros(0)
    return stacked.view(tokens, k), torch.tensor(experts, dtype=torch.int64).view(tokens, k)


def check(logits: Tensor, k: int, **options: Any) -> None:
    """The weights, their gradient and the experts are the reference's, to a few roundings."""
    mine, exact = logits.clone().requires_grad_(), logits.double().requires_grad_()
    weights, experts = mf.route(mine, k, **options)
    want_weights, want_experts = expected(exact, k, **options)
    assert weights.dtype == torch.promote_types(logits.dtype, torch.float32)
    torch.testing.assert_close(experts, want_experts, rtol=0, atol=0)
    rounding = 16 * torch.finfo(weights.dtype).eps
    torch.testing.assert_close(weights.double(), want_weights, rtol=rounding, atol=rounding)
    grad = normal(*weights.shape, seed=9, dtype=weights.dtype)
    (got,) = torch.autograd.grad(weights, mine, grad)
    (want,) = torch.autograd.grad(want_weights, exact, grad.double())
    assert got.dtype == logits.dtype
    rounding = max(rounding, torch.finfo(logits.dtype).eps) * options.get("scale", 1.0)
    torch.testing.assert_close(got.double(), want, rtol=rounding, atol=rounding)


@pytest.mark.parametrize("groups", GROUPS, ids=str)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_route_agrees_with_loops_in_float64(score: str, normalize: bool, groups: dict[str, Any]) -> None:
    bias = normal(8, seed=1) * 0.1
    cases = itertools.product((torch.float32, torch.float64), (None, bias, bias.float()), (1, 2))
    for seed, (dtype, added, k) in enumerate(cases):
        logits = 2 * normal(8, 8, seed=seed, dtype=dtype)
        check(logits, k, score=score, normalize=normalize, scale=1.0 + seed, bias=added, **groups)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_weights_of_logits_in_low_precision_are_computed_in_float32(score: str, dtype: torch.dtype) -> None:
    for normalize in (True, False):
        check(normal(20, 12, dtype=dtype), 3, score=score, normalize=normalize)


@pytest.mark.parametrize(
    ("num_experts", "k", "options"),
    [(4, 1, {"normalize": False}), (8, 2, {}), (160, 6, DEEPSEEK_V2), (256, 8, DEEPSEEK_V3)],
    ids=["Switch", "Mixtral", "DeepSeek-V2", "DeepSeek-V3"],
)
def test_the_published_models_are_expressible(num_experts: int, k: int, options: dict[str, Any]) -> None:
    bias = {"bias": 0.1 * normal(num_experts, seed=2)} if options.get("score") == "sigmoid" else {}
    check(normal(6, num_experts), k, **options, **bias)


def test_normalized_softmax_is_the_softmax_of_the_chosen_logits() -> None:
    """Softmax before top-k, renormalised, and softmax after top-k: Mixtral's, written with torch's own functions."""
    logits = normal(50, 8)
    values, indices = logits.topk(2)
    weights, experts = mf.route(logits, 2)
    assert torch.equal(experts, indices)
    torch.testing.assert_close(weights, values.softmax(1))
    renormalized = logits.softmax(1).gather(1, indices)
    torch.testing.assert_close(weights, renormalized / renormalized.sum(1, keepdim=True))


@pytest.mark.parametrize("k", [1, 8])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_one_expert_or_all_of_them(score: str, k: int) -> None:
    for normalize in (True, False):
        check(normal(7, 8), k, score=score, normalize=normalize)
        check(normal(7, k), k, score=score, normalize=normalize)


def test_no_tokens() -> None:
    for options in ({}, {"normalize": False}, DEEPSEEK_V3 | {"bias": normal(8)}):
        check(normal(0, 8), 2, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("groups", GROUPS, ids=str)
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_of_equal_scores_the_lower_id_comes_first(score: str, groups: dict[str, Any], dtype: torch.dtype) -> None:
    seed = torch.Generator().manual_seed(3)
    logits = torch.randint(-1, 2, (60, 8), generator=seed).to(dtype)
    for bias in (None, torch.zeros(8, dtype=dtype), torch.randint(0, 2, (8,), generator=seed).to(dtype)):
        _, experts = mf.route(logits, 2, score=score, bias=bias, **groups)
        # The loops compare what torch computed: equal logits have equal scores, and equal sums of two have equal sums.
        wide = logits.to(torch.promote_types(dtype, torch.float32))
        scores = wide.sigmoid() if score == "sigmoid" else wide.softmax(1)
        added = torch.zeros(8) if bias is None else bias
        how = {"num_groups": 1, "top_groups": 1, "group_score": "top2"} | groups
        for t in range(60):
            want = exact_choice(scores[t], added.to(wide.dtype), **how)
            assert experts[t].tolist() == want


def exact_choice(scores: Tensor, bias: Tensor, num_groups: int, top_groups: int, group_score: str) -> list[int]:
    """The two best of a token's eligible experts, by sums rounded as the scores are."""
    ranked = scores + bias
    groups = [sorted(group, reverse=True)[: 1 if group_score == "max" else 2] for group in ranked.view(num_groups, -1).unbind()]
    eligible = best([float(sum(group)) for group in groups], top_groups)
    size = len(ranked) // num_groups
    return best([float(s) if e // size in eligible else -INF for e, s in enumerate(ranked)], 2)


def test_without_a_bias_experts_are_told_apart_whose_scores_round_to_the_same_number() -> None:
    logits = torch.tensor([[0.0, 300.0, 1.0, 2.0], [30.0, 40.0, 50.0, 20.0]])
    assert mf.route(logits, 3)[1].tolist() == [[1, 3, 2], [2, 1, 0]]
    assert mf.route(logits, 3, score="sigmoid")[1].tolist() == [[1, 3, 2], [2, 1, 0]]
    assert mf.route(logits, 3, num_groups=2, top_groups=2)[1].tolist() == [[1, 3, 2], [2, 1, 0]]


@pytest.mark.parametrize("groups", GROUPS, ids=str)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_experts_with_a_logit_of_minus_infinity_are_never_chosen(score: str, normalize: bool, groups: dict[str, Any]) -> None:
    """Not even with a bias: their slots are dropped where no others are left, and no gradient is NaN."""
    logits = normal(40, 8, seed=4, dtype=torch.float32)
    logits[torch.rand(40, 8, generator=torch.Generator().manual_seed(5)) < 0.7] = -INF
    logits[3], logits[4, 1:] = -INF, -INF
    for bias in (None, 5 * normal(8, seed=6).abs(), -5 * normal(8, seed=6).abs()):
        check(logits, 2, score=score, normalize=normalize, bias=bias, **groups)


def test_a_token_of_minus_infinity_alone_goes_nowhere_and_has_a_zero_gradient() -> None:
    for score, normalize in itertools.product(("softmax", "sigmoid"), (True, False)):
        logits = normal(3, 4, seed=7)
        logits[1] = -INF
        logits.requires_grad_()
        weights, experts = mf.route(logits, 2, score=score, normalize=normalize)
        assert experts[1].tolist() == [-1, -1]
        assert weights[1].tolist() == [0, 0]
        (grad,) = torch.autograd.grad(weights, logits, normal(3, 2))
        assert grad[1].tolist() == [0] * 4
        assert grad.isfinite().all()


@pytest.mark.parametrize("logit", [-1e4, -200.0, -90.0, 1e4])
def test_weights_add_up_to_the_scale_whatever_their_scores_round_to(logit: float) -> None:
    """Sigmoids of -200 are zero in float32, and so would be their sum, by which the weights are divided."""
    for score in ("softmax", "sigmoid"):
        logits = torch.full((2, 4), logit).requires_grad_()
        weights, _ = mf.route(logits, 2, score=score, scale=3.0)
        assert weights.tolist() == [[1.5, 1.5]] * 2
        (grad,) = torch.autograd.grad(weights[:, 0].sum(), logits)
        assert grad.isfinite().all()


@pytest.mark.parametrize("options", [{}, {"normalize": False}, {"score": "sigmoid"}, {"score": "sigmoid", "normalize": False}], ids=str)
def test_nan_stays_within_its_token_and_shows_in_its_weights(options: dict[str, Any]) -> None:
    for groups, bias in itertools.product(GROUPS, (None, normal(8))):
        logits = normal(5, 8, seed=8)
        clean, clean_experts = mf.route(logits, 2, bias=bias, **options, **groups)
        for e in range(8):
            logits[2] = normal(8, seed=e)
            logits[2, e] = math.nan
            weights, experts = mf.route(logits, 2, bias=bias, **options, **groups)
            assert weights[2].isnan().any()
            assert ((experts[2] >= 0) & (experts[2] < 8)).all()
            others = [0, 1, 3, 4]
            assert torch.equal(weights[others], clean[others])
            assert torch.equal(experts[others], clean_experts[others])


def test_the_bias_moves_the_choice_and_not_the_weights_and_has_no_gradient() -> None:
    logits = torch.zeros(1, 4).requires_grad_()
    bias = torch.tensor([0.0, 0.1, 0.3, 0.2], requires_grad=True)
    weights, experts = mf.route(logits, 2, bias=bias, normalize=False)
    assert experts.tolist() == [[2, 3]]
    assert weights.tolist() == [[0.25, 0.25]]
    assert torch.autograd.grad(weights.sum(), (logits, bias), allow_unused=True)[1] is None


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_route_passes_gradcheck(score: str, normalize: bool) -> None:
    options = {"score": score, "normalize": normalize, "scale": 2.5, "bias": 0.1 * normal(6, seed=1), "num_groups": 3, "top_groups": 2}
    logits = normal(2, 6).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: mf.route(x, 2, **options)[0], logits)
    assert torch.autograd.gradgradcheck(lambda x: mf.route(x, 2, **options)[0], logits)


def test_route_gives_the_same_bits_again() -> None:
    logits, bias = normal(200, 64, dtype=torch.float32), normal(64, dtype=torch.float32)
    first, again = (mf.route(logits, 8, bias=bias, **DEEPSEEK_V3) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_strides_do_not_matter() -> None:
    logits = normal(9, 8)
    for a, b in zip(mf.route(logits, 2), mf.route(logits.t().contiguous().t(), 2), strict=True):
        assert torch.equal(a, b)


def several(logits: Tensor, bias: Tensor) -> list[tuple[Tensor, Tensor]]:
    return [
        mf.route(logits, 2),
        mf.route(logits, 2, normalize=False, scale=2.0),
        mf.route(logits, 2, score="sigmoid", bias=bias, num_groups=4, top_groups=2),
        mf.route(logits, 3, score="sigmoid", normalize=False),
        mf.route(logits, 2, bias=bias, normalize=False, num_groups=2, top_groups=1, group_score="max"),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.exhaustive)])
def test_compiled_as_one_graph_for_all_numbers_of_tokens_route_gives_what_it_gives_in_eager_mode(backend: str) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(several, fullgraph=True, backend=counter)
    bias = 0.1 * normal(8, dtype=torch.float32)
    for tokens in (13, 5, 0, 1):
        logits = normal(tokens, 8, seed=tokens, dtype=torch.float32)
        logits[:2] = torch.tensor([-INF, 0, 1, 0, -INF, 0, 0, 0])
        logits[2:3] = -INF
        logits.requires_grad_()
        torch._dynamo.decorators.mark_unbacked(logits, 0)
        results, wants = compiled(logits, bias), several(logits, bias)
        for (weights, experts), (want, want_experts) in zip(results, wants, strict=True):
            assert torch.equal(experts, want_experts)
            torch.testing.assert_close(weights, want, rtol=1e-6, atol=1e-7)
        cotangents = [normal(*want.shape, seed=i, dtype=torch.float32) for i, (want, _) in enumerate(wants)]
        got, want = (torch.autograd.grad([weights for weights, _ in each], logits, cotangents)[0] for each in (results, wants))
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"logits": [1.0]}, TypeError, "logits was list; it must be a tensor"),
        ({"logits": torch.zeros(8)}, ValueError, r"logits was of shape \[8\]; it must be of shape \[T, E\]"),
        ({"logits": torch.zeros(3, 8, dtype=torch.int64)}, TypeError, "logits was of dtype torch.int64; it must be of a floating dtype"),
        ({"k": 0}, ValueError, "k was 0; it must be between 1 and 8"),
        ({"k": 9}, ValueError, "k was 9; it must be between 1 and 8"),
        ({"k": 2.0}, TypeError, "k was float; it must be an int"),
        ({"k": True}, TypeError, "k was bool; it must be an int"),
        ({"k": 5, "num_groups": 4, "top_groups": 2}, ValueError, "k was 5; it must be between 1 and 4"),
        ({"score": "relu"}, ValueError, 'score was \'relu\'; it must be "softmax" or "sigmoid"'),
        ({"num_groups": 3}, ValueError, "num_groups was 3; it must be a positive divisor of logits' E = 8"),
        ({"num_groups": 0}, ValueError, "num_groups was 0"),
        ({"num_groups": "2"}, TypeError, "num_groups was str; it must be an int"),
        ({"num_groups": 2, "top_groups": 3}, ValueError, "top_groups was 3; it must be between 1 and num_groups = 2"),
        ({"top_groups": 0}, ValueError, "top_groups was 0"),
        ({"top_groups": None}, TypeError, "top_groups was NoneType; it must be an int"),
        ({"group_score": "mean"}, ValueError, 'group_score was \'mean\'; it must be "top2" or "max"'),
        ({"bias": 0.5}, TypeError, "bias was float; it must be a tensor"),
        ({"bias": torch.zeros(1, 8)}, ValueError, r"bias was of shape \[1, 8\]; it must be of shape \[E\]"),
        ({"bias": torch.zeros(7)}, ValueError, r"bias was of shape \[7\]; it must be of shape \[8\], logits' E = 8"),
        ({"bias": torch.zeros(8, dtype=torch.int32)}, TypeError, "bias was of dtype torch.int32"),
        ({"bias": torch.zeros(8, device="meta")}, ValueError, "bias was on meta; it must be on logits' device, cpu"),
    ],
)
def test_a_wrong_argument_is_named(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        mf.route(**{"logits": torch.zeros(3, 8), "k": 2, **changed})
