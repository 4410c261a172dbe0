"""The loops that numba compiles: each goes once over a slice, in blocks that stay in the processor's first cache.

Arrays are flat and contiguous; weights come as stored, float32 or the 16 bits of a bfloat16 (uint16). Every float32
operation is rounded as torch rounds it, in the same order (no contraction, no reassociation), and integer sums do not
depend on order, so that the bytes are those of the torch functions which call these through `kernels`.

Two habits here let the compiler use vector instructions. Indices run from 0 over array slices: for all the compiler can
prove, the index in `array[first + j]` might be negative. And what is kept or dropped is never stored over its own
array: that becomes a masked store, which costs some processors ten times as much.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit, types
from numba.extending import overload

from lowmem_aim.methods.compiled_code import compiled

BLOCK = 1024  # elements; three experts' parts, signs and sums of a block take some 32 KB
# A bin of an exact sum counts units of 2^(index - BIN_ZERO): products of two float32 reach from 2^-298 to 2^256.
BINS = 720
BIN_ZERO = 440
# Kinds of `kernels.Selected`: everything, a random share, the largest magnitudes, or those between two thresholds.
ALL, RANDOM, LARGEST, BETWEEN = 0, 1, 2, 3

U32, I32, I64, F32, F64 = np.uint32, np.int32, np.int64, np.float32, np.float64
_MAGNITUDE = U32(0x7FFFFFFF)
_TERM_BITS = 50  # of a term's leading bits that one round of `_add_exactly` takes: 2^50 * BLOCK fits 63 bits
_HALF = 31  # bits of the lower half of a block's sum
_LOWEST = _TERM_BITS - BIN_ZERO  # below this exponent there is no bin
_DIGIT_BITS = 11  # three digits hold the 31 bits of a magnitude
_DIGITS = 1 << _DIGIT_BITS
COLUMNS = 1024  # in work at a time, so that their sums stay in the processor's cache

inner: Any = njit(nogil=True, error_model="numpy")


def _wide(stored):
    """A stored weight as float32."""
    raise NotImplementedError("compiled code only")


@overload(_wide, inline="always")
def _wide_overload(stored):
    if stored == types.uint16:
        return lambda stored: U32(U32(stored) << U32(16)).view(np.float32)
    return lambda stored: stored


@inner
def _magnitude(x):
    return U32(F32(x).view(np.uint32) & _MAGNITUDE)


@inner
def _mix(x):
    """A 32-bit word mixed as in `masks._mix`."""
    x = U32(x ^ (x >> U32(16)))
    x = U32(x * U32(0x7FEB352D))
    x = U32(x ^ (x >> U32(15)))
    x = U32(x * U32(0x846CA68B))
    return U32(x ^ (x >> U32(16)))


@inner
def _draw(counter, key0, key1):
    """The draw for one counter, as in `masks._draws`."""
    return I32(_mix(U32(_mix(U32(counter ^ key0)) + key1)))


@inner
def _delta(base, expert, out):
    for j in range(out.size):
        out[j] = _wide(expert[j]) - _wide(base[j])


# --- combines -------------------------------------------------------------------------------------------------------


@compiled
def weighted_sum(models, weights, out):
    """out = w1 T1 + w2 T2 + ..., in that order. `models` is a tuple of arrays, `weights` float32."""
    for first in range(0, out.size, BLOCK):
        stop = min(first + BLOCK, out.size)
        total = out[first:stop]
        for i in range(len(models)):
            model = models[i][first:stop]
            weight = weights[i]
            if i == 0:
                for j in range(total.size):
                    total[j] = _wide(model[j]) * weight
            else:
                for j in range(total.size):
                    total[j] = total[j] + _wide(model[j]) * weight


@inner
def _part(base, expert, scale, kind, keep, offset, out):
    """out = delta * scale where the element is kept, else 0. `keep` are the numbers of `kernels.Selected`."""
    if kind == ALL:
        for j in range(out.size):
            out[j] = (_wide(expert[j]) - _wide(base[j])) * scale
    elif kind == RANDOM:
        low, key0, key1, limit = U32(keep[0] + offset), U32(keep[1]), U32(keep[2]), I32(keep[3])
        for j in range(out.size):
            part = (_wide(expert[j]) - _wide(base[j])) * scale
            out[j] = part if _draw(U32(U32(j) + low), key0, key1) < limit else F32(0)
    elif kind == BETWEEN:
        _part_between(base, expert, scale, keep, offset, out)
    else:
        # Equal magnitudes stay as far as keep[1] elements into the slice.
        equals = min(max(keep[1] - offset, 0), out.size)
        _part_above(base[:equals], expert[:equals], scale, I32(keep[0] - 1), out[:equals])
        _part_above(base[equals:], expert[equals:], scale, I32(keep[0]), out[equals:])


@inner
def _part_above(base, expert, scale, threshold, out):
    for j in range(out.size):
        delta = _wide(expert[j]) - _wide(base[j])
        out[j] = delta * scale if I32(_magnitude(delta)) > threshold else F32(0)


@inner
def _part_between(base, expert, scale, keep, offset, out):
    """out = delta * scale between two thresholds, else 0.

    keep[0] and keep[1] are those of the largest that stay, keep[2] and keep[3] those of the ones too large to stay.
    """
    for j in range(out.size):
        delta = _wide(expert[j]) - _wide(base[j])
        magnitude, place = I64(_magnitude(delta)), I64(j) + offset
        reaches = magnitude > keep[0] - I64(place < keep[1])
        exceeds = magnitude > keep[2] - I64(place < keep[3])
        out[j] = delta * scale if reaches and not exceeds else F32(0)


@inner
def _elect(parts, weights, total, sign, divisor):
    """total, divisor = sums over the parts that have the elected sign: of the parts, and of their weights.

    The elected sign is that of the sum of all parts, which `total` holds before; + where the sum is 0.
    """
    for j in range(total.size):
        sign[j] = F32(1) if total[j] >= F32(0) else F32(-1)
    for j in range(total.size):
        total[j] = F32(0)
        divisor[j] = F32(0)
    for i in range(parts.shape[0]):
        part = parts[i][: total.size]
        weight = weights[i]
        for j in range(total.size):
            agrees = part[j] * sign[j] > F32(0)
            total[j] = total[j] + (part[j] if agrees else F32(0))
            divisor[j] = divisor[j] + (weight if agrees else F32(0))


@compiled
def combine_deltas(base, experts, kinds, keeps, scales, weights, elect, per_element, factor, lambda_, zero_weight, out):
    """out = one slice of `task_vectors.combine_deltas`, the combine of the task-vector family.

    For K experts: kinds (K,) and keeps (K, 4) int64, scales and weights (K,) float32. `elect`: signs are elected;
    `per_element`: then divide by the weights that took part; without it, multiply by `factor`.
    """
    count = len(experts)
    all_parts = np.empty((count, BLOCK), F32)
    all_total, all_sign, all_divisor = np.empty(BLOCK, F32), np.empty(BLOCK, F32), np.empty(BLOCK, F32)
    for first in range(0, out.size, BLOCK):
        stop = min(first + BLOCK, out.size)
        size = stop - first
        base_block, total, divisor = base[first:stop], all_total[:size], all_divisor[:size]
        for i in range(count):
            part = all_parts[i][:size]
            _part(base_block, experts[i][first:stop], scales[i], kinds[i], keeps[i], first, part)
            if i == 0:
                for j in range(size):
                    total[j] = part[j]
            else:
                for j in range(size):
                    total[j] += part[j]
        if elect:
            _elect(all_parts, weights, total, all_sign[:size], divisor)
        if elect and per_element:
            for j in range(size):
                weight = divisor[j]
                total[j] = total[j] / (weight if abs(weight) >= zero_weight else F32(1))
        result = out[first:stop]
        for j in range(size):
            result[j] = total[j] * factor * lambda_ + _wide(base_block[j])


# --- the end of every merge: relaxation, the one rounding, the check --------------------------------------------------


@compiled
def relax(merged, base, shrink):
    """merged = `relaxing.aim.relax` of it, in place; `shrink` repeats after its length."""
    period = shrink.size
    for first in range(0, merged.size, period):
        stop = min(first + period, merged.size)
        _relax(merged[first:stop], base[first:stop], shrink)


@inner
def _relax(merged, base, shrink):
    for j in range(merged.size):
        origin, end, s = _wide(base[j]), merged[j], shrink[j]
        from_base = s > F32(0.5)
        delta = (end - origin) * (F32(1) - s if from_base else -s)
        merged[j] = delta + (origin if from_base else end)


@compiled
def round_to_bfloat16(merged, out):
    """out = `merged` rounded to the nearest bfloat16, ties to even.

    Returns the largest magnitude's bits: 0x7F80 and above is not finite.
    """
    largest = np.uint16(0)
    for j in range(merged.size):
        bits = F32(merged[j]).view(np.uint32)
        up = U32(U32(bits >> U32(16)) & U32(1))
        rounded = np.uint16(U32(bits + U32(0x7FFF) + up) >> U32(16))
        out[j] = rounded
        largest = max(largest, np.uint16(rounded & np.uint16(0x7FFF)))
    return largest


@compiled
def largest_magnitude(stored):
    """The bits of the largest |x| of an unsigned view (uint16 or uint32) of float data; NaN and Inf are the largest."""
    largest = stored.dtype.type(0)
    mask = stored.dtype.type(-1) >> stored.dtype.type(1)
    for j in range(stored.size):
        largest = max(largest, stored.dtype.type(stored[j] & mask))
    return largest


# --- counting magnitudes ----------------------------------------------------------------------------------------------


@compiled
def count_upper(base, expert, low_bits, counts):
    """counts[|delta| bits >> low_bits] += 1."""
    block = np.empty(BLOCK, F32)
    for first in range(0, base.size, BLOCK):
        stop = min(first + BLOCK, base.size)
        delta = block[: stop - first]
        _delta(base[first:stop], expert[first:stop], delta)
        for j in range(delta.size):
            counts[_magnitude(delta[j]) >> U32(low_bits)] += 1


@compiled
def collect(base, expert, low_bits, upper, places, bits):
    """places, bits = indices and bits of the elements whose |delta| bits >> low_bits are `upper`, in order.

    Returns how many there are.
    """
    block = np.empty(BLOCK, F32)
    wanted = U32(upper)
    found = 0
    for first in range(0, base.size, BLOCK):
        stop = min(first + BLOCK, base.size)
        delta = block[: stop - first]
        _delta(base[first:stop], expert[first:stop], delta)
        some = I32(0)
        for j in range(delta.size):
            some += I32(U32(_magnitude(delta[j]) >> U32(low_bits)) == wanted)
        if some:
            for j in range(delta.size):
                magnitude = _magnitude(delta[j])
                if U32(magnitude >> U32(low_bits)) == wanted:
                    places[found] = first + j
                    bits[found] = magnitude
                    found += 1
    return found


# --- ranks ------------------------------------------------------------------------------------------------------------


@compiled
def row_ranks(magnitudes, columns, ranks):
    """ranks = the place of each element in its sorted row, from 0; equal ones in their order.

    A radix sort, from the lowest digit on.
    """
    keys, moved_keys = np.empty(columns, I32), np.empty(columns, I32)
    order, moved_order = np.empty(columns, I32), np.empty(columns, I32)
    starts = np.empty(_DIGITS, I32)
    for first in range(0, magnitudes.size, columns):
        for j in range(columns):
            keys[j] = magnitudes[first + j]
            order[j] = j
        for shift in (0, _DIGIT_BITS, 2 * _DIGIT_BITS):
            starts[:] = 0
            for j in range(columns):
                starts[(keys[j] >> shift) & (_DIGITS - 1)] += 1
            below = I32(0)
            for digit in range(_DIGITS):
                below, starts[digit] = below + starts[digit], below
            for j in range(columns):
                digit = (keys[j] >> shift) & (_DIGITS - 1)
                place = starts[digit]
                starts[digit] = place + 1
                moved_keys[place] = keys[j]
                moved_order[place] = order[j]
            keys, moved_keys = moved_keys, keys
            order, moved_order = moved_order, order
        for j in range(columns):
            ranks[first + order[j]] = j


# --- exact sums -------------------------------------------------------------------------------------------------------


@inner
def _exponent(magnitude_bits):
    """An e such that a float32 of these bits is below 2^e; the smallest, unless it is subnormal."""
    return max(I64(magnitude_bits >> U32(23)), 1) - 126


@inner
def _add_to_bins(bins, unit, total):
    """bins += total * 2^unit, in two halves so that no bin ever overflows."""
    bins[unit + BIN_ZERO] += total & ((1 << _HALF) - 1)
    bins[unit + _HALF + BIN_ZERO] += total >> _HALF


@inner
def _add_exactly(terms, exponent, bins):
    """bins += sum of the float64 `terms`, each below 2^exponent in magnitude; the terms are overwritten.

    The method is that of `exact`: adding and subtracting 1.5 * 2^(52 + unit) cuts off a term's bits from 2^unit up, and
    the sum's own bits count them as an integer. Almost always one round takes all there is.
    """
    left = I64(1)
    while left != 0 and exponent >= _LOWEST:  # the exponent ends the loop for terms that are not finite
        unit = exponent - _TERM_BITS
        cutter = np.ldexp(F64(1.5), 52 + unit)
        zero = F64(cutter).view(np.int64)
        total, left = I64(0), I64(0)
        for j in range(terms.size):
            term = terms[j]
            shifted = term + cutter
            total += F64(shifted).view(np.int64) - zero
            rest = term - (shifted - cutter)
            terms[j] = rest
            left |= F64(abs(rest)).view(np.int64)
        _add_to_bins(bins, unit, total)
        exponent = unit


@compiled
def absolute_sums(base, expert, kind, keep, whole, kept):
    """bins whole += sum |delta|, bins kept += sum |delta| over what the selection keeps."""
    all_deltas, all_stay = np.empty(BLOCK, F32), np.empty(BLOCK, F32)
    for first in range(0, base.size, BLOCK):
        stop = min(first + BLOCK, base.size)
        deltas, stay = all_deltas[: stop - first], all_stay[: stop - first]
        _delta(base[first:stop], expert[first:stop], deltas)
        _part(base[first:stop], expert[first:stop], F32(1), kind, keep, first, stay)
        _add_both_exactly(deltas, stay, whole, kept)


@inner
def _add_both_exactly(deltas, stay, whole, kept):
    """bins += exact sums of |deltas|: `whole` of all, `kept` of those that are not zero in `stay`.

    `deltas` are overwritten. The method is that of `_add_exactly`.
    """
    largest = U32(0)
    for j in range(deltas.size):
        deltas[j] = abs(deltas[j])
        largest = max(largest, _magnitude(deltas[j]))
    exponent = _exponent(largest)
    left = I64(1)
    while left != 0 and exponent >= _LOWEST:
        unit = exponent - _TERM_BITS
        cutter = np.ldexp(F64(1.5), 52 + unit)
        zero = F64(cutter).view(np.int64)
        all_total, kept_total, left = I64(0), I64(0), I64(0)
        for j in range(deltas.size):
            term = F64(deltas[j])
            shifted = term + cutter
            units = F64(shifted).view(np.int64) - zero
            all_total += units
            kept_total += units if stay[j] != F32(0) else I64(0)
            rest = F32(term - (shifted - cutter))  # exact: no more bits than the term had
            deltas[j] = rest
            left |= I64(F32(abs(rest)).view(np.int32))
        _add_to_bins(whole, unit, all_total)
        _add_to_bins(kept, unit, kept_total)
        exponent = unit


@compiled
def gram_sums(models, origin, bins):
    """bins[p] += the dot product of the p-th pair of vectors, i <= j by rows; float64 holds each product exactly.

    The vectors are the models, or, unless `origin` is empty, their differences from it.
    """
    count = len(models)
    all_vectors, all_products = np.empty((count, BLOCK), F32), np.empty(BLOCK, F64)
    high = np.empty(count, I64)
    for first in range(0, models[0].size, BLOCK):
        stop = min(first + BLOCK, models[0].size)
        products = all_products[: stop - first]
        for i in range(count):
            vector = all_vectors[i][: stop - first]
            if origin.size:
                _delta(origin[first:stop], models[i][first:stop], vector)
            else:
                _widen(models[i][first:stop], vector)
            largest = U32(0)
            for j in range(vector.size):
                largest = max(largest, _magnitude(vector[j]))
            high[i] = _exponent(largest)
        pair = 0
        for i in range(count):
            for k in range(i, count):
                _products(all_vectors[i][: stop - first], all_vectors[k][: stop - first], products)
                _add_exactly(products, high[i] + high[k], bins[pair])
                pair += 1


@inner
def _widen(stored, out):
    for j in range(out.size):
        out[j] = _wide(stored[j])


@inner
def _products(left, right, out):
    for j in range(out.size):
        out[j] = F64(left[j]) * F64(right[j])


# --- dot products of rows and of columns ------------------------------------------------------------------------------


@compiled
def row_dots(left, right, out):
    """out[r] = the dot product of the r-th rows of two float32 arrays.

    Halves are added to halves, in the order of `gram.row_sums`.
    """
    columns = left.size // out.size
    terms = np.empty(columns, F64)
    for row in range(out.size):
        first = row * columns
        _products(left[first : first + columns], right[first : first + columns], terms)
        size = columns
        while size > 1:
            half = (size + 1) // 2
            lower, upper = terms[: size - half], terms[half:size]
            for j in range(lower.size):
                lower[j] += upper[j]
            size = half
        out[row] = terms[0]


@inner
def _other(origin, model, deltas, out):
    """out = the model, or its difference from `origin`."""
    if deltas:
        _delta(origin, model, out)
    else:
        _widen(model, out)


@compiled
def column_tops(origin, models, deltas, tops):
    """tops (1 + K, columns) = the largest magnitude's bits in each column of `origin` and of the models or deltas."""
    columns = tops.shape[1]
    vector = np.empty(columns, F32)
    for first in range(0, origin.size, columns):
        stop = first + columns
        _widen(origin[first:stop], vector)
        _raise(tops[0], vector)
        for i in range(len(models)):
            _other(origin[first:stop], models[i][first:stop], deltas, vector)
            _raise(tops[1 + i], vector)


