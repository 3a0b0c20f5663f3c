"""Tiny configurations of KerasHub's tasks that are made of several models."""

import keras_hub
import numpy as np
from hub_configurations import PATCHES
from hub_configurations import RESNET
from hub_configurations import TINY_CONVOLUTIONS
from hub_configurations import VOCABULARY
from keras_hub.src.models.vae.vae_backbone import VAEBackbone  # Not public.

models, layers = keras_hub.models, keras_hub.layers
BLOCKS = {
    "num_layers": 2,
    "num_heads": 2,
    "hidden_dim": 16,
    "intermediate_dim": 32,
}
IMAGE_TOKEN, AUDIO_TOKEN = 20, 21
UNKNOWN_SIZE = {"image_shape": (None, None, 3)}


def blip2(language_model, **options):
    """Return the parts of a BLIP-2: one that sees, and one that speaks."""
    return {
        "vision_encoder": models.BLIP2VisionEncoder(
            **BLOCKS,
            image_size=16,
            patch_size=4,
            use_patch_bias=True,
            use_class_token=True,
            use_mha_bias=True,
            use_mlp_bias=True,
            dropout_rate=0.0,
            layer_norm_epsilon=1e-5,
            initializer_range=0.02,
        ),
        "qformer": models.BLIP2QFormer(
            **BLOCKS,
            num_query_tokens=4,
            vision_dim=16,
            cross_attention_frequency=2,
            dropout=0.0,
            layer_norm_epsilon=1e-5,
        ),
        "language_model": language_model(
            **BLOCKS,
            vocabulary_size=VOCABULARY,
            num_query_tokens=4,
            qformer_hidden_dim=16,
            dropout=0.0,
            **options,
        ),
    }


def d_fine():
    stages = {
        "depths": [1, 1],
        "hidden_sizes": [8, 8],
        "out_features": ["stage1", "stage2"],
    }
    hgnet = TINY_CONVOLUTIONS["HGNetV2Backbone"]
    encoder = models.HGNetV2Backbone(**{**hgnet, **stages, **UNKNOWN_SIZE})
    return {
        "image_shape": (32, 32, 3),
        "backbone": encoder,
        "out_features": stages["out_features"],
        "encoder_in_channels": [8, 8],
        "encoder_hidden_dim": 16,
        "encoder_ffn_dim": 32,
        "encode_proj_layers": [1],
        "num_encoder_layers": 1,
        "num_attention_heads": 2,
        "hidden_expansion": 0.5,
        "depth_multiplier": 0.5,
        "decoder_in_channels": [16, 16],
        "hidden_dim": 16,
        "num_decoder_layers": 1,
        "decoder_attention_heads": 2,
        "decoder_ffn_dim": 32,
        "decoder_n_points": [2, 2],
        "lqe_hidden_dim": 16,
        "num_lqe_layers": 1,
        "num_labels": 3,
        "num_queries": 6,
        "num_denoising": 0,
        "learn_initial_query": False,
        "eval_idx": -1,
        "num_feature_levels": 2,
        "feat_strides": [4, 8],
        "anchor_image_size": (32, 32),
        "seed": 0,
    }


def gemma3n():
    vision = models.MobileNetV5Backbone(
        **{
            **TINY_CONVOLUTIONS["MobileNetV5Backbone"],
            "image_shape": (16, 16, 3),
        }
    )
    audio = {
        "hidden_size": 4,
        "input_feat_size": 16,
        "sscp_conv_channel_size": [2, 4],
        "sscp_conv_kernel_size": [(1, 1), (1, 1)],
        "sscp_conv_stride_size": [(2, 2), (2, 2)],
        "sscp_conv_group_norm_eps": 1e-5,
        "num_hidden_layers": 1,
        "rms_norm_eps": 1e-6,
        "gradient_clipping": 1.0,
        "residual_weight": 0.5,
        "num_attention_heads": 1,
        "attention_chunk_size": 2,
        "num_attention_context_right": 1,
        "num_attention_context_left": 1,
        "attention_logit_cap": 50.0,
        "conv_kernel_size": 3,
        "reduction_factor": 1,
    }
    return {
        "text_vocab_size": VOCABULARY,
        "text_hidden_size": 8,
        "num_hidden_layers": 2,
        "pad_token_id": 0,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 4,
        "intermediate_size": [16, 16],
        "hidden_activation": "gelu_approximate",
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 4,
        "rope_theta": 10000.0,
        "max_position_embeddings": 16,
        "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size_per_layer_input": 8,
        "altup_num_inputs": 2,
        "laurel_rank": 4,
        "vision_encoder_config": vision.get_config(),
        "vision_hidden_size": 8,
        "image_token_id": IMAGE_TOKEN,
        "audio_encoder_config": audio,
        "audio_hidden_size": 4,
        "audio_token_id": AUDIO_TOKEN,
        "audio_soft_tokens_per_image": 1,
    }


