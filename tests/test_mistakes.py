"""Mistakes of newcomers: the message says in code what to write instead. With it the call gives what it gives without the mistake."""

from __future__ import annotations

import ast
import math
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.functional import one_hot
from torch.utils._pytree import tree_leaves

import moecomm.functional as mf
import moecomm.planner
from tests.spawn import run_ranks

T, D, E, K = 6, 5, 4, 2
LAYER = "layer(x, experts, weights, num_experts, group, placement)"
CHOSEN = "Take those of the chosen experts: weights.gather"
ALL_ROWS = "Give back all rows of this plan, one part an expert: torch.cat"
DROPPED = "experts = experts.masked_fill(experts == 2, -1)"


class Mistake(NamedTuple):
    made: str  # what changes in what the caller has; "": the call is the mistake, and the message has the right one
    call: str
    says: list[str]  # how each sentence begins: what it says is done, then the next may come
    before: str = ""  # changes that are no mistake


MISTAKES = {
    "logits [B, S, E]": Mistake("logits = logits.unsqueeze(0)", "mf.route(logits, k)", ["Flatten the tokens first: logits"]),
    "logits of one token": Mistake("logits = logits[0]", "mf.route(logits, k)[1][0]", ["For one token: logits.unsqueeze"]),
    "logits of ints": Mistake("logits = logits.long()", "mf.route(logits, k)", ["Convert it: logits"], "logits = logits.round()"),
    "k above E": Mistake("k = 5", "mf.route(logits, k)", ["Choose fewer: k=min"], "k = 4"),
    "k above its groups' experts": Mistake(
        "top_groups = 1", "mf.route(logits, 3, num_groups=2, top_groups=top_groups)", ["Allow more groups: top_groups"]
    ),
    "k a tensor": Mistake("k = torch.tensor(k)", "mf.route(logits, k)", ["Convert it: int(k)"]),
    "experts and weights [B, S, K]": Mistake(
        "experts, weights = experts.view(2, 3, k), weights.view(2, 3, k)", LAYER,
        ["Flatten the tokens first: experts", "Flatten the tokens first: weights"],
    ),
    "experts [T] where K = 1": Mistake(
        "experts, weights = experts[:, 0], weights[:, 0]", LAYER, ["For one expert a token: experts", "For one expert a token: weights"],
        "experts, weights = experts[:, :1], weights[:, :1]",
    ),
    "experts a list": Mistake("experts = experts.tolist()", LAYER, ["Make it a tensor: torch.as_tensor(experts)"]),
    "experts an array": Mistake("experts = experts.numpy()", LAYER, ["Make it a tensor: torch.as_tensor(experts)"]),
    "experts what route returns": Mistake(
        "experts = mf.route(logits, k)", "mf.limit_by_capacity(experts, num_experts, 3)", ["Unpack what route returns: weights, experts"]
    ),
    "experts a bool map": Mistake(
        "experts, weights = chosen, probabilities", LAYER, ["Of a map [T, E] with k experts a token take the ids: experts", CHOSEN]
    ),
    "experts a map of ints": Mistake(
        "experts, weights = chosen.long(), probabilities", LAYER, ["Of a map with k experts a token take the ids: experts", CHOSEN]
    ),
    "experts of floats": Mistake("experts = experts.float()", LAYER, ["Convert the ids: experts.long()"]),
    "experts and weights swapped": Mistake("", "mf.plan(weights, experts, num_experts)", ["The ids come first: mf.plan"]),
    "num_experts for no expert": Mistake(
        "experts = experts.masked_fill(experts == -1, num_experts)", LAYER,
        ["Ids count from 0, and a slot without an expert is -1: experts"], DROPPED,
    ),
    "-100 for no expert": Mistake(
        "experts = experts.masked_fill(experts == -1, -100)", LAYER, ["Mark a slot without an expert with -1: experts.clamp"], DROPPED
    ),
    "weights of all experts": Mistake("weights = probabilities", LAYER, [CHOSEN]),
    "weights of ints": Mistake("weights = weights.long()", LAYER, ["Convert it: weights.float()"], "weights = weights.round()"),
    "num_experts a tensor": Mistake("num_experts = torch.tensor(num_experts)", LAYER, ["Convert it: int(num_experts)"]),
    "num_experts the experts": Mistake("num_experts = my_experts", LAYER, ["Count them: len(num_experts)"]),
    "capacity a factor": Mistake(
        "capacity = 1.25", "mf.limit_by_capacity(experts, num_experts, capacity)", ["Of a capacity factor make slots: math.ceil"]
    ),
    "max_rows a share": Mistake(
        "max_rows = 0.5", "mf.plan(experts, weights, num_experts, max_rows=max_rows)", ["Of a share of the tokens make a number: math.ceil"]
    ),
    "placement one list": Mistake("placement = [0, 1, 2, 3]", LAYER, ["Give each rank a list of its own: torch.tensor(placement)"]),
    "x and plan swapped": Mistake("", "mf.dispatch(plan, x)", ["The plan comes second: mf.dispatch(x, plan)"]),
    "rows and plan swapped": Mistake("", "mf.combine(plan, rows)", ["The plan comes second: mf.combine(rows, plan)"]),
    "no plan": Mistake("plan = experts, weights", "mf.dispatch(x, plan)", ["Make one: plan = mf.plan"]),
    "a plan made a tuple": Mistake("plan = tuple(plan)", "mf.dispatch(x, plan)", ["Make it one: mf.Plan"]),
    "x [B, S, D]": Mistake("x = x.view(2, 3, -1)", "mf.dispatch(x, plan)", ["Flatten the tokens first: x.flatten"]),
    "a plan of other tokens": Mistake(
        "plan = mf.plan(experts[:3], weights[:3], num_experts)", "mf.dispatch(x, plan)", ["Make the plan of the same tokens: plan ="]
    ),
    "rows of another plan": Mistake(
        "rows = mf.dispatch(x[:4], mf.plan(experts[:4], weights[:4], num_experts))", "mf.combine(rows, plan)", [ALL_ROWS]
    ),
    "offsets taken for starts": Mistake("rows = off_by_one(mf.dispatch(x, plan))", "mf.combine(rows, plan)", [ALL_ROWS]),
    "rows [D, N]": Mistake("rows = rows.T", "mf.combine(rows, plan)", ["Transpose them: rows.T"]),
    "rows [2, N / 2, D]": Mistake("rows = rows.view(2, -1, rows.shape[1])", "mf.combine(rows, plan)", ["Flatten the rows first: rows"]),
    "tokens for rows": Mistake(
        "rows = x", "mf.combine(rows, plan)", ["These may be tokens, of which the rows are made first: rows ="],
        "rows = mf.dispatch(x, plan)",
    ),
    "rows of ints": Mistake("rows = rows.long()", "mf.combine(rows, plan)", ["Convert it: rows.float()"], "rows = rows.round()"),
    "a wire's dtype": Mistake("wire = torch.float8_e4m3fn", "mf.dispatch(x, plan, wire=wire)", ["Name the format: wire="]),
    "ids for probabilities": Mistake(
        "", "mf.load_balance_loss(experts, probabilities)", ["The ids come second: mf.load_balance_loss(probabilities, experts)"]
    ),
}  # fmt: skip
IN_A_GROUP = {
    "a mesh of two dims": Mistake("group = mesh", LAYER, ["Choose the dim of the experts: group=mesh"]),
    "a mesh and a dim's name": Mistake('group = mesh, "ep"', LAYER, ["Take the dim by its name: group=mesh"]),
    "a dim's name": Mistake('group = "ep"', LAYER, ["Take the dim of a mesh from the mesh: group=mesh"]),
    "ranks": Mistake("group = [0, 1]", LAYER, ["Make a group of these ranks first: group=torch"]),
    "experts that do not divide": Mistake(
        "placement = None", LAYER, ["let a rank hold a replica: placement=moecomm"],
        "num_experts = 5; placement = moecomm.planner.place([1.0] * 5, 2, 3)",
    ),
    "a forgotten group": Mistake(
        'group = torch.distributed.group.WORLD', "mf.plan(experts, weights, 5, group)",
        ['Without group it is all ranks: pass group=mesh["ep"]'],
        'mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("dp", "ep")); group = mesh["ep"]',
    ),
    "the experts of one rank": Mistake(
        "num_experts = 2", LAYER, ["Count the experts of all ranks: num_experts"], "placement = None"
    ),
}  # fmt: skip


