"""The names that safetensors and torch files give to the element types of tensors, and their sizes."""

from collections.abc import Collection

from bridge.errors import ConfigError

# Everywhere in bridge a dtype is torch's own name for it; these are the other spellings.
ITEM_SIZES: dict[str, int] = {
    "float64": 8,
    "float32": 4,
    "bfloat16": 2,
    "float16": 2,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "int64": 8,
    "int32": 4,
    "int16": 2,
    "int8": 1,
    "uint8": 1,
    "bool": 1,
}

FROM_SAFETENSORS: dict[str, str] = {
    "F64": "float64",
    "F32": "float32",
    "BF16": "bfloat16",
    "F16": "float16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
TO_SAFETENSORS: dict[str, str] = {name: code for code, name in FROM_SAFETENSORS.items()}

# torch pickles a tensor's dtype as the class of its storage; float8 has no such class.
FROM_STORAGE: dict[str, str] = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "BFloat16Storage": "bfloat16",
    "HalfStorage": "float16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
}
TO_STORAGE: dict[str, str] = {name: storage for storage, name in FROM_STORAGE.items()}

# The dtypes that model weights may have in both formats.
WEIGHT_DTYPES = ("float32", "bfloat16", "float16")

# Megatron Core keeps these in float32 whatever the model's dtype (megatron/core/transformer/moe/router.py).
FLOAT32_KEYS = ("mlp.router.expert_bias",)


def common_dtype(dtypes: Collection[str]) -> str:
    """Return the smallest dtype that holds every value of all of `dtypes` exactly."""
    return next(iter(dtypes)) if len(dtypes) == 1 else "float32"


def check_weight_dtype(dtype: str | None) -> None:
    """Refuse a dtype to cast to that weights cannot have."""
    if dtype is not None and dtype not in WEIGHT_DTYPES:
        raise ConfigError(f"dtype is {dtype!r}: allowed are {', '.join(WEIGHT_DTYPES)}")