def parseq():
    image = {**PATCHES, "mlp_dim": 32, "use_class_token": False}
    return {
        "vocabulary_size": VOCABULARY,
        "max_label_length": 8,
        "image_encoder": models.ViTBackbone(**image),
        "num_decoder_heads": 2,
        "num_decoder_layers": 2,
        "decoder_hidden_dim": 16,
        "decoder_mlp_dim": 32,
    }


def sam():
    return {
        "image_encoder": models.ViTDetBackbone(
            hidden_size=16,
            num_layers=2,
            intermediate_dim=32,
            num_heads=2,
            global_attention_layer_indices=[1],
            patch_size=8,
            num_output_channels=16,
            window_size=2,
            image_shape=(32, 32, 3),
        ),
        "prompt_encoder": layers.SAMPromptEncoder(
            hidden_size=16,
            image_embedding_size=(4, 4),
            input_image_size=(32, 32),
            mask_in_channels=4,
        ),
        "mask_decoder": layers.SAMMaskDecoder(
            num_layers=2,
            hidden_size=16,
            intermediate_dim=32,
            num_heads=2,
            embedding_dim=16,
            num_multimask_outputs=3,
            iou_head_depth=3,
            iou_head_hidden_dim=8,
        ),
    }


def sam3():
    picture = {"image_shape": (28, 28, 3), "patch_size": 14}
    return {
        "vision_encoder": layers.SAM3VisionEncoder(
            **BLOCKS,
            **picture,
            fpn_hidden_dim=16,
            fpn_scale_factors=[4.0, 2.0, 1.0, 0.5],
            pretrain_image_shape=(42, 42, 3),
            window_size=2,
            global_attn_indexes=[1, 2],
        ),
        "text_encoder": layers.SAM3TextEncoder(
            **BLOCKS, vocabulary_size=VOCABULARY, embedding_dim=16
        ),
        "geometry_encoder": layers.SAM3GeometryEncoder(**BLOCKS, roi_size=7),
        "detr_encoder": layers.SAM3DetrEncoder(**BLOCKS),
        "detr_decoder": layers.SAM3DetrDecoder(
            **BLOCKS, **picture, num_queries=4
        ),
        "mask_decoder": layers.SAM3MaskDecoder(
            num_upsampling_stages=3, hidden_dim=16, num_heads=2
        ),
    }


def stable_diffusion_3():
    def clip(name, activation):
        return models.CLIPTextEncoder(
            **BLOCKS,
            vocabulary_size=VOCABULARY,
            embedding_dim=16,
            intermediate_activation=activation,
            intermediate_output_index=-2,
            name=name,
        )

    return {
        "mmdit_patch_size": 2,
        "mmdit_hidden_dim": 32,
        "mmdit_num_layers": 2,
        "mmdit_num_heads": 2,
        "mmdit_position_size": 192,
        "mmdit_qk_norm": None,
        "mmdit_dual_attention_indices": None,
        "vae": VAEBackbone(
            *([32] * 4, [1] * 4) * 2, sampler_method="mode", name="vae"
        ),
        "clip_l": clip("clip_l", "quick_gelu"),
        "clip_g": clip("clip_g", "gelu"),
        "image_shape": (32, 32, 3),
    }