@inner
def _raise(tops, vector):
    for j in range(tops.size):
        tops[j] = max(tops[j], _magnitude(vector[j]))


@compiled
def column_dots(origin, models, deltas, cutters, totals):
    """totals (1 + 2K, columns) += the bits of term + cutter, for the terms a a, and d d and a d for each model d.

    a is the origin. See `methods.columns`.
    """
    columns = totals.shape[1]
    all_origin, all_other = np.empty(COLUMNS, F32), np.empty(COLUMNS, F32)
    for left in range(0, columns, COLUMNS):
        width = min(COLUMNS, columns - left)
        first_row, other = all_origin[:width], all_other[:width]
        for first in range(left, origin.size, columns):
            stop = first + width
            _widen(origin[first:stop], first_row)
            _add_terms(first_row, first_row, cutters[0][left : left + width], totals[0][left : left + width])
            for i in range(len(models)):
                _other(origin[first:stop], models[i][first:stop], deltas, other)
                for k, vector in ((1 + 2 * i, other), (2 + 2 * i, first_row)):
                    _add_terms(other, vector, cutters[k][left : left + width], totals[k][left : left + width])


@inner
def _add_terms(left, right, cutters, totals):
    for j in range(totals.size):
        totals[j] += F64(F64(left[j]) * F64(right[j]) + cutters[j]).view(np.int64)


