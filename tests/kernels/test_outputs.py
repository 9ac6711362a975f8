"""Where an op may write: over the tensor that an output replaces, element for element, and over nothing else that the
call reads.
"""

import pytest
import torch
from kernels.cases import draw
from torch.utils.flop_counter import FlopCounterMode

from flowbp_kernels import (
    bridge_cotangents,
    cfg_euler_step,
    cfg_multistep_step,
    leap_residuals,
    quadrature_update,
)

SHAPE, SIZE = (3, 41), 123
WEIGHTS = [0.5, -0.25]

# op, the shapes of what it reads, and of what it writes with the argument that each output may replace.
OPS = {
    "quadrature_update": (
        lambda x, velocities, scales, out: quadrature_update(x, velocities, [0, 3], WEIGHTS, scales=scales, out=out),
        {"x": SHAPE, "velocities": (5, *SHAPE), "scales": (5, 3)},
        {"out": (SHAPE, "x")},
    ),
    "leap_residuals": (
        lambda x_k, x_j, x_end, velocities, predictions_out: leap_residuals(
            x_k, x_j, x_end, velocities, [0, 3], (WEIGHTS, WEIGHTS), predictions_out=predictions_out
        ),
        {"x_k": SHAPE, "x_j": SHAPE, "x_end": SHAPE, "velocities": (5, *SHAPE)},
        {"predictions_out": ((2, *SHAPE), None)},
    ),
    "cfg_euler_step": (
        lambda x, v_cond, v_uncond, velocity_out, out: cfg_euler_step(
            x, v_cond, v_uncond, 4.5, -0.1, velocity_out=velocity_out, out=out
        ),
        {"x": SHAPE, "v_cond": SHAPE, "v_uncond": SHAPE},
        {"velocity_out": (SHAPE, "v_cond"), "out": (SHAPE, "x")},
    ),
    "cfg_euler_step, no guidance": (
        lambda x, v_cond, out: cfg_euler_step(x, v_cond, None, 1.0, -0.1, out=out),
        {"x": SHAPE, "v_cond": SHAPE},
        {"out": (SHAPE, "x")},
    ),
    "cfg_multistep_step": (
        lambda x, v_cond, v_uncond, velocities, velocity_out, out: cfg_multistep_step(
            x, v_cond, v_uncond, 4.5, -0.1, velocities, [0, 4], WEIGHTS, velocity_out=velocity_out, out=out
        ),
        {"x": SHAPE, "v_cond": SHAPE, "v_uncond": SHAPE, "velocities": (5, *SHAPE)},
        {"velocity_out": (SHAPE, "v_cond"), "out": (SHAPE, "x")},
    ),
    "bridge_cotangents": (
        lambda g, g_x, out: bridge_cotangents(g, g_x, WEIGHTS, WEIGHTS, out=out),
        {"g": SHAPE, "g_x": SHAPE},
        {"out": ((2, *SHAPE), None)},
    ),
}
PAIRS = [
    (op, out, other)
    for op, (_, read, written) in OPS.items()
    for out in written
    for other in (*read, *written)
    if other != out
]


def tensors(op):
    _, read, written = OPS[op]
    shapes = read | {name: shape for name, (shape, _) in written.items()}
    return {name: draw(*shape, seed=seed) for seed, (name, shape) in enumerate(shapes.items())}


def share(arguments, out, other, shift):
    """Both in one piece of memory: `out` begins `shift` elements after (or, if negative, before) `other`."""
    starts = {other: max(0, -shift), out: max(0, shift)}
    memory = torch.empty(max(start + arguments[name].numel() for name, start in starts.items()))
    moved = {
        name: memory[start : start + arguments[name].numel()].view_as(arguments[name]) for name, start in starts.items()
    }
    for name in (out, other):
        moved[name].copy_(arguments[name])
    return arguments | moved


@pytest.mark.parametrize("op, out, other", PAIRS)
def test_an_output_that_overlaps_another_argument_is_refused(op, out, other, everywhere):
    call, _, written = OPS[op]
    arguments = tensors(op)
    sizes = arguments[out].numel(), arguments[other].numel()
    for shift in {1, -1, 16, sizes[1] - 1, 1 - sizes[0]} | ({0} if written[out][1] != other else set()):
        if -sizes[0] < shift < sizes[1]:
            with pytest.raises(
                ValueError, match=rf"({out} and {other}(\[[04]\])?|{other} and {out}) overlap in memory"
            ):
                call(**share(arguments, out, other, shift))


@pytest.mark.parametrize("op, out, other", PAIRS)
def test_neighbours_in_memory_do_not_overlap(op, out, other, everywhere):
    call, expected, arguments = OPS[op][0], tensors(op), tensors(op)
    call(**expected)
    for shift in (arguments[other].numel(), -arguments[out].numel()):
        mine = share(arguments, out, other, shift)
        call(**mine)
        assert all(torch.equal(mine[name], expected[name]) for name in mine)


