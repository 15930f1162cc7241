"""A conversation, and transformers' rendering of chat templates."""

import tokenizers
import transformers

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "wetter",
            "description": 'Wie ist\'s in <Köln> & "Umgebung"? 天气',
            "parameters": {"type": "object", "properties": {"ort": {"type": "string"}}, "required": ["ort"]},
        },
    }
]
SYSTEM = {"role": "system", "content": "  Be brief.\nAlways. "}
TURNS = [
    {"role": "user", "content": " Grüße! <b>&'\"\n你好 👋 {{ not a variable }} {% nor a tag %}"},
    {"role": "assistant", "content": "Hello </s>\n there", "reasoning": "be polite"},
    {"role": "user", "content": "And the weather?"},
]


def reference(template: str, messages: list, **arguments) -> str:
    """Return what transformers renders."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    return tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, **arguments)
