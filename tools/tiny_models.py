"""Tiny models of transformers with random weights, made without a network: ``make(name)`` for ``NAMES``.

A name is a class of transformers, with variants behind a plus: "MixtralForCausalLM+router". Configurations are
made by rule: every field whose name says that it is a size gets a small value, every one that says that it is a
dropout gets 0; what the rules get wrong stands in FIELDS. So does what a model is given: by the names of its
forward's arguments and of its head.
"""

import contextlib
import copy
import dataclasses
import inspect
import os
import re
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a class that wants a file says so at once
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
import transformers
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

WORDS, ROWS, LENGTH, CLASSES = 96, 8, 12, 2
MADE = Path(__file__).with_suffix(".txt")  # the names that could be made, when this was written

# The heads whose loss comes with the output. (MODEL_FOR_<this>_MAPPING_NAMES of transformers.)
HEADS = """CAUSAL_LM MASKED_LM SEQ_TO_SEQ_CAUSAL_LM SEQUENCE_CLASSIFICATION TOKEN_CLASSIFICATION
    QUESTION_ANSWERING MULTIPLE_CHOICE NEXT_SENTENCE_PREDICTION PRETRAINING IMAGE_CLASSIFICATION
    ZERO_SHOT_IMAGE_CLASSIFICATION SEMANTIC_SEGMENTATION MASKED_IMAGE_MODELING VIDEO_CLASSIFICATION
    CAUSAL_IMAGE_MODELING IMAGE_TEXT_TO_TEXT MULTIMODAL_LM VISUAL_QUESTION_ANSWERING SPEECH_SEQ_2_SEQ
    CTC AUDIO_CLASSIFICATION AUDIO_FRAME_CLASSIFICATION AUDIO_XVECTOR DOCUMENT_QUESTION_ANSWERING
    TABLE_QUESTION_ANSWERING DEPTH_ESTIMATION OBJECT_DETECTION RNNT TIME_SERIES_PREDICTION
    TIME_SERIES_CLASSIFICATION TIME_SERIES_REGRESSION""".split()

# Fields of configurations by name. None as the default of a field stays None where the name is in KEEP_NONE.
SMALL = {
    name: value
    for value, names in {
        96: "vocab_size n_vocab decoder_vocab_size unpadded_vocab_size "
        "vocab_size_per_layer_input src_vocab_size tgt_vocab_size encoder_vocab_size text_vocab_size",
        64: "max_position_embeddings n_positions max_source_positions "
        "max_target_positions n_ctx max_seq_len "
        "max_sequence_length max_seq_length max_2d_position_embeddings original_max_position_embeddings",
        48: "intermediate_size encoder_ffn_dim decoder_ffn_dim ffn_dim d_ff "
        "n_inner mlp_dim ffn_hidden_size d_inner "
        "decoder_intermediate_size hidden_dim_ffn feed_forward_size",
        32: "hidden_size d_model n_embd embed_dim hidden_dim "
        "dim decoder_hidden_size encoder_hidden_size out_hidden_size "
        "projection_dim embedding_size text_hidden_size word_embed_proj_dim "
        "emb_dim d_embed encoder_hidden_dim "
        "cross_attention_hidden_size text_embed_dim vision_embed_dim audio_embed_dim "
        "lru_width embedding_dim adapter_out_dim "
        "attention_hidden_size classifier_proj_size output_hidden_size adapter_in_dim "
        "image_size fusion_hidden_size pooler_hidden_size num_conv_pos_embeddings",
        16: "moe_intermediate_size shared_expert_intermediate_size kv_lora_rank q_lora_rank num_mel_bins "
        "moe_shared_expert_intermediate_size expert_ffn_hidden_size state_size",
        8: "head_dim d_kv v_head_dim qk_nope_head_dim "
        "qk_rope_head_dim attention_head_dim global_head_dim d_head "
        "mamba_d_state mamba_d_head mamba_headdim mamba_n_heads mamba_num_heads "
        "mamba_head_dim linear_key_head_dim linear_value_head_dim num_queries "
        "patch_size encoder_stride swa_head_dim kv_channels "
        "hidden_size_per_layer_input laurel_rank linear_head_dim index_head_dim qk_head_dim",
        4: "num_hidden_layers n_layer n_layers num_layers depth "
        "num_attention_heads n_head n_heads num_heads "
        "encoder_attention_heads decoder_attention_heads num_experts num_local_experts n_routed_experts "
        "sliding_window moe_num_experts num_blocks decoder_num_attention_heads encoder_num_attention_heads "
        "window_size linear_num_value_heads num_decoder_attention_heads "
        "num_encoder_attention_heads index_n_heads "
        "index_topk num_image_tokens encoder_n_head n_routed_expert num_moe_experts",
        2: "num_key_value_heads num_experts_per_tok type_vocab_size "
        "encoder_layers decoder_layers num_decoder_layers "
        "num_encoder_layers moe_top_k moe_topk num_experts_per_token "
        "num_kv_heads n_head_kv multi_query_num "
        "decoder_num_hidden_layers encoder_num_hidden_layers "
        "num_global_key_value_heads linear_num_key_heads "
        "decoder_depth num_conv_pos_embedding_groups mask_time_min_masks max_window_layers",
        1: "n_group topk_group n_shared_experts "
        "num_shared_experts first_k_dense_replace moe_num_shared_experts "
        "num_dense_layers moe_layer_start_index num_nextn_predict_layers n_groups",
        0: "mask_time_prob mask_feature_prob router_jitter_noise",
    }.items()
    for name in names.split()
} | {"apply_spec_augment": False}
KEEP_NONE = "sliding_window q_lora_rank n_inner num_key_value_heads decoder_layers num_decoder_layers".split()
TOKENS = {
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "forced_eos_token_id": 2,
    "sep_token_id": 2,
    "cls_token_id": 1,
    "blank_token_id": 0,
}
DROPOUT = re.compile(
    r"(dropout|drop|dropout_prob|pdrop|layerdrop|dropout_rate|drop_rate|drop_path_rate|drop_prob|"
    r"dropout_p|dropout_ratio|attention_probs_dropout_prob|router_jitter_noise|noise_epsilon)$"
)


