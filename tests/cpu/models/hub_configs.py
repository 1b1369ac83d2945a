"""config.json of real checkpoints, as their hub versions spell them."""

from __future__ import annotations

LLAMA_31_8B = """{"architectures": ["LlamaForCausalLM"], "attention_bias": false,
"attention_dropout": 0.0, "bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009],
"hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336,
"max_position_embeddings": 131072, "mlp_bias": false, "model_type": "llama",
"num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8, "pretraining_tp": 1,
"rms_norm_eps": 1e-05, "rope_scaling": {"factor": 8.0, "low_freq_factor": 1.0,
"high_freq_factor": 4.0, "original_max_position_embeddings": 8192, "rope_type": "llama3"},
"rope_theta": 500000.0, "tie_word_embeddings": false, "torch_dtype": "bfloat16",
"transformers_version": "4.42.3", "use_cache": true, "vocab_size": 128256}"""

LLAMA_31_8B_NEW = """{"architectures": ["LlamaForCausalLM"], "attention_bias": false,
"attention_dropout": 0.0, "bos_token_id": 128000, "dtype": "bfloat16",
"eos_token_id": [128001, 128008, 128009], "head_dim": 128,
"hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336,
"max_position_embeddings": 131072, "mlp_bias": false, "model_type": "llama",
"num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8, "pad_token_id": null,
"pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_parameters": {"factor": 8.0,
"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
"rope_theta": 500000.0, "rope_type": "llama3"}, "tie_word_embeddings": false,
"transformers_version": "5.0.0", "use_cache": true, "vocab_size": 128256}"""

LLAMA_2_7B = """{"_name_or_path": "meta-llama/Llama-2-7b-hf",
"architectures": ["LlamaForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
"hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 11008,
"max_position_embeddings": 4096, "model_type": "llama", "num_attention_heads": 32,
"num_hidden_layers": 32, "num_key_value_heads": 32, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
"rope_scaling": null, "tie_word_embeddings": false, "torch_dtype": "float16",
"transformers_version": "4.31.0.dev0", "use_cache": true, "vocab_size": 32000}"""

QWEN3_30B_A3B = """{"architectures":["Qwen3MoeForCausalLM"],"attention_bias":false,
"attention_dropout":0.0,"bos_token_id":151643,"decoder_sparse_step":1,"eos_token_id":151645,
"head_dim":128,"hidden_act":"silu","hidden_size":2048,"initializer_range":0.02,
"intermediate_size":6144,"max_position_embeddings":40960,"max_window_layers":48,
"mlp_only_layers":[],"model_type":"qwen3_moe","moe_intermediate_size":768,"norm_topk_prob":true,
"num_attention_heads":32,"num_experts":128,"num_experts_per_tok":8,"num_hidden_layers":48,
"num_key_value_heads":4,"output_router_logits":false,"rms_norm_eps":1e-06,"rope_scaling":null,
"rope_theta":1000000.0,"router_aux_loss_coef":0.001,"sliding_window":null,
"tie_word_embeddings":false,"torch_dtype":"bfloat16","transformers_version":"4.51.0",
"use_cache":true,"use_sliding_window":false,"vocab_size":151936}"""

QWEN3_06B = """{"architectures": ["Qwen3ForCausalLM"], "attention_bias": false,
"attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151645, "head_dim": 128,
"hidden_act": "silu", "hidden_size": 1024, "initializer_range": 0.02, "intermediate_size": 3072,
"max_position_embeddings": 40960, "max_window_layers": 28, "model_type": "qwen3",
"num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8,
"rms_norm_eps": 1e-06, "rope_scaling": null, "rope_theta": 1000000, "sliding_window": null,
"tie_word_embeddings": true, "torch_dtype": "bfloat16", "transformers_version": "4.51.0",
"use_cache": true, "use_sliding_window": false, "vocab_size": 151936}"""

MIXTRAL_8X7B = """{"architectures": ["MixtralForCausalLM"], "attention_dropout": 0.0,
"bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 4096,
"initializer_range": 0.02, "intermediate_size": 14336, "max_position_embeddings": 32768,
"model_type": "mixtral", "num_attention_heads": 32, "num_experts_per_tok": 2,
"num_hidden_layers": 32, "num_key_value_heads": 8, "num_local_experts": 8,
"output_router_logits": false, "rms_norm_eps": 1e-05, "rope_theta": 1000000.0,
"router_aux_loss_coef": 0.02, "sliding_window": null, "tie_word_embeddings": false,
"torch_dtype": "bfloat16", "transformers_version": "4.36.0.dev0", "use_cache": true,
"vocab_size": 32000}"""

OLMOE_1B_7B = """{"architectures": ["OlmoeForCausalLM"], "attention_bias": false,
"attention_dropout": 0.0, "clip_qkv": null, "eos_token_id": 50279, "hidden_act": "silu",
"hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 1024,
"max_position_embeddings": 4096, "model_type": "olmoe", "norm_topk_prob": false,
"num_attention_heads": 16, "num_experts": 64, "num_experts_per_tok": 8, "num_hidden_layers": 16,
"num_key_value_heads": 16, "output_router_logits": false, "pad_token_id": 1, "rms_norm_eps": 1e-05,
"rope_scaling": null, "rope_theta": 10000.0, "router_aux_loss_coef": 0.01,
"tie_word_embeddings": false, "torch_dtype": "bfloat16", "transformers_version": "4.43.0.dev0",
"use_cache": true, "vocab_size": 50304}"""

SMOLLM2_135M = """{"architectures": ["LlamaForCausalLM"], "attention_bias": false,
"attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
"hidden_size": 576, "initializer_range": 0.041666666666666664, "intermediate_size": 1536,
"is_llama_config": true, "max_position_embeddings": 8192, "mlp_bias": false, "model_type": "llama",
"num_attention_heads": 9, "num_hidden_layers": 30, "num_key_value_heads": 3, "pad_token_id": 2,
"pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_interleaved": false, "rope_scaling": null,
"rope_theta": 100000, "tie_word_embeddings": true, "torch_dtype": "bfloat16",
"transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}},
"transformers_version": "4.42.3", "use_cache": true, "vocab_size": 49152}"""
