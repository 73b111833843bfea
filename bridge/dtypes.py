"""The names that safetensors and torch files give to the element types of tensors, and their sizes."""

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