def names() -> dict[str, Any]:
    """What the caller has, on one process."""
    torch.manual_seed(0)
    x, logits = torch.randn(T, D), torch.randn(T, E)
    weights, experts = mf.route(logits, K, normalize=False)
    my_experts = [torch.nn.Linear(D, D, bias=False) for _ in range(E)]
    plan = mf.plan(experts, weights, E, "")
    parts = mf.dispatch(x, plan).tensor_split(plan.offsets.tolist()[:-1])
    return {
        "mf": mf, "moecomm": moecomm, "torch": torch, "math": math, "layer": layer, "init_device_mesh": init_device_mesh,
        "x": x, "logits": logits, "k": K, "weights": weights, "experts": experts, "num_experts": E, "group": "", "ranks": 1,
        "plan": plan, "my_experts": my_experts, "rows": torch.cat([f(part) for f, part in zip(my_experts, parts, strict=True)]),
        "placement": [[0, 1, 2, 3]], "wire": "float8_e4m3", "top_groups": 2, "num_groups": 2, "max_rows": T // 2,
        "capacity": math.ceil(1.25 * T * K / E), "probabilities": logits.softmax(1), "chosen": one_hot(experts, E).sum(1).bool(),
        "off_by_one": lambda rows: torch.cat([my_experts[i](rows[plan.offsets[i - 1] : plan.offsets[i]]) for i in range(1, E)]),
    }  # fmt: skip