@compiled
def scaled_deltas(base, experts, scales, by_row, columns, out):
    """out = W0 + s1 D1 + s2 D2 + ...; `scales` (K, rows) if `by_row`, else (K, columns), float32."""
    for first in range(0, out.size, columns):
        stop = first + columns
        origin, total = base[first:stop], out[first:stop]
        row = first // columns
        for i in range(len(experts)):
            expert = experts[i][first:stop]
            if by_row:
                scale = scales[i][row]
                if i == 0:
                    for j in range(columns):
                        total[j] = (_wide(expert[j]) - _wide(origin[j])) * scale
                else:
                    for j in range(columns):
                        total[j] += (_wide(expert[j]) - _wide(origin[j])) * scale
            else:
                own = scales[i]
                if i == 0:
                    for j in range(columns):
                        total[j] = (_wide(expert[j]) - _wide(origin[j])) * own[j]
                else:
                    for j in range(columns):
                        total[j] += (_wide(expert[j]) - _wide(origin[j])) * own[j]
        for j in range(columns):
            total[j] += _wide(origin[j])


# --- low-rank changes -----------------------------------------------------------------------------------------------


@compiled
def with_low_rank(stored, left, right, scaling, by_row, by_column, out):
    """out = (stored + scaling * left right) * factors, in float64, each product added in the order of the rank.

    `left` is (rows, rank), `right` (rank, columns); one of `by_row` and `by_column` has the factors, or both are empty.
    """
    rows, columns = left.shape[0], right.shape[1]
    sums = np.empty(BLOCK, F64)
    # Columns outside, rows inside: the block of `right` stays in the processor's second cache.
    for first in range(0, columns, BLOCK):
        stop = min(first + BLOCK, columns)
        total = sums[: stop - first]
        for i in range(rows):
            _dot_block(left[i], right, first, total)
            weight = stored[i * columns + first : i * columns + stop]
            result = out[i * columns + first : i * columns + stop]
            if by_row.size:
                factor = by_row[i]
                for j in range(total.size):
                    result[j] = F32((F64(_wide(weight[j])) + total[j] * scaling) * factor)
            elif by_column.size:
                factors = by_column[first:stop]
                for j in range(total.size):
                    result[j] = F32((F64(_wide(weight[j])) + total[j] * scaling) * factors[j])
            else:
                for j in range(total.size):
                    result[j] = F32(F64(_wide(weight[j])) + total[j] * scaling)


