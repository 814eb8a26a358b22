"""Settings of tiny models of `transformers` and `diffusers`, with random weights, for tests and examples."""

IDS = "input_ids=<64:batch,length"
# The default of 0.02 leaves the attention of so small a model almost uniform.
SPREAD = {"initializer_range": 0.2}

# name: class, settings, inputs
TINY: dict[str, tuple[str, dict, list[str]]] = {
    "llama-tiny": (
        "transformers.LlamaForCausalLM",
        SPREAD
        | dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
        | dict(num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False, attention_dropout=0.0),
        [IDS],
    ),
    "gpt2-tiny": (
        "transformers.GPT2LMHeadModel",
        SPREAD | dict(vocab_size=64, n_positions=64, n_embd=32, n_layer=2, n_head=4),
        [IDS],
    ),
    "vit-tiny": (
        "transformers.ViTForImageClassification",
        SPREAD
        | dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, image_size=16)
        | dict(patch_size=4, num_labels=5, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1),
        ["pixel_values=normal:batch,3,16,16"],
    ),
    "t5-tiny": (
        "transformers.T5ForConditionalGeneration",
        dict(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, dropout_rate=0.1)
        | dict(feed_forward_proj="gated-gelu"),
        [IDS, "decoder_input_ids=<64:batch,length"],
    ),
    "unet-tiny": (
        "diffusers.UNet2DConditionModel",
        dict(sample_size=8, in_channels=4, out_channels=4, block_out_channels=(16, 32), layers_per_block=1)
        | dict(down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), cross_attention_dim=24)
        | dict(up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), attention_head_dim=4, norm_num_groups=4),
        ["sample=normal:batch,4,8,8", "timestep=<1000:batch", "encoder_hidden_states=normal:batch,length,24"],
    ),
    "sd3-tiny": (
        "diffusers.SD3Transformer2DModel",
        dict(sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, pos_embed_max_size=16)
        | dict(attention_head_dim=8, num_attention_heads=4, joint_attention_dim=24)
        | dict(caption_projection_dim=32, pooled_projection_dim=20),
        [
            "hidden_states=normal:batch,4,8,8",
            "encoder_hidden_states=normal:batch,length,24",
            "pooled_projections=normal:batch,20",
            "timestep=<1000:batch",
        ],
    ),
    "flux-tiny": (
        "diffusers.FluxTransformer2DModel",
        dict(patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16)
        | dict(num_attention_heads=2, joint_attention_dim=24, pooled_projection_dim=20, guidance_embeds=True)
        | dict(axes_dims_rope=(4, 6, 6)),
        [
            "hidden_states=normal:batch,16,16",
            "encoder_hidden_states=normal:batch,length,24",
            "pooled_projections=normal:batch,20",
            "timestep=uniform:batch",
            "img_ids=ones:16,3",
            "txt_ids=ones:length,3",
            "guidance=ones:batch",
        ],
    ),
    "sana-tiny": (
        "diffusers.SanaTransformer2DModel",
        dict(in_channels=4, out_channels=4, num_layers=2, sample_size=8, patch_size=1, caption_channels=24)
        | dict(num_attention_heads=2, attention_head_dim=8, num_cross_attention_heads=2)
        | dict(cross_attention_head_dim=8, cross_attention_dim=16),
        [
            "hidden_states=normal:batch,4,8,8",
            "encoder_hidden_states=normal:batch,length,24",
            "timestep=<1000:batch",
        ],
    ),
    "aura-flow-tiny": (
        "diffusers.AuraFlowTransformer2DModel",
        dict(sample_size=8, patch_size=2, in_channels=4, num_mmdit_layers=1, num_single_dit_layers=1)
        | dict(attention_head_dim=8, num_attention_heads=4, joint_attention_dim=24)
        | dict(caption_projection_dim=32, pos_embed_max_size=64),
        [
            "hidden_states=normal:batch,4,8,8",
            "encoder_hidden_states=normal:batch,length,24",
            "timestep=uniform:batch",
        ],
    ),
    "vae-tiny": (
        "diffusers.AutoencoderKL",
        dict(sample_size=16, block_out_channels=(8, 16), latent_channels=4, layers_per_block=1, norm_num_groups=4)
        | dict(down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2)
        | dict(scaling_factor=1.5, shift_factor=0.06),
        ["sample=normal:batch,3,16,16"],
    ),
    "dc-vae-tiny": (
        "diffusers.AutoencoderDC",
        dict(in_channels=3, latent_channels=4, attention_head_dim=2, scaling_factor=0.41407)
        | {
            f"{half}_{name}": value
            for half in ("encoder", "decoder")
            for name, value in [
                ("block_types", ("ResBlock", "EfficientViTBlock")),
                ("block_out_channels", (8, 8)),
                ("layers_per_block", (1, 1)),
                ("qkv_multiscales", ((), (5,))),
            ]
        },
        ["sample=normal:batch,3,16,16"],
    ),
}
