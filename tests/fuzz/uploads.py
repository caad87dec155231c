"""Uploads gone wrong: valid adapter files and configurations, each with a few mutations.

An `Upload` is what a client would send: the bytes of a safetensors file and the text of a configuration. Mutations act
on the parts of a file before it is put together (names, dtypes, shapes, offsets, metadata), or on its bytes.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from hypothesis import strategies as st

from tests.support.tiny_models import random_adapter

Draw = Callable[[st.SearchStrategy[Any]], Any]

DIGITS = "<thousands of digits>"
NESTED = "<nested>"
EXPRESSIONS = (
    *("(a+)+$", "(.*)*x", "(.*.*)*=", "((.*)*)*y", r"(\w+\.)*q_proj$!", r"(.|\.)*\1x", "(?:(?:.?){8}){8}", ".*" * 200),
    *("(?:a?){64}", "a{1000}", "a{9999999999}", "(" * 60 + ")" * 60, "(" * 4000, "[", "*", "\\", ")", "(?#", "(?x)#"),
    *(
        "x|y",
        "|",
        "layers|h",
        "q_proj|",
        "a|" * 1000,
        "(?i)Q_PROJ",
        "(?R)",
        "(?1)",
        "[[:alpha:]]",
        "[a&&b]",
        r"\p{L}",
        r"(?<=.*)a",
    ),
    *(
        "(?P<x>a)(?P<x>b)",
        "(?P<x>.)",
        "()",
        "$",
        "^",
        "\x00",
        "\ud800",
        ".*",
        "q_proj",
        "all-linear",
        "[é-\U0010ffff]" * 400,
        "(?i)" + r"[a-\U0010ffff]" * 250,
        "[^.]*",
        "é" * 9000,
    ),
)
VALUES = (
    *(None, True, False, 0, -1, 1, 2, 3, 2**20, 2**20 + 1, 2**31, 2**63, 2**64, 10**12, 10**30, 10**400),
    *(-0.0, 0.5, 1e-320, 1e30, 1e38, 1e308, float("inf"), float("-inf"), float("nan")),
    *("", "x", "lora", "none", "4", "a" * 5000, "\ud800", "\x00", "😀", DIGITS, NESTED),
    *([], [[]], {}, {"": 1}, [None], ["q_proj"], ["q_proj"] * 3, [1, 2], [True], [-1], {"q_proj": 3}, {"q_proj": None}),
)
STRANGE = st.sampled_from(VALUES).map(copy.deepcopy)
"""Copies, since a later mutation may change what is inside."""
DTYPES = ("F32", "F16", "BF16", "F64", "I64", "BOOL", "F8_E4M3", "F4", "U8", "f32", "F128", "", "\x00", None, 5, [])
DIMENSIONS = (0, 1, 2, 3, 32, 64, 2**31, 10**12, 2**62, 2**63, 2**64, -1, 1.5, 1e30, True, "8", None, [])
NAMES = (
    *("", ".", "...", "x", "__metadata__", "lora_A.weight", ".lora_a", "model.lora_A.weight", "😀", "\x00", "a" * 9000),
    *(
        "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight",
        "\n",
        "model.layers.0.self_attn.q_proj.m",
    ),
    *("base_model.model.model.layers.99.self_attn.q_proj.lora_A.weight", "model.layers.0.self_attn.q_proj.lora_a"),
    *("base_model.model.lm_head.lora_A.weight", "base_model.model.model.embed_tokens.lora_embedding_A"),
)
LENGTHS = (0, 1, 7, 2, 100, 2**31, 2**32 + 8, 10**8 + 1, 2**63 - 1, 2**63, 2**64 - 1)
BITS = tuple(
    np.array([np.nan, np.inf, -np.inf, 3.4e38, 1e-45, -0.0], np.float32).tobytes()[4 * i :][:4] for i in range(6)
)
PEFT_FIELDS = (
    *("peft_type", "r", "lora_alpha", "use_rslora", "use_dora", "target_modules", "exclude_modules", "rank_pattern"),
    *("alpha_pattern", "layers_to_transform", "layers_pattern", "init_lora_weights", "bias", "modules_to_save", "kind"),
    *("fan_in_fan_out", "lora_bias", "trainable_token_indices", "target_parameters", "auto_mapping", "unknown"),
)
MLX_FIELDS = ("fine_tune_type", "num_layers", "lora_parameters", "use_dora", "kind", "adapter_path", "unknown")
MLX_PARAMETERS = ("rank", "scale", "dropout", "keys", "unknown")
KINDS: tuple[tuple[Literal["peft", "mlx"], bool, bool], ...] = (
    *(
        ("peft", False, False),
        ("peft", False, True),
        ("peft", True, False),
        ("mlx", False, False),
        ("mlx", True, False),
    ),
    ("peft", True, True),
)
"""Format, whether it is DoRA, whether it is rsLoRA."""
NAMING = ("target_modules", "exclude_modules", "layers_pattern")
TABLES = ("rank_pattern", "alpha_pattern")


@dataclass(repr=False)
class Upload:
    """`entries` are (name, info) in the header's order; `config` becomes JSON, unless `config_text` replaces it."""

    entries: list[tuple[Any, Any]]
    data: bytearray
    config: dict[str, Any]
    config_text: bytes | None = None
    metadata: Any = field(default_factory=dict)
    header: bytes | None = None
    length: int | None = None
    edits: list[Callable[[bytearray], bytearray]] = field(default_factory=list)

    def __repr__(self) -> str:
        """Short enough for what hypothesis prints."""
        file = self.file(with_config=False)
        return f"Upload({self.config_bytes[:600]!r}, {len(file)} bytes: {file[:1500]!r})"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(repr(self))

    @property
    def config_bytes(self) -> bytes:
        return as_json(self.config).encode() if self.config_text is None else self.config_text

    def file(self, *, with_config: bool) -> bytes:
        """The file's bytes, with the configuration in its metadata if asked for."""
        metadata = self.metadata
        if with_config and isinstance(metadata, dict):
            # What is not UTF-8 cannot be put into a header.
            metadata = metadata | {"adapter_config": self.config_bytes.decode("utf-8", "replace")}
        entries = [("__metadata__", metadata), *self.entries] if metadata != {} else self.entries
        members = ",".join(f"{as_json(str(name))}:{as_json(info)}" for name, info in entries)
        header = f"{{{members}}}".encode() if self.header is None else self.header
        length = len(header) if self.length is None else self.length
        raw = bytearray(length.to_bytes(8, "little") + header + self.data)
        for edit in self.edits:
            raw = edit(raw)
        return bytes(raw)


