"""Shapes and texts to measure and compare with: published sizes of models, and one question in several wordings."""

from __future__ import annotations

from typing import Any

_LLAMA_3 = {
    "vocab_size": 128256,
    "head_dim": 128,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    "bos_token_id": 128000,
    "eos_token_id": 128001,
}
_TINY = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 131072,
}
CONFIGS: dict[str, dict[str, Any]] = {  # as published, but without the RoPE scaling of 3.1 and 3.2
    "llama-3.1-8b": _LLAMA_3
    | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "llama-3.2-1b": _LLAMA_3
    | {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32}
    | {"head_dim": 64, "tie_word_embeddings": True},
    "llama-3.2-3b": _LLAMA_3
    | {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24}
    | {"tie_word_embeddings": True},
    "llama-3.1-70b": _LLAMA_3
    | {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
    "tiny": _TINY,
    "tiny-qwen3": _TINY
    | {"model_type": "qwen3", "head_dim": 32, "use_sliding_window": True, "sliding_window": 24}
    | {"layer_types": ["full_attention", "sliding_attention"]},
}
PARAPHRASES = (
    "A farmer has twelve apples in a basket. He gives three of them to his neighbour and two to his daughter, and "
    "then finds one more under the tree. In the afternoon a traveller comes to the farm and buys half of what is "
    "left. In the evening the farmer's wife brings four apples home from the market, and puts them into the same "
    "basket. At night a mouse spoils one apple, which the farmer throws away. How many good apples are in the "
    "basket now?",
    "There are twelve apples in the basket of a farmer. Three go to the neighbour, two go to the daughter, and one "
    "is found below the tree. Half of those that remain are sold to a traveller who visits the farm in the "
    "afternoon. Then the wife of the farmer comes back from the market with four more, which she adds to the "
    "others. During the night one of them is spoiled by a mouse and has to be thrown away. What is the number of "
    "good apples in the end?",
    "Starting with twelve apples, a farmer hands three to a neighbour and two to his daughter. Under the tree he "
    "finds another one. A man on a journey stops at the farm after noon, and he pays for one half of the apples "
    "that are there. From the market, his wife carries four apples into the house before it is dark. The next "
    "morning they see that a mouse has eaten from one of the apples, so they do not keep that one. Count the good "
    "apples that they have.",
    "Someone who grows apples owns twelve of them. After presenting three to the person next door and two to his "
    "daughter, he picks up one more from under the tree. Later that day he sells half of all his apples to a "
    "stranger who is passing by. His wife, who was at the market, returns with four of them and lays them beside "
    "the rest. A mouse gets at one apple while everybody sleeps, and it is no longer good. How many good ones does "
    "he own?",
    "Twelve apples lie in a basket. The farmer whose basket it is takes out three for his neighbour and two for his "
    "daughter. He puts in one which he found under the tree. A traveller then buys every second apple from the "
    "basket. Four apples, which the farmer's wife got at the market, are put into it in the evening. In the night "
    "one apple is bitten by a mouse, and in the morning it is taken out. How many good apples lie in the basket "
    "after all of this?",
)