def small_fields(config_class, above=""):
    """Small values for the fields of a configuration, and of the configurations in it."""
    default, found = config_class(), {}
    for field in dataclasses.fields(config_class):
        try:
            name, value = field.name, getattr(default, field.name, None)
        except Exception:  # it differs from layer to layer
            value = field.default
        if isinstance(value, transformers.PreTrainedConfig):
            found[name] = small_config(type(value), name)
        elif DROPOUT.search(name) and isinstance(value, int | float):
            found[name] = type(value)(0)
        elif name in TOKENS:
            found[name] = TOKENS[name]
        elif name == "rope_parameters" and "mrope_section" in getattr(
            config_class, "ignore_keys_at_rope_validation", ()
        ):
            found[name] = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
        elif re.search(r"_token_(id|index)$", name) and (
            isinstance(value, int) or re.match("image|audio", name)
        ):
            # Above the ids that a text draws. One of its own for each name, the same in each configuration.
            found[name] = 80 + sum(map(ord, name)) % 16
        elif isinstance(field.default, tuple) and value and all(isinstance(v, int) for v in value):
            found[name] = small_tuple(name, value)
        elif (
            name in SMALL
            and not (value is None and name in KEEP_NONE)
            and not isinstance(value, tuple | list | dict)
        ):
            found[name] = SMALL[name]
            if above not in ("", "text_config", "decoder") and name in (
                "num_hidden_layers",
                "depth",
                "num_layers",
            ):
                found[name] = 2
        elif isinstance(value, int) and value >= 128 and re.search("(_size|_dim|_channels|_features)$", name):
            found[name] = 32
    if "kv_lora_rank" in found and "num_key_value_heads" in found:
        found["num_key_value_heads"] = 4  # latent attention has as many as heads
    if isinstance(found.get("depths"), tuple | list):  # it halves the image again and again
        found |= {
            name: value
            for name, value in (("image_size", 64), ("patch_size", 4))
            if isinstance(found.get(name), int)
        }
    return found | FIELDS.get(config_class.__name__, {})


def small_tuple(name, value):
    if name in ("deepstack_visual_indexes", "fullatt_block_indexes"):
        return type(value)((0, 1))
    if name in ("depths", "num_blocks", "layer_depths"):
        return type(value)(min(v, 2) for v in value)
    if name in ("hidden_sizes", "embed_dims", "neck_hidden_sizes", "channels", "encoder_hidden_sizes"):
        return type(value)(16 * 2**i for i in range(len(value)))
    if name in ("num_attention_heads", "num_heads"):
        return type(value)(2**i for i in range(len(value)))
    return type(value)(32 if v >= 64 else v for v in value)


def small_config(config_class, above="", **more):
    return config_class(**small_fields(config_class, above) | more)


