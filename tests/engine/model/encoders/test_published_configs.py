"""config.json of encoders that people use, as they were published, field by field: each is taken for what it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from rollout_server.engine.messages.options import Task
from rollout_server.engine.model.checkpoint.meaning import meaning_of
from rollout_server.engine.model.encoders.architecture import architecture_of
from rollout_server.engine.model.encoders.effects import unserved
from tests.support.golden_encoders import opened, passages

BERT: dict[str, Any] = {
    "model_type": "bert", "attention_probs_dropout_prob": 0.1, "gradient_checkpointing": False, "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1, "hidden_size": 384, "initializer_range": 0.02, "intermediate_size": 1536,
    "layer_norm_eps": 1e-12, "max_position_embeddings": 512, "num_attention_heads": 12, "num_hidden_layers": 6,
    "pad_token_id": 0, "position_embedding_type": "absolute", "transformers_version": "4.8.2", "type_vocab_size": 2,
    "use_cache": True, "vocab_size": 30522,
}  # fmt: skip
XLM_R: dict[str, Any] = {
    "model_type": "xlm-roberta", "attention_probs_dropout_prob": 0.1, "bos_token_id": 0, "classifier_dropout": None,
    "eos_token_id": 2, "hidden_act": "gelu", "hidden_dropout_prob": 0.1, "hidden_size": 1024,
    "initializer_range": 0.02, "intermediate_size": 4096, "layer_norm_eps": 1e-05, "max_position_embeddings": 8194,
    "num_attention_heads": 16, "num_hidden_layers": 24, "output_past": True, "pad_token_id": 1,
    "position_embedding_type": "absolute", "torch_dtype": "float32", "transformers_version": "4.38.1",
    "type_vocab_size": 1, "use_cache": True, "vocab_size": 250002,
}  # fmt: skip
DEBERTA: dict[str, Any] = {
    "model_type": "deberta-v2", "attention_probs_dropout_prob": 0.1, "hidden_act": "gelu", "hidden_dropout_prob": 0.1,
    "initializer_range": 0.02, "layer_norm_eps": 1e-07, "max_position_embeddings": 512, "max_relative_positions": -1,
    "norm_rel_ebd": "layer_norm", "pad_token_id": 0, "pooler_dropout": 0, "pooler_hidden_act": "gelu",
    "position_biased_input": False, "position_buckets": 256, "relative_attention": True, "share_att_key": True,
    "summary_type": "first", "torch_dtype": "float32", "transformers_version": "4.26.0.dev0", "type_vocab_size": 0,
    "vocab_size": 128100,
}  # fmt: skip
PUBLISHED: dict[str, tuple[Task, dict[str, Any]]] = {
    "all-MiniLM-L6-v2": ("embed", {**BERT, "architectures": ["BertModel"]}),
    "bge-small": ("embed", {**BERT, "architectures": ["BertModel"], "id2label": {"0": "LABEL_0"}}),
    "ms-marco-MiniLM-L-6-v2": (
        "classify",
        {
            **BERT,
            "architectures": ["BertForSequenceClassification"],
            "id2label": {"0": "LABEL_0"},
            "label2id": {"LABEL_0": 0},
            "sbert_ce_default_activation_function": "torch.nn.modules.linear.Identity",
        },
    ),
    "bge-reranker-v2-m3": (
        "classify",
        {**XLM_R, "architectures": ["XLMRobertaForSequenceClassification"], "id2label": {"0": "LABEL_0"}},
    ),
    "distilbert-sst-2": (
        "classify",
        {
            "model_type": "distilbert", "activation": "gelu", "attention_dropout": 0.1, "dim": 768, "dropout": 0.1,
            "architectures": ["DistilBertForSequenceClassification"], "finetuning_task": "sst-2", "hidden_dim": 3072,
            "id2label": {"0": "NEGATIVE", "1": "POSITIVE"}, "initializer_range": 0.02,
            "label2id": {"NEGATIVE": 0, "POSITIVE": 1}, "max_position_embeddings": 512, "n_heads": 12, "n_layers": 6,
            "output_past": True, "pad_token_id": 0, "qa_dropout": 0.1, "seq_classif_dropout": 0.2,
            "sinusoidal_pos_embds": False, "tie_weights_": True, "vocab_size": 30522,
        },
    ),
    "reward-model-deberta-v3-large-v2": (
        "classify",
        {
            **DEBERTA, "architectures": ["DebertaV2ForSequenceClassification"], "hidden_size": 1024,
            "id2label": {"0": "LABEL_0"}, "intermediate_size": 4096, "label2id": {"LABEL_0": 0},
            "num_attention_heads": 16, "num_hidden_layers": 24, "pooler_hidden_size": 1024,
            "pos_att_type": ["p2c", "c2p"],
        },
    ),
    "deberta-v2-xlarge-mnli": (
        "classify",
        {
            **DEBERTA, "architectures": ["DebertaV2ForSequenceClassification"], "attention_head_size": 64,
            "conv_act": "gelu", "conv_kernel_size": 3, "hidden_size": 1536, "intermediate_size": 6144,
            "num_attention_heads": 24, "num_hidden_layers": 24, "pooler_hidden_size": 1536, "pos_att_type": "p2c|c2p",
        },
    ),
    "a ModernBERT classifier": (
        "classify",
        {
            "model_type": "modernbert", "architectures": ["ModernBertForSequenceClassification"],
            "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 50281, "classifier_activation": "gelu",
            "classifier_bias": False, "classifier_dropout": 0.0, "classifier_pooling": "mean", "cls_token_id": 50281,
            "decoder_bias": True, "deterministic_flash_attn": False, "embedding_dropout": 0.0, "eos_token_id": 50282,
            "global_attn_every_n_layers": 3, "global_rope_theta": 160000.0, "gradient_checkpointing": False,
            "hidden_activation": "gelu", "hidden_size": 768, "initializer_cutoff_factor": 2.0,
            "initializer_range": 0.02, "intermediate_size": 1152, "layer_norm_eps": 1e-05, "local_attention": 128,
            "local_rope_theta": 10000.0, "max_position_embeddings": 8192, "mlp_bias": False, "mlp_dropout": 0.0,
            "norm_bias": False, "norm_eps": 1e-05, "num_attention_heads": 12, "num_hidden_layers": 22,
            "pad_token_id": 50283, "position_embedding_type": "absolute", "reference_compile": False,
            "sep_token_id": 50282, "sparse_pred_ignore_index": -100, "sparse_prediction": False,
            "torch_dtype": "float32", "transformers_version": "4.48.0", "vocab_size": 50368,
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_it_is_taken_for_what_it_is(name: str, tmp_path: Path) -> None:
    task, config = PUBLISHED[name]
    found = architecture_of(config, tmp_path)
    assert found.task == task
    said = meaning_of(config)
    assert not list(unserved(config, said, found.family))
    assert found.family.arguments_of(said.fields).max_tokens in (512, 8192)


def test_thetas_and_layers_of_modernbert_are_read_as_they_were_written_before(tmp_path: Path) -> None:
    flat = {"global_attn_every_n_layers": 3, "global_rope_theta": 160000.0, "local_rope_theta": 500.0}
    nested = {
        "full_attention": {"rope_type": "default", "rope_theta": 160000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
    }
    new = opened("modernbert/embed", tmp_path / "new", rope_parameters=nested)
    old = opened("modernbert/embed", tmp_path / "old", rope_parameters=None, layer_types=None, **flat)
    ids = [list(passage.ids) for passage in passages(new, 30)]
    assert old.body(mx.array(ids)).tolist() == new.body(mx.array(ids)).tolist()
    usual = opened("modernbert/embed", tmp_path / "usual")
    assert usual.body(mx.array(ids)).tolist() != new.body(mx.array(ids)).tolist()
