"""Run EleutherAI's lm-eval on this engine: `python -m llama_flex.eval.lm_eval --model llama_flex --model_args
pretrained=NAME`.

The rest of the command line is lm-eval's own. In Python: `lm_eval.simple_evaluate(LlamaFlex(engine), tasks=[...])`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import sys
from collections.abc import Sequence
from typing import Any

import torch
from tqdm import tqdm

try:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ModuleNotFoundError as error:
    needs = f"llama_flex.eval.lm_eval needs lm-eval ({error}): pip install 'llama_flex[eval]'"
    if __name__ == "__main__":
        sys.exit(f"error: {needs}")
    raise ImportError(needs) from error

from ..checkpoint.files import one_line
from ..checkpoint.generation_config import GenerationConfig
from ..engine.engine import Engine
from ..logits.parameters import Sampling
from ..masks.mask import Mask
from ..masks.scores import ScoreMod
from ..model import Llama
from ..tokenizer import Tokenizer
from ..usercode.arguments import whole_number
from .scoring import score

# Other options of transformers' generate, with values that do not change the text.
_NEUTRAL = {"early_stopping": (False,), "length_penalty": (1,), "renormalize_logits": (False,)}
_NEUTRAL_WHATEVER_THE_VALUE = ("use_cache", "pad_token_id")


@register_model("llama_flex")
class LlamaFlex(TemplateLM):
    """A model for lm-eval; a mask and score function, if given, apply to all requests.

    Continuations of one context, such as the choices of a question, are scored in one batch after it.
    """

    def __init__(
        self,
        pretrained: str | Engine,
        *,
        batch_size: int | str = 16,
        compile: bool = False,
        dtype: str | None = None,
        device: str | None = None,
        mask: Mask | None = None,
        score_mod: ScoreMod | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        """pretrained: a folder or hub name; or an Engine with a tokenizer, which overrides compile, dtype and device.

        batch_size: continuations of a context at a time. dtype: such as "bfloat16", default ("auto") the checkpoint's
        own. max_batch_size: not used; lm-eval passes it. Raises ValueError for invalid arguments.
        """
        super().__init__()
        if not str(batch_size).isdecimal():
            raise ValueError(f"batch_size must be a whole number, not {batch_size!r}")
        batch_size = whole_number("batch_size", int(batch_size), least=1)
        if not isinstance(pretrained, Engine):
            kind: Any = None if dtype in (None, "auto") else getattr(torch, str(dtype), dtype)
            model = Llama.from_pretrained(pretrained, device=device, dtype=kind)
            pretrained = Engine(model, Tokenizer.from_pretrained(pretrained), compile=compile)
        if pretrained.tokenizer is None:
            raise ValueError("lm-eval works with text; the engine needs a tokenizer: Engine(model, tokenizer)")
        self.engine, self.text, self.batch_size = pretrained, pretrained.tokenizer, batch_size
        self.rules: dict[str, Any] = {"mask": mask, "score_mod": score_mod}

    @property
    def eot_token_id(self) -> int:
        """The id that ends a text. Raises ValueError if neither the model nor the tokenizer names one."""
        ids = (*self.engine.model.eos_token_ids, self.text.eos_token_id)
        if ids[0] is None:
            raise ValueError("neither the model nor the tokenizer names an end-of-text id, and this task needs one")
        return ids[0]

    @property
    def prefix_token_id(self) -> int:
        """The id before a text without a context: beginning of text, else end of text."""
        bos = self.text.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        """A name for lm-eval's cache of requests, different for different vocabularies."""
        pieces = "\n".join(str(self.text.token(id)) for id in range(self.text.vocab_size))
        return f"llama_flex {hashlib.sha256(pieces.encode()).hexdigest()[:16]}"

    def chat_template(self, chat_template: bool | str = False) -> str:
        """Return the tokenizer's template, used by `apply_chat_template`; lm-eval tells cached requests apart by it."""
        return self.text.chat_template or ""

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Render a conversation as text; without a generation prompt, the last message is left open to be continued."""
        return self.text.apply_chat_template(
            chat_history,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Return the ids of a text, with a beginning-of-text id if the tokenizer adds one and the text has none yet."""
        begun = self.text.bos_token is not None and string.startswith(self.text.bos_token)
        return self.text.encode(
            string, add_special_tokens=not begun if add_special_tokens is None else add_special_tokens
        )

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str] | None, list[int], list[int]]], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        results: list[tuple[float, bool]] = []
        bar = tqdm(total=len(requests), desc="log-likelihoods", disable=disable_tqdm)

        def before(request: tuple[object, list[int], list[int]]) -> list[int]:
            """Return the end of the context that leaves room for the continuation, whose last token is not fed."""
            _, context, text = request
            most = self.engine.model.context
            if len(text) > most:
                raise ValueError(f"a continuation of {len(text)} tokens exceeds the context of {most}")
            return context[-(most + 1 - len(text)) :]

        for context, group in itertools.groupby(requests, key=before):
            pairs = list(group)
            texts = [text for _, _, text in pairs]
            scores = score(self.engine, context, texts, batch_size=self.batch_size, **self.rules)
            for (pair, _, _), found in zip(pairs, scores, strict=True):
                results.append((found.total, bool(found.greedy.all())))
                if pair is not None:
                    self.cache_hook.add_partial("loglikelihood", pair, results[-1])
            bar.update(len(pairs))
        bar.close()
        return results

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return the log-probability of each whole text, in the windows that lm-eval defines for every model."""
        totals = []
        for (text,) in (request.args for request in tqdm(requests, desc="texts", disable=disable_tqdm)):
            ids = self.text.encode(text, add_special_tokens=False)
            windows = get_rolling_token_windows(ids, self.prefix_token_id, self.engine.model.context, 1)
            pairs = [(None, *make_disjoint_window(window)) for window in windows]
            totals.append(sum(total for total, _ in self._loglikelihood_tokens(pairs, disable_tqdm=True)))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), totals[-1])
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Generate texts up to a stop string, many at a time; a prompt that is too long is cut at its beginning.

        Options that are not given have the defaults of transformers' generate: those of generation_config.json, or
        else, when sampling, a temperature of 1 and a top_k of 50.
        """
        asked, context = [], self.engine.model.context
        try:
            for text, options in (request.args for request in requests):
                options = {name: value for name, value in options.items() if value is not None}
                options = dict(normalize_gen_kwargs(options))
                until, count, samples = (options.pop(name) for name in ("until", "max_gen_toks", "do_sample"))
                options = {name: value for name, value in options.items() if not _is_neutral(name, value)}
                if unknown := options.keys() - {field.name for field in dataclasses.fields(Sampling)}:
                    raise ValueError(f"generation options {sorted(unknown)} are not known; see Sampling")
                if count >= context:
                    raise ValueError(f"max_gen_toks {count} leaves no room for a prompt in the context of {context}")
                defaults = dataclasses.replace(self.engine.model.generation_config, do_sample=samples)
                asked.append(
                    self.engine.submit(
                        self.tok_encode(text)[-(context - count) :],
                        max_new_tokens=count,
                        sampling=Sampling.recommended(defaults, **options),
                        stop=until,
                        **self.rules,
                    )
                )
            with tqdm(total=len(asked), desc="generations", disable=disable_tqdm) as bar:
                while not all(request.finished for request in asked):
                    bar.update(len(self.engine.step()))
        finally:  # if interrupted, the rest is not wanted
            for request in asked:
                self.engine.cancel(request)
        for request, given in zip(requests, asked, strict=True):
            if given.error is not None:
                raise given.error
            self.cache_hook.add_partial("generate_until", request.args, given.completion.text)
        return [given.completion.text or "" for given in asked]


def _is_neutral(name: str, value: Any) -> bool:
    """Return whether a setting of transformers' generate changes nothing, such as `num_beams: 1`."""
    if name in GenerationConfig.NEUTRAL:
        return not GenerationConfig.not_neutral({name: value})
    return name in _NEUTRAL_WHATEVER_THE_VALUE or value in _NEUTRAL.get(name, ())


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except ValueError as error:
        sys.exit(f"error: {one_line(error)}")