HYBRID = ["sliding_attention", "full_attention"] * 2
# Where the rules fall short: by configuration class (also within others).
FIELDS = {
    "Gemma3nTextConfig": {"num_kv_shared_layers": 2},
    "Gemma4TextConfig": {"num_kv_shared_layers": 2, "global_head_dim": 8, "layer_types": HYBRID},
    "Gemma4UnifiedTextConfig": {"global_head_dim": 8},
    "Mamba2Config": {"num_heads": 8},
    "EsmcConfig": {"num_key_value_heads": 4},
    "JambaConfig": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "KimiLinearConfig": {"layer_types": ["linear_attention", "full_attention"] * 2, "linear_num_heads": 4},
    "Dots3NoteVisionConfig": {"mlp_layer_types": ["dense"] * 2},
    "Qwen2_5_VLVisionConfig": {"window_size": 32},
    "Gemma3Config": {"mm_tokens_per_image": 4},
    "T5Gemma2EncoderConfig": {"mm_tokens_per_image": 4},
    "LlavaNextConfig": {"image_grid_pinpoints": [[32, 32]]},
    "LlavaNextVideoConfig": {"image_grid_pinpoints": [[32, 32]]},
    "LlavaOnevisionConfig": {"image_grid_pinpoints": [[32, 32]]},
    "Kosmos2Config": {"latent_query_num": 4},
    "ASTConfig": {"max_length": 32},
    "BitConfig": {"num_groups": 4},
    "BeitConfig": {"_out_indices": [1, 2, 3, 4], "out_indices": [1, 2, 3, 4]},
    "SwinConfig": {"encoder_stride": 32, "window_size": 2},
    "DonutSwinConfig": {"window_size": 2},
    "Swinv2Config": {"image_size": 64, "patch_size": 4, "encoder_stride": 32},
    "FocalNetConfig": {"image_size": 64, "patch_size": 4, "encoder_stride": 32},
    "ReformerConfig": {
        "is_decoder": True,
        "axial_pos_shape": [4, 3],
        "axial_pos_embds_dim": [16, 16],
        "attn_layers": ["local"] * 4,
    },
    "BambaConfig": {"attn_layer_indices": [1, 3]},
    "GraniteMoeHybridConfig": {"layer_types": ["mamba", "attention"] * 2},
    "Lfm2MoeConfig": {"layer_types": ["conv", "full_attention"] * 2},
    "BailingHybridConfig": {"layer_group_size": 2, "head_dim": 8},
    "DoryConfig": {"n_input_layers": 1, "n_output_layers": 1},
    "Ernie4_5_MoeConfig": {"moe_k": 2},
    "GPTNeoConfig": {"attention_types": [[["global", "local"], 2]]},
    "GPTJConfig": {"rotary_dim": 4},
    "CodeGenConfig": {"rotary_dim": 4},
    "FalconH1Config": {"mamba_d_ssm": 64},
}
# Sounds come as [rows, time, bins]; elsewhere as [rows, bins, time].
TIME_FIRST = re.compile(
    "Parakeet|Canary|CohereAsr|GraniteSpeech|Speech2Text|Seamless|Wav2Vec2Bert|Lasr|ASTFor|Kyutai"
)
MORE_IMAGES = re.compile("Idefics|SmolVLM|GraniteDocling")  # [rows, images, channels, height, width]


def has_router(kind):
    with contextlib.suppress(Exception):  # some kinds have no default configuration
        return any(hasattr(one, "output_router_logits") for one in configs(CONFIG_MAPPING[kind]()))
    return False


def candidates():
    """Names of classes with a loss, and of those with experts a second time with the router's loss."""
    found = set()
    for head in HEADS:
        for kind, names in getattr(modeling_auto, f"MODEL_FOR_{head}_MAPPING_NAMES").items():
            names = names if isinstance(names, tuple | list) else [names]
            found.update(names)
            if re.search("CAUSAL_LM|IMAGE_TEXT_TO_TEXT", head) and has_router(kind):
                found.update(name + "+router" for name in names)
    return sorted(found)


def ids(seed=0, length=LENGTH, low=4, high=80):
    return torch.randint(low, high, (ROWS, length), generator=torch.Generator().manual_seed(seed))


def noise(*shape, seed=0):
    return torch.randn(ROWS, *shape, generator=torch.Generator().manual_seed(seed))


def configs(config):
    """A configuration and all within it."""
    yield config
    for value in vars(config).values():
        if isinstance(value, transformers.PreTrainedConfig):
            yield from configs(value)


def lookup(config, *names):
    """The first of these fields in a configuration or in those within it."""
    for one in configs(config):
        for name in names:
            if isinstance(getattr(one, name, None), int | tuple | list):
                return getattr(one, name)
    return None


