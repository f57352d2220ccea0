"""Machine instructions that numba has no word for, as LLVM writes them: what the engines' inner loops are made of.

Compiled loops are cached by their own file: after a change here touch kernels.py.
"""

from __future__ import annotations

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
