"""Machine instructions that numba has no word for, as LLVM writes them: what the engines' inner loops are made of.

Compiled loops are cached by their own file: after a change here touch kernels.py.
"""

from __future__ import annotations

from itertools import chain
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

CHUNK = 32  # scores compared at once: a machine word of bits


@intrinsic
def half(context: Any, value: Any) -> Any:
    """float16 bits as float32, exactly."""
    return types.float32(types.uint16), lambda ctx, b, sig, args: b.fpext(
        b.bitcast(args[0], ir.HalfType()), ir.FloatType()
    )


@intrinsic
def lowest_bit(context: Any, value: Any) -> Any:
    return types.uint32(types.uint32), lambda ctx, b, sig, args: b.cttz(args[0], cgutils.true_bit)


@intrinsic
def pointer(context: Any, address: Any) -> Any:
    return types.voidptr(types.int64), lambda ctx, b, sig, args: b.inttoptr(args[0], cgutils.voidptr_t)


@intrinsic
def prefetch(context: Any, address: Any) -> Any:
    """Ask for the cache line at an address before it is needed."""

    def generate(ctx: Any, b: Any, sig: Any, args: Any) -> Any:
        flag = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [cgutils.voidptr_t, flag, flag, flag])
        function = cgutils.get_or_insert_function(b.module, kind, "llvm.prefetch.p0")
        b.call(function, [b.inttoptr(args[0], cgutils.voidptr_t), flag(0), flag(3), flag(1)])
        return ctx.get_dummy_value()

    return types.void(types.int64), generate


def _vector(kind: Any) -> Any:
    return ir.VectorType(kind, CHUNK)


def _load(b: Any, address: Any, kind: Any) -> Any:
    return b.load(b.inttoptr(address, _vector(kind).as_pointer()), align=4)


def _splat(b: Any, value: Any) -> Any:
    one = b.insert_element(ir.Constant(_vector(value.type), ir.Undefined), value, ir.IntType(32)(0))
    return b.shuffle_vector(one, one, ir.Constant(_vector(ir.IntType(32)), [0] * CHUNK))


def _passing(b: Any, products: Any, scale: Any, floor: Any) -> Any:
    """Bit j of a uint32: whether int32 product j x scale (float32) reaches the floor; values or vectors of CHUNK."""
    scores = b.fmul(b.sitofp(_load(b, products, ir.IntType(32)), _vector(ir.FloatType())), scale)
    return b.bitcast(b.fcmp_ordered(">=", scores, floor), ir.IntType(CHUNK))


@intrinsic
def passing_one_floor(context: Any, products: Any, scales: Any, floor: Any) -> Any:
    """CHUNK products at an address, each x its own scale (address) against one floor."""
    return types.uint32(types.int64, types.int64, types.float32), lambda ctx, b, sig, args: _passing(
        b, args[0], _load(b, args[1], ir.FloatType()), _splat(b, args[2])
    )


@intrinsic
def passing_one_scale(context: Any, products: Any, scale: Any, floors: Any) -> Any:
    """CHUNK products at an address, x one scale, each against its own floor (address)."""
    return types.uint32(types.int64, types.float32, types.int64), lambda ctx, b, sig, args: _passing(
        b, args[0], _splat(b, args[1]), _load(b, args[2], ir.FloatType())
    )


ROWS, COLUMNS, STEP = 4, 2, 16  # codes of both sides whose products are summed in registers, and numbers at a time


def _sums_of_pairs(b: Any, x: Any, y: Any) -> Any:
    """Of int8 vectors of STEP numbers the products of the even places plus those of the odd ones, int32: LLVM has one
    instruction for that on all x86."""
    number, half = ir.IntType(32), STEP // 2
    wide = ir.VectorType(number, STEP)
    both = b.mul(b.sext(x, wide), b.sext(y, wide))
    places = ir.VectorType(number, half)
    even, odd = (b.shuffle_vector(both, both, ir.Constant(places, [*range(at, STEP, 2)])) for at in (0, 1))
    return b.add(even, odd)


@intrinsic
def block_products(
    context: Any, a: Any, a_row: Any, other: Any, other_row: Any, width: Any, out: Any, out_row: Any
) -> Any:
    """Products of ROWS codes int8 [width] at address a, a_row bytes apart, with COLUMNS at another: int32, to `out`.

    width: a multiple of STEP.
    """

    def generate(ctx: Any, b: Any, sig: Any, args: Any) -> Any:
        place, number = ir.IntType(64), ir.IntType(32)
        sums = ir.VectorType(number, STEP // 2)
        a, a_row, other, other_row, width, out, out_row = args
        rows = [b.add(a, b.mul(a_row, place(i))) for i in range(ROWS)]
        columns = [b.add(other, b.mul(other_row, place(j))) for j in range(COLUMNS)]
        before, loop, done = b.block, b.append_basic_block("step"), b.append_basic_block("done")
        b.branch(loop)
        b.position_at_end(loop)
        at = b.phi(place)
        at.add_incoming(place(0), before)
        total = [[b.phi(sums) for _ in columns] for _ in rows]

        def read(address: Any) -> Any:
            kind = ir.VectorType(ir.IntType(8), STEP)
            return b.load(b.inttoptr(b.add(address, at), kind.as_pointer()), align=1)

        own, others = [read(row) for row in rows], [read(column) for column in columns]
        new = [
            [b.add(sum_, _sums_of_pairs(b, x, y)) for sum_, y in zip(row, others, strict=True)]
            for row, x in zip(total, own, strict=True)
        ]
        after = b.add(at, place(STEP))
        at.add_incoming(after, loop)
        for sum_, next_ in zip(chain(*total), chain(*new), strict=True):
            sum_.add_incoming(ir.Constant(sums, [0] * (STEP // 2)), before)
            sum_.add_incoming(next_, loop)
        b.cbranch(b.icmp_signed("<", after, width), loop, done)
        b.position_at_end(done)
        added = cgutils.get_or_insert_function(
            b.module, ir.FunctionType(number, [sums]), f"llvm.vector.reduce.add.v{STEP // 2}i32"
        )
        for i, row in enumerate(new):
            for j, sum_ in enumerate(row):
                address = b.add(out, b.add(b.mul(out_row, place(i)), place(4 * j)))
                b.store(b.call(added, [sum_]), b.inttoptr(address, number.as_pointer()))
        return ctx.get_dummy_value()

    return types.void(*[types.int64] * 7), generate
