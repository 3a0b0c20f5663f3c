"""Changes to files: any JSON field, any tensor, any byte."""

import copy
import json

import ml_dtypes
import numpy as np
from fuzzing import one_of
from hypothesis import strategies as st

# What JSON can hold, and a reader may not expect.
ODD_JSON = st.one_of(
    one_of(
        *(None, True, False, 0, 1, 2, 3, -1, 2**31, 2**63, 10**30, 10**400),
        *(0.5, 1.0, 2.0, -0.5, 1e-30, 1e30, 1e300, 5e-324),
        *("", "2", "0.5", "true", "nan", "LoRA", "AdaLoRA", "DoRA", "first"),
        *([], {}, [1], [[1]], ["first"], [True, False], {"first": 2}),
        *({"first": [1]}, {"": 0}, "\ud800", "é", "(", 3000 * "x"),
    ),
    st.integers(),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=4),
    st.recursive(
        one_of(None, True, 1, 0.5, "a"),
        lambda inner: st.one_of(
            st.lists(inner, max_size=2),
            st.dictionaries(one_of("first", "a"), inner, max_size=2),
        ),
        max_leaves=3,
    ),
)


def places(value, path=()):
    """Yield the path of each value inside a nested one."""
    if path:
        yield path
    if isinstance(value, dict):
        for key in value:
            yield from places(value[key], (*path, key))
    if isinstance(value, list):
        for index in range(len(value)):
            yield from places(value[index], (*path, index))


def changed_json(draw, value):
    """Return a copy with one to three values or keys changed."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 3))):
        paths = list(places(value))
        if not paths:
            break
        *outer, last = draw(st.sampled_from(paths), label="place")
        inside = value
        for key in outer:
            inside = inside[key]
        kind = draw(one_of("replace", "replace", "remove", "rename", "nest"))
        if kind == "remove":
            del inside[last]
        elif kind == "rename" and isinstance(inside, dict):
            inside[draw(st.text(max_size=4))] = inside.pop(last)
        elif kind == "nest":
            inside[last] = draw(one_of([inside[last]], {"a": inside[last]}))
        else:
            # What a strategy gives it gives again: it is not to be changed.
            inside[last] = copy.deepcopy(draw(ODD_JSON, label="value"))
    return value


# What `json` reads, or does not, and `json.dumps` does not write.
ODD_TEXTS = (
    *("NaN", "Infinity", "1e999", "-1e999", 5000 * "9", "0.1e-9999", "0x1"),
    *(9999 * "[", '{"a": 1, "a": 2}', "", '"\\ud800"', "'x'", "01", "2 2"),
)


def changed_text(draw, value):
    """Return JSON with a value that only text can have, as bytes."""
    value = copy.deepcopy(value)
    *outer, last = draw(st.sampled_from(list(places(value))))
    inside = value
    for key in outer:
        inside = inside[key]
    inside[last] = "@@"
    return json.dumps(value).replace('"@@"', draw(st.sampled_from(ODD_TEXTS)))


def changed_tensors(draw, tensors):
    """Return a copy with a tensor renamed, reshaped, cast, lost or new."""
    tensors = dict(tensors)
    name = draw(st.sampled_from(sorted(tensors)), label="tensor")
    array = tensors[name]
    kind = draw(one_of("name", "shape", "cast", "lose", "add", "values"))
    if kind == "lose":
        del tensors[name]
    elif kind == "name":
        tensors[draw(one_of("", "x", f"{name}/", name[1:]))] = tensors.pop(name)
    elif kind == "shape":
        shapes = [
            (-1,),
            (1, *array.shape),
            array.shape[::-1],
            (*array.shape, 1),
        ]
        tensors[name] = array.reshape(draw(st.sampled_from(shapes)))
        if tensors[name].ndim and draw(st.booleans()):
            tensors[name] = tensors[name][:-1]
    elif kind == "cast":
        dtypes = "float16", "float64", "int32", "bool", "uint8", "int64"
        dtypes += (ml_dtypes.bfloat16,)
        dtype = draw(st.sampled_from(dtypes))
        with np.errstate(over="ignore", invalid="ignore"):
            tensors[name] = array.astype(dtype)
    elif kind == "add":
        names = "x", f"{name}_1", "adapters/third/lora_kernel_a", "head//bias"
        tensors[draw(st.sampled_from(names))] = array
    elif array.size:
        odd = draw(one_of(np.nan, np.inf, -np.inf, 1e30, -1, 0))
        array = array.copy()
        with np.errstate(invalid="ignore"):
            array.flat[0] = np.array(odd).astype(array.dtype)
        tensors[name] = array
    return tensors


def changed_bytes(draw, data):
    """Return bytes with some flipped, lost, added, or a header that lies."""
    place = st.integers(0, max(len(data) - 1, 0))
    first, last = sorted([draw(place), draw(place)])
    few = draw(st.binary(min_size=1, max_size=9))
    length = draw(one_of(0, 1, 7, len(data), 2**32, 2**63, 2**64 - 1))
    return draw(
        one_of(
            *(data[:first], data[first:], data[:first] + data[last:]),
            *(data[:first] + few + data[first:], data + few, few, b""),
            data[:first] + few + data[first + len(few) :],
            length.to_bytes(8, "little") + data[8:],
        )
    )
