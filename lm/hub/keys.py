"""Keys of a config.json that no option of ours stands for: those with one supported value, and harmless ones.

Any other key that is set is refused, because it may change what the model computes.
"""

MUST = {  # keys of all families with one supported value, or a tuple of them; missing: transformers' default
    "hidden_act": "silu",
    "is_causal": True,
    "attention_dropout": 0,
    "mlp_bias": False,
    "bias": False,
    "use_sliding_window": False,
    "moe_layer_freq": 1,
    "router_jitter_noise": 0,
    "partial_rotary_factor": 1,
    "is_encoder_decoder": False,
    "add_cross_attention": False,
    "rope_interleaved": False,  # SmolLM's
    "activation": ("swiglu", "silu"),  # Falcon 3's
}
HARMLESS = {  # keys that do not change what the model computes, or that are read elsewhere
    *("architectures", "auto_map", "model_type", "_name_or_path", "name_or_path", "transformers_version"),
    *("torch_dtype", "dtype", "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "use_cache"),
    *("output_router_logits", "router_aux_loss_coef", "aux_loss_alpha", "seq_aux", "ep_size"),
    *("pretraining_tp", "num_nextn_predict_layers", "num_mtp_layers", "embedding_initializer_range"),
    *("sliding_window", "max_window_layers"),  # ignored while use_sliding_window is false
    *("quantization_config", "rope_theta", "rope_scaling", "rope_parameters", "rope_interleave"),
    *("first_k_dense_replace", "mlp_layer_types", "mlp_only_layers", "decoder_sparse_step", "layer_types"),
    *("shared_expert_intermediate_size", "topk_method", "head_dim", "qk_head_dim", "num_key_value_heads"),
    "num_local_experts",
    # transformers reads none of these in our architectures
    *("use_qk_norm", "qkv_bias", "is_llama_config", "unsloth_fixed", "unsloth_version", "tokenizer_class"),
    *("max_sequence_length", "model_max_length", "seq_length", "transformers.js_config", "prefix"),
    *("is_decoder", "cross_attention_hidden_size", "tie_encoder_decoder", "decoder_start_token_id"),
    *("chunk_size_feed_forward", "pruned_heads", "torchscript", "use_bfloat16", "tf_legacy_loss"),
    *("hidden_dropout", "hidden_dropout_prob", "attention_probs_dropout_prob", "neftune_noise_alpha"),
    *("attn_pdrop", "embd_pdrop", "resid_pdrop", "attn_dropout", "gradient_checkpointing"),
    *("id2label", "label2id", "num_labels", "problem_type", "finetuning_task", "task_specific_params"),
    *("return_dict", "output_attentions", "output_hidden_states", "output_scores", "use_return_dict"),
    *("_attn_implementation", "_attn_implementation_autoset", "attn_implementation", "_flash_attn_2_enabled"),
    *("_experts_implementation", "experts_implementation", "low_cpu_mem_usage", "trust_remote_code"),
    # settings of generate
    *("max_length", "min_length", "max_new_tokens", "do_sample", "early_stopping", "num_beams"),
    *("num_beam_groups", "num_return_sequences", "return_dict_in_generate", "temperature", "top_k", "top_p"),
    *("typical_p", "epsilon_cutoff", "eta_cutoff", "repetition_penalty", "length_penalty", "bad_words_ids"),
    *("diversity_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "forced_bos_token_id"),
    *("forced_eos_token_id", "suppress_tokens", "begin_suppress_tokens", "remove_invalid_values"),
    "exponential_decay_length_penalty",
}
ROPE_HARMLESS = {"attn_factor", "extrapolation_factor", "finetuned"}  # not read by transformers either