@pytest.mark.parametrize(
    "op", [op for op, (_, _, written) in OPS.items() if any(other for _, other in written.values())]
)
def test_what_an_output_replaces_may_be_written_over(op, everywhere):
    call, _, written = OPS[op]
    expected, mine = tensors(op), tensors(op)
    call(**expected)
    mine |= {out: mine[other] for out, (_, other) in written.items()}
    call(**mine)
    assert all(torch.equal(mine[out], expected[out]) for out in written)


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_a_compiled_call_may_write_over_its_latent_too(compiler):
    """A compiled step may write its velocity into the cache that it reads."""
    x, velocities = draw(*SHAPE), draw(5, *SHAPE, seed=1)
    expected = (
        quadrature_update(x, velocities, [0, 3], WEIGHTS),
        *cfg_euler_step(x, velocities[0], velocities[1], 4.5, -0.1),
        *cfg_multistep_step(x, velocities[0], velocities[1], 4.5, -0.1, velocities, [0, 3], WEIGHTS),
    )

    def update(x, velocities):
        return quadrature_update(x, velocities, [0, 3], WEIGHTS, out=x)

    def step(x, v_cond, v_uncond):
        return cfg_euler_step(x, v_cond, v_uncond, 4.5, -0.1, velocity_out=v_cond, out=x)

    def multistep(x, cache):
        tensors = x, cache[0], cache[1]
        return cfg_multistep_step(*tensors, 4.5, -0.1, cache, [0, 3], WEIGHTS, velocity_out=cache[4], out=x)

    update, step, multistep = (
        torch.compile(function, backend=compiler, fullgraph=True) for function in (update, step, multistep)
    )
    mine = x.clone()
    assert torch.equal(update(mine, velocities), expected[0]) and torch.equal(mine, expected[0])
    mine, v_cond = x.clone(), velocities[0].clone()
    step(mine, v_cond, velocities[1])
    assert torch.equal(mine, expected[1]) and torch.equal(v_cond, expected[2])
    mine, cache = x.clone(), velocities.clone()
    multistep(mine, cache)
    assert torch.equal(mine, expected[3]) and torch.equal(cache, torch.stack([*velocities[:4], expected[4]]))


def test_the_same_place_in_another_dtype_is_an_overlap():
    x, v = draw(*SHAPE), draw(*SHAPE, seed=1)
    with pytest.raises(ValueError, match="velocity_out and v_cond overlap.*a tensor of its own, or v_cond itself"):
        cfg_euler_step(x, v, v, 4.5, -0.1, velocity_out=v.view(torch.bfloat16).flatten()[:SIZE].view(SHAPE))


@pytest.mark.parametrize(
    "weights, read",
    [([0.5, -0.25], {0, 2}), ([0.5, 0.0], {0}), (torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, -0.25]]), {2})],
    ids=["both nodes", "a node of weight zero", "a node of one sample"],
)
def test_the_velocity_may_be_a_row_of_the_cache_that_is_not_read(weights, read, everywhere):
    x, v_cond, v_uncond, cache = draw(*SHAPE), draw(*SHAPE, seed=1), draw(*SHAPE, seed=2), draw(4, *SHAPE, seed=3)
    step = x, v_cond, v_uncond, 4.5, -0.1
    expected = cfg_multistep_step(*step, cache, [0, 2], weights)
    for row in range(4):
        mine = cache.clone()
        if row in read:
            with pytest.raises(ValueError, match=rf"velocity_out and velocities\[{row}\] overlap in memory"):
                cfg_multistep_step(*step, mine, [0, 2], weights, velocity_out=mine[row])
        else:
            x_next, _ = cfg_multistep_step(*step, mine, [0, 2], weights, velocity_out=mine[row])
            assert torch.equal(x_next, expected[0])
            assert torch.equal(mine, cache.index_copy(0, torch.tensor([row]), expected[1][None]))


def test_a_call_that_is_watched_is_checked_as_well():
    x, velocities = draw(*SHAPE), draw(5, *SHAPE, seed=1)
    with FlopCounterMode(display=False), pytest.raises(ValueError, match="out and velocities overlap"):
        quadrature_update(x, velocities, [0], [1.0], out=velocities[3])


def test_tensors_without_memory_overlap_nothing():
    x, velocities = torch.empty(SHAPE, device="meta"), torch.empty(5, *SHAPE, device="meta")
    out = torch.empty(SHAPE, device="meta")
    assert quadrature_update(x, velocities, [0], [1.0], out=out) is out
    nothing = torch.empty(0, 41)
    assert quadrature_update(nothing, nothing[None], [0], [1.0], out=torch.empty(0, 41)).shape == (0, 41)


def test_what_is_strided_is_copied_before_it_is_written_over():
    square, velocities = draw(9, 9), draw(2, 9, 9, seed=1)
    expected = quadrature_update(square.T.contiguous(), velocities, [0, 1], WEIGHTS)
    assert torch.equal(quadrature_update(square.T, velocities, [0, 1], WEIGHTS, out=square), expected)
