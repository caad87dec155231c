"""Checks that an encoder's code computes what config.json says. Every field that transformers has for the family is
one of three things: the code computes with it, it changes no number here, or it may only have some value."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rollout_server.engine.model.checkpoint.meaning import Meaning, meaning_of
from rollout_server.models.encoders.activations import ACTIVATIONS
from rollout_server.models.encoders.bert import BEHIND_PADDING
from rollout_server.models.encoders.families import EncoderFamily
from rollout_server.models.encoders.modernbert import FULL, LOCAL
from rollout_server.quoting import quoted

NO_NUMBER = frozenset(
    {
        # What training reads.
        "attention_dropout", "attention_probs_dropout_prob", "classifier_dropout", "dropout", "embedding_dropout",
        "hidden_dropout_prob", "initializer_cutoff_factor", "initializer_range", "mlp_dropout", "pooler_dropout",
        "qa_dropout", "seq_classif_dropout",
        # What is in the weights, or in the tokenizer.
        "sinusoidal_pos_embds", "bos_token_id", "cls_token_id", "eos_token_id", "sep_token_id",
        # What names things, and what says how to compute and not what.
        "architectures", "chunk_size_feed_forward", "deterministic_flash_attn", "dtype", "id2label", "label2id",
        "output_attentions", "output_hidden_states", "problem_type", "return_dict", "transformers_version", "use_cache",
        # The head of a language model, which none of these has here.
        "decoder_bias", "legacy", "sparse_pred_ignore_index", "sparse_prediction", "tie_word_embeddings",
    }
)  # fmt: skip
"""Fields that change no number that is read here."""
ONLY: Mapping[str, tuple[Any, ...]] = {
    "is_decoder": (None, False),
    "add_cross_attention": (None, False),
    "is_encoder_decoder": (None, False),
    "position_embedding_type": (None, "absolute"),
    "classifier_pooling": (None, "cls", "mean"),
    "quantization": (None,),
    "quantization_config": (None,),
}
"""Field → the values with which the code is right, whether or not transformers declares it."""
ACTIVATION_FIELDS = (
    "hidden_act",
    "activation",
    "hidden_activation",
    "classifier_activation",
    "pooler_hidden_act",
    "conv_act",
)
WIDTHS = ("attention_head_size", "head_dim", "pooler_hidden_size")


def unserved(config: Mapping[str, Any], said: Meaning, family: EncoderFamily) -> Iterator[str]:
    """A half sentence for each field whose value the family's code does not compute with."""
    kind = str(config.get("model_type"))
    if not said.known:
        yield "transformers does not read its config.json"
        return
    usual = meaning_of({"model_type": kind}).fields
    known = family.computed | NO_NUMBER | ONLY.keys() | said.names.keys()
    for name in sorted(said.declared - known):
        if said.fields.get(name) != usual.get(name):
            yield _sentence(name, said.fields.get(name), kind)
    for name, right in ONLY.items():
        if (value := said.get(name)) not in right:
            yield _sentence(name, value, kind)
    for check in (_activations, _widths, _positions, _layers):
        yield from (_sentence(name, value, kind) for name, value in check(said.fields, kind))


def _sentence(name: str, value: Any, kind: str) -> str:
    return f"{name} is {quoted(value)}, which {kind} does not compute here"


def _activations(fields: Mapping[str, Any], kind: str) -> Iterator[tuple[str, Any]]:
    for name in ACTIVATION_FIELDS:
        if fields.get(name) is not None and fields[name] not in ACTIVATIONS:
            yield name, fields[name]


def _widths(fields: Mapping[str, Any], kind: str) -> Iterator[tuple[str, Any]]:
    hidden, heads = (fields.get("hidden_size") or fields["dim"]), fields.get("num_attention_heads") or fields["n_heads"]
    if hidden % heads:
        yield ("num_attention_heads" if "num_attention_heads" in fields else "n_heads"), heads
    right = (hidden // heads, hidden // heads, hidden)
    for name, width in zip(WIDTHS, right, strict=True):
        if fields.get(name) not in (None, width):
            yield name, fields[name]


def _positions(fields: Mapping[str, Any], kind: str) -> Iterator[tuple[str, Any]]:
    if kind in BEHIND_PADDING and fields.get("pad_token_id") is None:
        yield "pad_token_id", None
    if (size := fields.get("conv_kernel_size", 0)) > 0 and size % 2 == 0:
        yield "conv_kernel_size", size  # The convolution would give one column less than it gets.
    if fields.get("relative_attention") and 0 < (buckets := fields.get("position_buckets", -1)) < 4:
        yield "position_buckets", buckets  # Half of them are for themselves, and a logarithm needs the rest.


def _layers(fields: Mapping[str, Any], kind: str) -> Iterator[tuple[str, Any]]:
    """ModernBERT's kinds of layers, and how each of them turns positions."""
    kinds = fields.get("layer_types")
    if kinds is None:
        return
    for found in sorted({str(each) for each in kinds} - {FULL, LOCAL}):
        yield "layer_types", found
    if len(kinds) != fields["num_hidden_layers"]:
        yield "num_hidden_layers", fields["num_hidden_layers"]
    for name in sorted({FULL, LOCAL} & set(kinds)):
        if (turns := fields["rope_parameters"][name].get("rope_type")) != "default":
            yield f"rope_type of {name}", turns