@inner
def _dot_block(left, right, start, total):
    """total = left[0] right[0] + left[1] right[1] + ..., from column `start` on.

    The products are added in that order, four at a time, so that sums are stored less often.
    """
    rank, stop = left.size, start + total.size
    for j in range(total.size):
        total[j] = 0.0
    for k in range(0, rank - rank % 4, 4):
        a, b, c, d = F64(left[k]), F64(left[k + 1]), F64(left[k + 2]), F64(left[k + 3])
        # A row first, then its part: for a part of the matrix the compiler would not know that rows are contiguous.
        first, second = right[k][start:stop], right[k + 1][start:stop]
        third, fourth = right[k + 2][start:stop], right[k + 3][start:stop]
        for j in range(total.size):
            one = total[j] + a * F64(first[j])
            two = one + b * F64(second[j])
            three = two + c * F64(third[j])
            total[j] = three + d * F64(fourth[j])
    for k in range(rank - rank % 4, rank):
        a = F64(left[k])
        first = right[k][start:stop]
        for j in range(total.size):
            total[j] = total[j] + a * F64(first[j])


@compiled
def add_column_squares(rows, totals):
    """totals[j] += rows[i, j]^2, row by row; a square of a float32 is exact in float64."""
    for i in range(rows.shape[0]):
        row = rows[i]
        for j in range(totals.size):
            value = F64(row[j])
            totals[j] = totals[j] + value * value
