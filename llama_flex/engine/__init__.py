"""Generation: the engine, its scheduler and paged KV cache, compiled steps and their replay, prompt fusion."""