def inputs_for(model, name):
    """The keyword inputs of a batch that the model's forward and the name of its head ask for."""
    config, fields = model.config, inspect.signature(model.forward).parameters
    found, classes = {}, torch.arange(ROWS) % CLASSES
    text, encoder_decoder = "input_ids" in fields, "decoder_input_ids" in fields
    main = getattr(model, "main_input_name", "input_ids")

    def has(*words):
        return any(word in name for word in words)

    if "pixel_values" in fields or "pixel_values_videos" == main:
        size = lookup(config, "image_size", "input_size") or 64
        high, wide = size if isinstance(size, tuple | list) else (size, size)
        channels = lookup(config, "num_channels", "in_channels") or 3
        channels = channels if isinstance(channels, int) else 3
        key = "pixel_values" if "pixel_values" in fields else main
        frames = lookup(config, "num_frames") if has("Video", "Timesformer", "Vivit", "VJEPA2") else None
        found[key] = noise(*[frames] if frames else [], channels, high, wide)
        if "image_grid_thw" in fields:  # the patches of all images in one row
            patch, times = lookup(config, "patch_size") or 8, lookup(config, "temporal_patch_size") or 1
            found[key] = noise(16, channels * times * patch * patch)
            found["image_grid_thw"] = torch.tensor([[1, 4, 4]] * ROWS)
        elif MORE_IMAGES.match(name):
            found[key] = found[key][:, None]
        elif "image_sizes" in fields and re.match("LlavaNext|LlavaOne", name):
            found[key] = noise(2, channels, high, wide)
            found["image_sizes"] = torch.tensor([[high, wide]] * ROWS)
        if "bool_masked_pos" in fields:
            patch = lookup(config, "patch_size") or 4
            found["bool_masked_pos"] = (
                torch.arange(ROWS * (high // patch) * (wide // patch)).view(ROWS, -1) % 3 == 0
            )
    if "input_values" in fields:
        found["input_values"] = noise(4800)
        if has("ASTFor"):
            found["input_values"] = noise(config.max_length, config.num_mel_bins)
    if "input_features" in fields:
        found["input_features"] = noise(lookup(config, "num_mel_bins", "input_feat_per_channel") or 16, 128)
        if TIME_FIRST.match(name):
            found["input_features"] = found["input_features"].mT.contiguous()
    if text and (main == "input_ids" or "pixel_values" not in fields or not has("ForImageClassification")):
        found["input_ids"] = ids()
        if "attention_mask" in fields:
            found["attention_mask"] = torch.ones(ROWS, LENGTH, dtype=torch.long)
            found["attention_mask"][::2, -3:] = 0
    if "mm_token_type_ids" in fields:
        found["mm_token_type_ids"] = torch.zeros(ROWS, LENGTH, dtype=torch.long)
    if "qformer_input_ids" in fields:
        found["qformer_input_ids"] = ids(3)
    if "image_embeds_position_mask" in fields and "latent_query_num" in vars(config):
        found["image_embeds_position_mask"] = (
            ((torch.arange(LENGTH) > 0) & (torch.arange(LENGTH) < 5)).expand(ROWS, -1).clone()
        )
    if "bbox" in fields:
        found["bbox"] = ids(2, 4 * LENGTH, 1, 30).view(ROWS, LENGTH, 4).sort(-1).values
    if encoder_decoder and has("SequenceClassification"):
        found["input_ids"][:, 7] = TOKENS["eos_token_id"]  # what it reads its result at
    if has("ForMultipleChoice"):
        found = {k: v[:, None].expand(-1, 3, *v.shape[1:]).contiguous() for k, v in found.items()}
    if "return_loss" in fields:
        found["return_loss"] = True
    if "start_positions" in fields and has("QuestionAnswering"):
        found["start_positions"], found["end_positions"] = torch.arange(ROWS) % 5, torch.arange(ROWS) % 5 + 2
    elif has("NextSentence") or has(
        "SequenceClassification",
        "ForImageClassification",
        "ForMultipleChoice",
        "VideoClassification",
        "ForAudioClassification",
        "ForSpeechClassification",
        "XVector",
    ):
        found["labels"] = classes
    elif has("TokenClassification"):
        found["labels"] = found["input_ids"] % CLASSES
    elif has("SemanticSegmentation"):
        found["labels"] = torch.arange(ROWS * high * wide).view(ROWS, high, wide) // 3 % CLASSES
    elif has("DepthEstimation"):
        found["labels"] = noise(high, wide).abs()
    elif has("AudioFrame"):
        frames = int(model._get_feat_extract_output_lengths(4800))
        found["labels"] = torch.nn.functional.one_hot(ids(1, frames) % CLASSES, CLASSES)
    elif has("CTC", "RNNT", "TDT"):
        found["labels"] = ids(1, 3)
    elif "labels" in fields and encoder_decoder and not has("InstructBlip", "FSMT", "PPFormula"):
        found["labels"] = ids(1, 7)
    elif "labels" in fields and "input_ids" in found:
        found["labels"] = found["input_ids"].clone()
    elif "labels" in fields:
        found["labels"] = ids(1, 7)
    if "next_sentence_label" in fields:
        found["next_sentence_label"] = classes
    if "sentence_order_label" in fields:
        found["sentence_order_label"] = classes
    if has("ElectraForPreTraining"):
        found["labels"] = found["input_ids"] % 2
    return found


def with_rows_of_patches(model_class):
    """Such a model wants the patches of all images in one row; here each sample has a row with its own."""

    def forward(self, pixel_values=None, **more):
        return model_class.forward(self, pixel_values=pixel_values.flatten(0, 1), **more)

    forward.__signature__ = inspect.signature(model_class.forward)
    return type(model_class.__name__, (model_class,), {"forward": forward})


def model_of(name):
    name, *variants = name.split("+")
    model_class = getattr(transformers, name)
    if "image_grid_thw" in inspect.signature(model_class.forward).parameters and "packed" not in variants:
        model_class = with_rows_of_patches(model_class)
    config = small_config(model_class.config_class)
    for token, value in TOKENS.items():
        if getattr(config, token, None) is None and config.is_encoder_decoder:
            setattr(config, token, value)
    for one in configs(config):
        if "router" in variants and hasattr(one, "output_router_logits"):
            one.output_router_logits = True
        if "nocache" in variants and hasattr(one, "use_cache"):
            one.use_cache = False
    if "eager" in variants:
        config._attn_implementation = "eager"
    if "hidden" in variants:
        config.output_hidden_states = True
    torch.manual_seed(0)
    model = model_class(config)
    with torch.no_grad():
        # A weight of zeros (a gate, the last layer of a head) would hide every gradient behind it.
        for parameter in model.parameters():
            if parameter.is_floating_point() and not parameter.any():
                parameter.normal_(std=0.02)
    for module in model.modules():
        if isinstance(module, torch.nn.modules.dropout._DropoutNd):
            module.p = 0.0  # some stand in no configuration
    if "checkpoint" in variants:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def make(name):
    """A tiny model with random weights and the keyword inputs of a batch.

    Variants: +router (the router's loss), +nocache, +eager (attention), +hidden (states of all layers in the
    output), +checkpoint, +positions (ids of positions that broadcast), +mask4d (a mask that broadcasts over
    rows and heads), +packed (the patches of all images in one row, as Qwen2-VL and its like want them).
    """
    model = model_of(name)
    inputs = with_image_tokens(model, inputs_for(model, name.split("+")[0]))
    if "+packed" in name:
        inputs["pixel_values"] = inputs["pixel_values"].flatten(0, 1)
    if "+positions" in name:
        inputs["position_ids"] = torch.arange(inputs["input_ids"].shape[1])[None]
    if "+mask4d" in name:
        inputs["attention_mask"] = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()[None, None]
    return model, inputs


def with_image_tokens(model, inputs):
    """The ids with as many places for images or sounds in front as the model's message says that it wants."""
    token = lookup(model.config, "image_token_id", "image_token_index", "audio_token_id", "audio_token_index")
    if (
        token is None
        or "input_ids" not in inputs
        or not {"pixel_values", "input_features", "input_values"} & set(inputs)
    ):
        return inputs
    try:
        copy.deepcopy(model)(**inputs)
        return inputs
    except (ValueError, RuntimeError) as error:
        counts = [int(n) for n in re.findall(r"features:? (\d+)", str(error))]
        if not counts:
            raise
    wide = lookup(getattr(model.config, "text_config", model.config), "hidden_size", "d_model") or 1
    for places in (counts[0] // ROWS, counts[0] // ROWS // wide):  # some count features, others their elements
        front = torch.full((ROWS, places), token)
        longer = dict(inputs, input_ids=torch.cat([front, inputs["input_ids"]], 1))
        for key, value in (
            ("attention_mask", 1),
            ("labels", -100),
            ("token_type_ids", 0),
            ("mm_token_type_ids", 1),
        ):
            if key in inputs and inputs[key].shape[1:] == (LENGTH,):
                longer[key] = torch.cat([torch.full_like(front, value), inputs[key]], 1)
        with contextlib.suppress(ValueError, RuntimeError):
            copy.deepcopy(model)(**longer)
            break
    return longer


NAMES = MADE.read_text().split() if MADE.exists() else candidates()
