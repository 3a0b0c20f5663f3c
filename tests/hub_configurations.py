"""Tiny configurations of KerasHub's backbones."""

import keras_hub

VOCABULARY, LENGTH = 24, 8
models = keras_hub.models

ENCODER = {
    "vocabulary_size": VOCABULARY,
    "num_layers": 2,
    "num_heads": 2,
    "hidden_dim": 16,
    "intermediate_dim": 32,
}
WITH_POSITIONS = {**ENCODER, "max_sequence_length": LENGTH}
DECODER = {
    "vocabulary_size": VOCABULARY,
    "num_layers": 2,
    "num_query_heads": 4,
    "num_key_value_heads": 2,
    "hidden_dim": 16,
    "intermediate_dim": 32,
}
WITH_HEAD_SIZE = {**DECODER, "head_dim": 8}
LINEAR_ATTENTION = {
    "partial_rotary_factor": 0.5,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
IMAGE = (16, 16, 3)
PATCHES = {
    "image_shape": IMAGE,
    "patch_size": 4,
    "num_layers": 2,
    "num_heads": 2,
    "hidden_dim": 16,
}
PICTURE = {"image_shape": (32, 32, 3)}
EXPERTS = {"num_experts": 4, "top_k": 2}


def without(config, *names, **others):
    kept = {name: v for name, v in config.items() if name not in names}
    return {**kept, **others}


def two_sides():
    one = {
        "hidden_dim": 16,
        "intermediate_dim": 32,
        "num_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 4,
        "layer_types": ["sliding_attention", "full_attention"],
    }
    both = {
        f"{s}_{k}": v for s in ("encoder", "decoder") for k, v in one.items()
    }
    return {"vocabulary_size": VOCABULARY, "sliding_window": 4, **both}


# Arguments of each backbone, by its class.
TINY = {
    "AlbertBackbone": {**WITH_POSITIONS, "embedding_dim": 8},
    "BartBackbone": WITH_POSITIONS,
    "BertBackbone": WITH_POSITIONS,
    "BloomBackbone": ENCODER,
    "DebertaV3Backbone": {**WITH_POSITIONS, "bucket_size": 4},
    "DistilBertBackbone": WITH_POSITIONS,
    "ESMBackbone": WITH_POSITIONS,
    "EdRecBackbone": {
        "vocab_size": VOCABULARY,
        "num_layers_enc": 2,
        "num_layers_dec": 2,
        "hidden_dim": 16,
        "intermediate_dim": 32,
        "num_heads": 2,
    },
    "FNetBackbone": without(WITH_POSITIONS, "num_heads"),
    "FalconBackbone": without(ENCODER, "num_heads", num_attention_heads=2),
    "GPT2Backbone": WITH_POSITIONS,
    "GPTNeoXBackbone": {**WITH_POSITIONS, "rotary_percentage": 0.5},
    "Gemma3Backbone": {**WITH_HEAD_SIZE, "image_size": 16},
    "Gemma4Backbone": {**WITH_HEAD_SIZE, "image_size": 16},
    "GemmaBackbone": WITH_HEAD_SIZE,
    "GptOssBackbone": {**DECODER, **EXPERTS},
    "Llama3Backbone": DECODER,
    "LlamaBackbone": DECODER,
    "MistralBackbone": DECODER,
    "MixtralBackbone": {**DECODER, **EXPERTS},
    "OPTBackbone": WITH_POSITIONS,
    "Phi3Backbone": DECODER,
    "Qwen3Backbone": WITH_HEAD_SIZE,
    "Qwen3MoeBackbone": {
        **WITH_HEAD_SIZE,
        **EXPERTS,
        "moe_intermediate_dim": 16,
    },
    "Qwen3_5Backbone": {**WITH_HEAD_SIZE, **LINEAR_ATTENTION},
    "Qwen3_5MoeBackbone": without(
        {**WITH_HEAD_SIZE, **LINEAR_ATTENTION, **EXPERTS},
        "intermediate_dim",
        moe_intermediate_dim=16,
        shared_expert_intermediate_size=16,
    ),
    "QwenBackbone": DECODER,
    "QwenMoeBackbone": {
        **DECODER,
        **EXPERTS,
        "moe_intermediate_dim": 16,
        "shared_expert_intermediate_dim": 16,
    },
    "RWKV7Backbone": {
        "vocabulary_size": VOCABULARY,
        "num_layers": 2,
        "hidden_size": 16,
        "head_size": 8,
        "intermediate_dim": 32,
        "gate_lora": 4,
        "mv_lora": 4,
        "aaa_lora": 4,
        "decay_lora": 4,
    },
    "RobertaBackbone": WITH_POSITIONS,
    "RoformerV2Backbone": {**ENCODER, "head_size": 8},
    "SmolLM3Backbone": {
        "vocabulary_size": VOCABULARY,
        "num_layers": 2,
        "hidden_dim": 16,
        "intermediate_dim": 32,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "rope_layer_enabled_list": [True, False],
        "layer_types": ["full_attention"] * 2,
        "mlp_bias": False,
        "layer_norm_epsilon": 1e-6,
        "max_position_embeddings": 16,
        "rope_theta": 10000.0,
        "partial_rotary_factor": 1.0,
    },
    "T5Backbone": ENCODER,
    "T5Gemma2Backbone": two_sides(),
    "T5GemmaBackbone": two_sides(),
    "XLMRobertaBackbone": WITH_POSITIONS,
    "DeiTBackbone": {**PATCHES, "intermediate_dim": 32},
    "MiTBackbone": {
        "image_shape": IMAGE,
        "num_layers": 2,
        "hidden_dims": [8, 16],
        "layerwise_depths": [1, 1],
        "layerwise_num_heads": [1, 2],
        "layerwise_sr_ratios": [1, 1],
        "layerwise_patch_sizes": [3, 3],
        "layerwise_strides": [2, 2],
        "max_drop_path_rate": 0.0,
    },
    "SwinTransformerBackbone": {
        "image_shape": IMAGE,
        "embed_dim": 8,
        "depths": [1, 1],
        "num_heads": [2, 2],
        "window_size": 2,
        "patch_size": 2,
        "drop_path": 0.0,
    },
    "ViTBackbone": {**PATCHES, "mlp_dim": 32},
    # Put together of several models.
    "DepthAnythingBackbone": lambda: {
        "image_encoder": models.DINOV2Backbone(
            **{**PATCHES, **PICTURE, "num_layers": 4},
            intermediate_dim=32,
            position_embedding_shape=(32, 32),
        ),
        "feature_keys": [f"stage{n}" for n in range(1, 5)],
        "reassemble_factors": [4, 2, 1, 0.5],
        "neck_hidden_dims": [4, 4, 8, 8],
        "fusion_hidden_dim": 8,
        "head_hidden_dim": 4,
        "head_in_index": -1,
    },
    "MoonshineBackbone": {
        "vocabulary_size": VOCABULARY,
        "filter_dim": 16,
        "encoder_num_layers": 2,
        "decoder_num_layers": 2,
        "hidden_dim": 16,
        "intermediate_dim": 32,
        "encoder_num_heads": 2,
        "decoder_num_heads": 2,
    },
    "PaliGemmaBackbone": {
        **WITH_HEAD_SIZE,
        "image_size": 16,
        "vit_patch_size": 4,
        "vit_num_heads": 2,
        "vit_hidden_dim": 8,
        "vit_num_layers": 2,
        "vit_intermediate_dim": 16,
    },
    "SegFormerBackbone": lambda: {
        "image_encoder": models.MiTBackbone(
            **PICTURE,
            num_layers=4,
            hidden_dims=[4, 8, 16, 32],
            layerwise_depths=[1] * 4,
            layerwise_num_heads=[1, 1, 2, 2],
            layerwise_sr_ratios=[1] * 4,
            layerwise_patch_sizes=[3] * 4,
            layerwise_strides=[2] * 4,
            max_drop_path_rate=0.0,
        ),
        "projection_filters": 8,
    },
}
RESNET = {
    "input_conv_filters": [64],
    "input_conv_kernel_sizes": [3],
    "stackwise_num_filters": [64, 8],  # The first cannot be less.
    "stackwise_num_blocks": [1, 1],
    "stackwise_num_strides": [1, 2],
    "block_type": "basic_block",
}
# Those whose kernels are convolutions.
TINY_CONVOLUTIONS = {
    "CSPNetBackbone": {
        "image_shape": IMAGE,
        "stem_filters": 4,
        "stem_kernel_size": 3,
        "stem_strides": 1,
        "stackwise_depth": [1, 1],
        "stackwise_strides": [1, 2],
        "stackwise_num_filters": [4, 8],
        "block_type": "dark_block",
        "stage_type": "dark",
    },
    "DeepLabV3Backbone": lambda: {
        **PICTURE,
        "image_encoder": models.ResNetBackbone(**RESNET, **PICTURE),
        "projection_filters": 4,
        "low_level_feature_key": "P2",
        "spatial_pyramid_pooling_key": "P3",
        "upsampling_size": 2,
        "dilation_rates": [1, 2],
    },
    "DenseNetBackbone": {
        **PICTURE,
        "stackwise_num_repeats": [1, 1],
        "growth_rate": 4,
    },
    "EfficientNetBackbone": {
        "input_shape": IMAGE,
        "stackwise_width_coefficients": [1.0, 1.0],
        "stackwise_depth_coefficients": [1.0, 1.0],
        "stackwise_kernel_sizes": [3, 3],
        "stackwise_num_repeats": [1, 1],
        "stackwise_input_filters": [8, 8],
        "stackwise_output_filters": [8, 8],
        "stackwise_expansion_ratios": [2, 2],
        "stackwise_squeeze_and_excite_ratios": [0.0, 0.25],
        "stackwise_strides": [1, 2],
        "stackwise_block_types": ["v1", "unfused"],
        "stackwise_force_input_filters": [0, 0],
        "stackwise_nores_option": [False, False],
        "min_depth": 4,
        "num_features": 8,
    },
    "HGNetV2Backbone": {
        "image_shape": IMAGE,
        "depths": [1, 1],
        "embedding_size": 4,
        "hidden_sizes": [8, 8],
        "stem_channels": [3, 4, 4],
        "hidden_act": "relu",
        "use_learnable_affine_block": False,
        "stackwise_stage_filters": [(4, 4, 8, 1, 1, 3), (8, 4, 8, 1, 1, 3)],
        "apply_downsample": [False, True],
        "use_lightweight_conv_block": [False, True],
    },
    "MobileNetBackbone": {
        **PICTURE,
        "stackwise_expansion": [[8]],
        "stackwise_num_blocks": [1],
        "stackwise_num_filters": [[8]],
        "stackwise_kernel_size": [[3]],
        "stackwise_num_strides": [[2]],
        "stackwise_se_ratio": [[0.25]],
        "stackwise_activation": [["relu"]],
        "stackwise_padding": [[1]],
        "input_num_filters": 8,
        "output_num_filters": 8,
        "depthwise_filters": 8,
        "depthwise_stride": 1,
        "depthwise_residual": False,
        "last_layer_filter": 8,
        "squeeze_and_excite": 0.5,
    },
    "MobileNetV5Backbone": {
        **PICTURE,
        "stackwise_block_types": [["er"], ["uir", "mqa"]],
        "stackwise_num_blocks": [1, 2],
        "stackwise_num_filters": [[8], [8, 8]],
        "stackwise_strides": [[2], [2, 1]],
        "stackwise_act_layers": [["relu"], ["relu", "relu"]],
        "stackwise_exp_ratios": [[2.0], [2.0, 1.0]],
        "stackwise_se_ratios": [[0.0], [0.0, 0.0]],
        "stackwise_dw_kernel_sizes": [[0], [3, 3]],
        "stackwise_dw_start_kernel_sizes": [[0], [0, 0]],
        "stackwise_dw_end_kernel_sizes": [[0], [0, 0]],
        "stackwise_exp_kernel_sizes": [[3], [0, 0]],
        "stackwise_pw_kernel_sizes": [[1], [0, 0]],
        "stackwise_num_heads": [[0], [0, 2]],
        "stackwise_key_dims": [[0], [0, 4]],
        "stackwise_value_dims": [[0], [0, 4]],
        "stackwise_kv_strides": [[0], [0, 1]],
        "stackwise_use_cpe": [[False], [False, False]],
        "use_msfa": False,
        "stem_size": 4,
        "num_features": 16,
    },
    "ResNetBackbone": {"image_shape": IMAGE, **RESNET},
    "VGGBackbone": {
        **PICTURE,
        "stackwise_num_repeats": [1, 1],
        "stackwise_num_filters": [4, 8],
    },
    "XceptionBackbone": {
        **PICTURE,
        "stackwise_conv_filters": [[4, 8], [8, 8]],
        "stackwise_pooling": [True, False],
    },
}