def layer(x: Tensor, experts: Tensor, weights: Tensor, num_experts: int, group: Any, placement: Any) -> Tensor:
    plan = mf.plan(experts, weights, num_experts, group, placement=placement)
    return mf.combine(mf.dispatch(x, plan) * (2 + mf.row_experts(plan).unsqueeze(1)), plan)


def assert_the_message_corrects(mistake: Mistake, caller: dict[str, Any]) -> None:
    exec(mistake.before, caller)
    want = eval(mistake.call, caller) if mistake.made else None
    exec(mistake.made, caller)
    for says in mistake.says:
        with pytest.raises((TypeError, ValueError, UserWarning)) as raised:
            eval(mistake.call, caller)
        message = str(raised.value)
        assert says in message
        assert "\n" not in message
        code = message[message.index(says) :].split(": ", 1)[1].removeprefix("pass ").split(", or let")[0]
        if not mistake.made:
            eval(code, caller)
        elif isinstance(ast.parse(code).body[0], ast.Assign):
            exec(code, caller)
        else:
            caller[message.split(" was ")[0]] = eval(code, caller)
    if mistake.made:
        for got, wanted in zip(tree_leaves(eval(mistake.call, caller)), tree_leaves(want), strict=True):
            if isinstance(wanted, Tensor):
                torch.testing.assert_close(got, wanted)
            else:
                assert got == wanted


@pytest.mark.parametrize("name", MISTAKES)
def test_what_the_message_says_corrects_the_mistake(name: str) -> None:
    assert_the_message_corrects(MISTAKES[name], names())


def here() -> None:
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "ep"))
    for mistake in IN_A_GROUP.values():
        assert_the_message_corrects(mistake, names() | {"mesh": mesh, "group": mesh["ep"], "ranks": 2, "placement": [[0, 1], [2, 3]]})


def test_what_the_message_says_corrects_mistakes_with_a_group() -> None:
    run_ranks(here, 2)