def as_json(value: Any) -> str:
    """JSON as a careless client writes it: with NaN, lone surrogates and numbers of any length."""
    text = json.dumps(value)
    return text.replace(json.dumps(DIGITS), "9" * 5000).replace(json.dumps(NESTED), "[" * 400 + "]" * 400)


class Originals(list[tuple[str, Upload]]):
    """(Name of the base, adapter that fits it)."""

    def __repr__(self) -> str:
        return f"<{len(self)} valid uploads>"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(repr(self))


def valid_uploads(bases: Mapping[str, Mapping[str, tuple[int, int]]]) -> Originals:
    """Every format and kind, on every base."""
    found = Originals()
    for name, layers in bases.items():
        for seed, (format, dora, rslora) in enumerate(KINDS):
            targets = (["q_proj", "down_proj"], ["q_proj"], ["q_proj", "v_proj", "up_proj"])[seed % 3]
            # The last of them has a rank above the width of its layers.
            rank = 80 if seed == len(KINDS) - 1 else 1 + seed % 3
            tensors, config = random_adapter(layers, rank, seed, kind=format, targets=targets, dora=dora, rslora=rslora)
            found.append((name, packed(tensors, config)))
    return found


def packed(tensors: Mapping[str, np.ndarray], config: dict[str, Any]) -> Upload:
    entries: list[tuple[Any, Any]] = []
    data = bytearray()
    for name, value in sorted(tensors.items()):
        raw = value.astype(np.float32).tobytes()
        entries.append((name, info_of("F32", value.shape, len(data), len(data) + len(raw))))
        data += raw
    return Upload(entries, data, config)