# Arguments of each backbone, by the task: two share one.
COMPOSITES = {
    "BASNetImageSegmenter": lambda: {
        "image_encoder": models.ResNetBackbone(
            **{
                **RESNET,
                "stackwise_num_filters": [64, 8, 8, 8],
                "stackwise_num_blocks": [1] * 4,
                "stackwise_num_strides": [1, 2, 2, 2],
            }
        ),
        "num_classes": 2,  # One filter has no lower rank.
        "image_shape": (32, 32, 3),
    },
    "BLIP2CausalLM": lambda: blip2(
        models.BLIP2CustomOPT, max_sequence_length=16
    ),
    "BLIP2Seq2SeqLM": lambda: blip2(models.BLIP2FlanT5),
    "DFineObjectDetector": d_fine,
    "FluxTextToImage": {
        "input_channels": 4,
        "hidden_size": 16,
        "mlp_ratio": 2.0,
        "num_heads": 2,
        "depth": 1,
        "depth_single_blocks": 1,
        "axes_dim": [4, 2, 2],
        "theta": 10000,
        "use_bias": True,
        "guidance_embed": True,
        "image_shape": (4, 4),
        "text_shape": (3, 8),
        "image_ids_shape": (4, 3),
        "text_ids_shape": (3, 3),
        "y_shape": (8,),
    },
    "Gemma3nCausalLM": gemma3n,
    "PARSeqCausalLM": parseq,
    "RetinaNetObjectDetector": lambda: {
        "image_encoder": models.ResNetBackbone(
            **{
                **RESNET,
                **UNKNOWN_SIZE,
                "stackwise_num_filters": [64, 8, 8],
                "stackwise_num_blocks": [1] * 3,
                "stackwise_num_strides": [1, 2, 2],
            }
        ),
        "min_level": 3,
        "max_level": 4,
        "use_p5": False,
        "image_shape": (32, 32, 3),
    },
    "SAM3PromptableConceptImageSegmenter": sam3,
    "SAMImageSegmenter": sam,
    "StableDiffusion3ImageToImage": stable_diffusion_3,
    "StableDiffusion3Inpaint": stable_diffusion_3,
    "StableDiffusion3TextToImage": stable_diffusion_3,
}


def options_of(name):
    """Return arguments of a task that no other one has."""
    if name == "PARSeqCausalLM":
        tokenizer = models.PARSeqTokenizer(max_label_length=8)
        return {
            "preprocessor": models.PARSeqCausalLMPreprocessor(
                tokenizer=tokenizer
            )
        }
    if name.endswith("ObjectDetector"):
        decoder = layers.NonMaxSuppression(
            "yxyx", from_logits=True, confidence_threshold=0.0
        )
        return {"prediction_decoder": decoder}
    return {}


def inputs_of_composite(model, x, generator):
    """Replace random inputs by such as a task can take, in place."""
    if not isinstance(x, dict):
        return
    rows = len(next(iter(x.values())))

    def uniform(highest, *shape):
        return generator.uniform(0, highest, (rows, *shape)).astype("float32")

    if isinstance(model, models.SAMImageSegmenter):
        x["labels"] = np.ones((rows, 2), "float32")
        x["points"] = uniform(32, 2, 2)
        x["boxes"] = uniform(32, 1, 2, 2)
        x["masks"] = uniform(1, 1, 16, 16, 1)
    if "box_labels" in x:
        x["box_labels"] = np.ones((rows, 1), "int32")
        x["boxes"] = uniform(1, 1, 5)
        x["boxes"][:, 0, 0] = np.arange(rows)  # Which row each belongs to.
    if "num_steps" in x:
        x["num_steps"] = np.full((rows,), 2, "int32")
    if "input_features" in x:
        x["token_ids"] %= IMAGE_TOKEN
        x["token_ids"][:, 1:5] = IMAGE_TOKEN
        x["token_ids"][:, 6] = AUDIO_TOKEN
        x["images"] = x["images"][:, :1]
        x["input_features"] = x["input_features"][:, :1]
        x["input_features_mask"] = x["input_features_mask"][:, :1]