def info_of(dtype: Any, shape: Any, start: Any, end: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


def copied(upload: Upload) -> Upload:
    entries = [(name, json.loads(json.dumps(info))) for name, info in upload.entries]
    return Upload(entries, bytearray(upload.data), json.loads(json.dumps(upload.config)))


# ---- mutations of the header and of the bytes -----------------------------------------------------------------------


def some_entry(draw: Draw, upload: Upload) -> int:
    return draw(st.integers(0, max(len(upload.entries) - 1, 0)))


def change_info(draw: Draw, upload: Upload) -> None:
    """One field of a tensor's entry."""
    if not upload.entries:
        return
    at = some_entry(draw, upload)
    name, info = upload.entries[at]
    if not isinstance(info, dict) or not isinstance(info.get("shape"), list):
        return
    match draw(st.sampled_from(("dtype", "shape", "dimension", "offsets", "strange", "extra", "gone", "replaced"))):
        case "dtype":
            info["dtype"] = draw(st.sampled_from(DTYPES))
        case "shape":
            info["shape"] = draw(st.lists(st.sampled_from(DIMENSIONS), max_size=4))
        case "dimension":
            info["shape"] = [*info["shape"][:1], draw(st.sampled_from(DIMENSIONS))]
        case "offsets":
            near = st.integers(-8, len(upload.data) + 8)
            info["data_offsets"] = draw(st.lists(near | st.sampled_from(DIMENSIONS), min_size=0, max_size=3))
        case "strange":
            info[draw(st.sampled_from(("dtype", "shape", "data_offsets")))] = draw(STRANGE)
        case "extra":
            info["extra"] = draw(STRANGE)
        case "gone":
            info.pop(draw(st.sampled_from(("dtype", "shape", "data_offsets"))), None)
        case "replaced":
            upload.entries[at] = name, draw(STRANGE)


def change_entries(draw: Draw, upload: Upload) -> None:
    """Tensors missing, renamed, there twice, of no size, or not asked for."""
    if not upload.entries:
        return
    at = some_entry(draw, upload)
    name, info = upload.entries[at]
    end = len(upload.data)
    match draw(st.sampled_from(("drop", "rename", "twice", "extra", "empty", "swap", "reorder", "none"))):
        case "drop":
            del upload.entries[at]
        case "rename":
            upload.entries[at] = draw(st.sampled_from(NAMES) | st.text(max_size=20)), info
        case "twice":
            upload.entries.append((name, info))
        case "extra":
            upload.entries.append((draw(st.sampled_from(NAMES)), info_of("F32", (2, 2), end, end + 16)))
            upload.data += bytes(16)
        case "empty":
            shape = draw(st.sampled_from(((0,), (0, 10**15), (4, 0), (0, 0, 0))))
            upload.entries.append((draw(st.sampled_from((*NAMES, name))), info_of("F32", shape, end, end)))
        case "swap":
            other = some_entry(draw, upload)
            upload.entries[at], upload.entries[other] = (
                (name, upload.entries[other][1]),
                (upload.entries[other][0], info),
            )
        case "reorder":
            upload.entries.reverse()
        case "none":
            upload.entries.clear()


def change_metadata(draw: Draw, upload: Upload) -> None:
    upload.metadata = draw(STRANGE | st.dictionaries(st.text(max_size=5), STRANGE, max_size=2))


def change_header(draw: Draw, upload: Upload) -> None:
    """Its length lies, or it is something else altogether."""
    if draw(st.booleans()):
        upload.length = draw(st.sampled_from(LENGTHS) | st.integers(0, 4000))
        return
    nothing = st.sampled_from(
        (b"", b"{}", b"[]", b"null", b'"', b"{" * 3000, b'{"a":' * 200, b"\xff\xfe", b"\xef\xbb\xbf{}")
    )
    upload.header = draw(nothing | st.binary(max_size=40) | STRANGE.map(lambda v: as_json(v).encode()))


def change_bytes(draw: Draw, upload: Upload) -> None:
    """Bits flipped, cut off, more at the end, something in between."""
    at, some = draw(st.floats(0, 1)), draw(st.binary(min_size=1, max_size=9))
    kind = draw(st.sampled_from(("flip", "flip", "cut", "longer", "between", "nothing")))

    def edit(raw: bytearray) -> bytearray:
        place = int(at * max(len(raw) - 1, 0))
        if kind == "flip" and raw:
            # Headers are small: half of the places are within the first kilobyte.
            place = place % 1024 if some[0] % 2 else place
            raw[place % len(raw)] ^= 1 << (some[0] % 8)
            return raw
        return {"cut": raw[:place], "longer": raw + some, "nothing": bytearray()}.get(
            kind, raw[:place] + some + raw[place:]
        )

    upload.edits.append(edit)


def change_values(draw: Draw, upload: Upload) -> None:
    """Numbers that are none, or the largest there are."""
    place = 4 * draw(st.integers(0, max(len(upload.data) // 4 - 1, 0)))
    upload.data[place : place + 4] = draw(st.sampled_from(BITS))


# ---- mutations of the configuration ---------------------------------------------------------------------------------


def change_field(draw: Draw, upload: Upload) -> None:
    """A field of a wrong type or value, or missing."""
    holder = upload.config
    fields = PEFT_FIELDS if "peft_type" in holder else MLX_FIELDS
    if isinstance(holder.get("lora_parameters"), dict) and draw(st.booleans()):
        holder, fields = holder["lora_parameters"], MLX_PARAMETERS
    name = draw(st.sampled_from(fields))
    if draw(st.integers(0, 9)) == 0:
        holder.pop(name, None)
    else:
        holder[name] = draw(STRANGE | st.integers() | st.floats() | st.text(max_size=10))


def change_expression(draw: Draw, upload: Upload) -> None:
    """Regular expressions, of which some take for ever."""
    expression = draw(st.sampled_from(EXPRESSIONS) | st.text("()[]{}|*+?.\\^$aq_pro1,", max_size=15))
    name = draw(st.sampled_from(NAMING + TABLES))
    if name in TABLES:
        upload.config[name] = {expression: draw(st.sampled_from((1, 2, 4, 0.5, None)))}
        return
    upload.config[name] = expression if draw(st.booleans()) else [expression, "q_proj"]
    if name == "layers_pattern":
        upload.config["layers_to_transform"] = draw(st.sampled_from((0, 1, [0], [0, 1], [], [10**30], -1)))


def change_text(draw: Draw, upload: Upload) -> None:
    """A configuration that is no JSON, or a strange one."""
    text = upload.config_bytes
    doubled = b'{"r": 1, ' + text[1:]
    upload.config_text = draw(
        st.sampled_from(
            (b"", b" ", b"{", b"[]", b"null", b"{}", b"NaN", b"\xff" + text, b"\xef\xbb\xbf" + text, doubled, text[:-1])
        )
        | STRANGE.map(lambda value: as_json(value).encode())
        | st.sampled_from((b"[" * 100_000, b'{"a":' * 50_000, b'{"r":' + b"[" * 900 + b"]" * 900 + b"}"))
    )


MUTATIONS = (
    *(change_info, change_entries, change_bytes, change_values, change_field),
    *(change_info, change_entries, change_bytes, change_expression, change_field),
    *(change_metadata, change_header, change_text),
)


@st.composite
def uploads(draw: Draw, valid: Originals) -> tuple[str, Upload, bool]:
    """(Name of the base, upload, whether the configuration travels in the file's metadata)."""
    base, original = draw(st.sampled_from(valid))
    upload = copied(original)
    for mutate in draw(st.lists(st.sampled_from(MUTATIONS), min_size=0, max_size=3)):
        mutate(draw, upload)
    return base, upload, draw(st.booleans())
